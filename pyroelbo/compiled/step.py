"""A whole training step as one graph: loss, gradients, clipping, optimizer update and averaged parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from pyroelbo.compiled.cache import Counters, Graph, GraphCache
from pyroelbo.compiled.eager import Call, autocasting, evaluate, gradient_hooks, restored, unhooked
from pyroelbo.compiled.environment import Untraceable
from pyroelbo.compiled.plan import Plan
from pyroelbo.compiled.verify import Mismatch, difference
from pyroelbo.optim import Reduction, TrainingStep, UpdateRule, aligned, averaging

__all__ = ["CompiledStep"]

# Above so many parameters the update runs right after the graph, in torch's fused kernels: the time to build
# one loop a parameter grows faster than what it saves.
_MOST_INSIDE = 24
# Inductor keeps in float32 what the graph, run by itself, rounds to bfloat16 between two operations. Weights
# of particles are exponentials of sums over all pixels: their gradients differed by up to 0.13 of their size.
_ROUNDING = 0.3


class CompiledStep(TrainingStep):
    """:class:`~pyroelbo.optim.TrainingStep` with loss, gradients, clipping and update in one graph.

    ::

        parameters = dict(pair.named_parameters())
        step = CompiledStep(Trace_ELBO(), pair.model, pair.guide, parameters, lr=1e-3, clip_norm=10.0)
        for y in loader:
            step.lr = schedule(i)              # written into a tensor: nothing is retraced
            loss = step(y)                     # a tensor; only reading it (loss.item()) waits for the device
        tensors = step.state_dict()            # flat, for safetensors; step.load_state_dict(tensors) resumes

    The parameters must exist already (call a lazy guide once). A new structure of input (shape, dtype,
    device, train/eval mode) is captured at its first call, compared with eager under equal seeds, and kept;
    beyond ``max_graphs``, and for models that cannot be captured, the same update runs on Pyro's eager
    gradients after one ``CompileWarning``. For bf16, call the step inside ``torch.autocast``. With more than
    24 parameters, with ``skip_norm``, with ``reduce`` and with gradient hooks on parameters (they fire once a
    step, as in eager) the update runs right after the graph, in torch's fused kernels.

    Args:
        objective: a Pyro ELBO; its loss is in nats.
        model: the model, and
        guide: the guide that the objective is called with.
        parameters: the leaf tensors to train, by name.
        lr: learning rate.
        buffers: tensors by name that the loss changes (BatchNorm's running statistics), averaged with
            ``ema``.
        reduce: called with the list of gradients between backward pass and clipping; returns those to use.
        backend: "inductor", or "eager": the captured graph run operation by operation.
        max_graphs: most graphs kept.
        options: options of Inductor.
        rule: fields of :class:`~pyroelbo.optim.UpdateRule`: optimizer, clip_norm, skip_norm, ema, …

    To anneal the KL weight, give ``Weighted_ELBO`` and set its ``weight``: a tensor, so nothing is retraced.
    A resumed run equals an unbroken one bit for bit on the CPU when random state, weights and ``state_dict``
    are restored.
    """

    def __init__(
        self,
        objective: Any,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        parameters: Mapping[str, Tensor],
        *,
        lr: float = 1e-3,
        buffers: Mapping[str, Tensor] | None = None,
        reduce: Reduction | None = None,
        backend: str = "inductor",
        max_graphs: int = 8,
        options: dict[str, Any] | None = None,
        **rule: Any,
    ) -> None:
        super().__init__(parameters, UpdateRule(**rule), lr, buffers, reduce)
        self._kind = "differentiable" if hasattr(objective, "differentiable_loss") else "grads"
        self.objective, self._model, self._guide = objective, model, guide
        self._cache = _StepCache(self, backend, max_graphs, options)

    @property
    def counters(self) -> Counters:
        """Calls, captures, builds and fallbacks so far."""
        return self._cache.counters

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        cache = self._cache
        found = None
        if not (_PYRO_STACK and cache.inside_handlers()):
            found = cache.lookup(self._kind, self._model, self._guide, args, kwargs)
            if found is not None and not cache.hooked and _hooked(found[0].plan, found[2]):
                cache.follow_hooks()
                found = cache.lookup(self._kind, self._model, self._guide, args, kwargs)
        if found is None:
            cache.counters.eager_calls += 1
            return self._eager(args, kwargs)
        graph, data, state = found
        loss = graph(cache.inputs(graph.plan, data, state))[0]
        cache.counters.compiled_calls += 1
        self._average_buffers()
        return loss

    def _eager(self, args: tuple, kwargs: dict) -> Tensor:
        for p in self.parameters.values():
            p.grad = None
        value = evaluate(self.objective, self._kind, self._model, self._guide, args, kwargs)
        self.update({n: p.grad for n, p in self.parameters.items() if p.grad is not None})
        for p in self.parameters.values():
            p.grad = None
        return torch.as_tensor(value).detach()

    def _trained(self, plan: Plan) -> list[tuple[int, int, str]]:
        """(output, state, name) for each gradient of the plan that belongs to a parameter."""
        state = plan.state() or []
        names = {id(p): n for n, p in self.parameters.items()}
        return [(1 + k, i, names[id(state[i])]) for k, i in enumerate(plan.leaves) if id(state[i]) in names]

    # What follows is traced into the graph: sums of squares fuse, where foreach kernels would not.

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        return torch.stack([g.square().sum() for g in gradients]).sum().sqrt()

    def _clip(self, gradients: list[Tensor]) -> list[Tensor]:
        if self.rule.clip_norm is None or not gradients:
            return gradients
        factor = (self.rule.clip_norm / (self._norm(gradients) + 1e-6)).clamp(max=1.0)
        return [g * factor for g in gradients]

    def _update(self, params: list[Tensor], gradients: list[Tensor], state: list[Tensor]) -> None:
        """The update as single operations, for the graph."""
        rule, (beta1, beta2) = self.rule, self.rule.betas
        clock, lr = state[:2]
        slots = self._split(state, len(params))
        clock.add_(1)
        time = clock.to(lr.dtype)
        correction = (1 - beta2**time).sqrt()
        # A view puts the number into memory; otherwise Inductor computes the powers for every 16 elements.
        rate = (lr * correction / (1 - beta1**time)).as_strided((), ())
        eps = (rule.eps * correction).as_strided((), ())
        newest = averaging(rule.ema or 0.0, time).as_strided((), ())
        for i, (p, g) in enumerate(zip(params, self._clip(gradients), strict=True)):
            if rule.optimizer == "adamw":
                p.mul_(1 - lr * rule.decay)
            elif rule.decay:
                g = g + rule.decay * p
            if rule.optimizer == "sgd":
                if rule.momentum:
                    velocity = slots[0][i].mul_(rule.momentum).add_(g)
                    g = g + rule.momentum * velocity if rule.nesterov else velocity
                p.sub_(lr * g)
            else:
                mean = slots[0][i].lerp_(g, 1 - beta1)
                square = slots[1][i].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                p.sub_(rate * mean / (square.sqrt() + eps))
            if rule.ema is not None:
                slots[-1][i].lerp_(p, newest.to(p.dtype))


def _hooked(plan: Plan, state: list[Tensor]) -> bool:
    return any(gradient_hooks(state[i]) for i in plan.leaves)


def _through_hooks(leaf: Tensor, gradient: Tensor) -> Tensor | None:
    """What the leaf's gradient hooks make of its gradient."""
    if not gradient_hooks(leaf):
        return gradient
    leaf.grad = None
    torch.autograd.backward([leaf], [aligned(gradient, leaf)])
    found, leaf.grad = leaf.grad, None
    return found


class _StepCache(GraphCache):
    def __init__(self, step: CompiledStep, backend: str, max_graphs: int, options: dict[str, Any] | None):
        super().__init__(step.objective, backend, max_graphs, options, patient=False)
        self._step = step
        self._extras: dict[int, list[Tensor]] = {}
        self.hooked = False

    def follow_hooks(self) -> None:
        """Build all graphs anew, so that every gradient leaves them and passes through its leaf's hooks."""
        self.hooked = True
        self.graphs.clear()
        self._extras.clear()

    def inputs(self, plan: Plan, data: list[Tensor], state: list[Tensor]) -> list[Tensor]:
        return [*data, *state, *self._extras[id(plan)]]

    def _time(self, graph: Graph, call: Call) -> None:
        step = self._step
        reduce, step.reduce = step.reduce, None  # other processes may not be timing a graph of theirs
        try:
            with unhooked(graph.plan.state() or []):
                super()._time(graph, call)
        finally:
            step.reduce = reduce

    def checked(self, plan: Plan, runner: Callable[..., list]) -> Callable[..., list]:
        return plan.graph

    def build(self, plan: Plan, data: list[Tensor], eager: Any) -> Callable[..., list]:
        from torch.fx.experimental.proxy_tensor import make_fx

        step, state = self._step, plan.state() or []
        trained = step._trained(plan)
        if not trained:
            raise Untraceable("no parameter of the step receives a gradient")
        names = [name for _, _, name in trained]
        extra = self._extras[id(plan)] = step._state_of(names)
        first, last = len(data), len(data) + len(state)
        params = [first + i for _, i, _ in trained]
        others = [(1 + k, i) for k, i in enumerate(plan.leaves) if self.hooked and first + i not in params]
        longest, outside = step.rule.skip_norm, self.hooked or step.reduce is not None
        inside = len(trained) <= _MOST_INSIDE and longest is None and not outside

        def whole(*inputs: Tensor) -> list[Tensor]:
            outputs = plan.graph(*inputs[:last])
            gradients = [outputs[k] for k, _, _ in trained]
            if outside:
                return [outputs[0], *gradients, *(outputs[k] for k, _ in others)]
            if not inside:
                skip = [] if longest is None else [(~(step._norm(gradients) <= longest)).float()]
                return [outputs[0], *step._clip(gradients), *skip]
            step._update([inputs[i] for i in params], gradients, list(inputs[last:]))
            return [outputs[0]]

        inputs = [*data, *state, *extra]
        off = torch.autocast(inputs[0].device.type, enabled=False)
        with torch.no_grad(), restored(inputs[first:]), off:
            graph = make_fx(whole)(*inputs)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        slots = step._split(extra, len(trained))[: len(step.rule.slots)]
        check = _SameStep(graph, inputs, first, slots, plan.labels, names)
        runner = self.attempt(graph, inputs, check)
        if inside:
            return runner

        def both(*inputs: Tensor) -> list[Tensor]:
            outputs = runner(*inputs)
            gradients = list(outputs[1:])
            if outside:
                leaves = [*params, *(first + i for _, i in others)]
                found = [_through_hooks(inputs[i], g) for i, g in zip(leaves, gradients, strict=True)]
                step._apply({n: g for n, g in zip(names, found, strict=False) if g is not None})
                return [outputs[0]]
            skip = None if longest is None else gradients.pop()
            step._fused_update([inputs[i] for i in params], gradients, list(inputs[last:]), skip)
            return [outputs[0]]

        return both


class _SameStep:
    """Compares a build of a step with its captured graph: outputs, and all tensors that either has written.

    The second moments start at 1, and all moments are compared relative to the whole gradient: a gradient
    that is only rounding (of a bias before BatchNorm) would be divided by itself in Adam's first step, to
    plus or minus one. Raises ``Mismatch``.
    """

    def __init__(
        self,
        graph: Callable[..., list],
        inputs: list[Tensor],
        first: int,
        slots: list[list[Tensor]],
        labels: list[str],
        names: list[str],
    ) -> None:
        self._graph, self._inputs, self._written = graph, inputs, inputs[first:]
        self._moments = [t for slot in slots for t in slot]
        self._squares = slots[1] if len(slots) > 1 else []
        self._labels = labels
        self._names = names

    def _run(self, run: Callable[..., list]) -> tuple[list[Tensor], int]:
        moments = {id(t) for t in self._moments}
        others = [t for t in self._written if id(t) not in moments]
        with torch.no_grad(), restored(self._written):
            for t in self._squares:
                t.fill_(1.0)
            torch.manual_seed(20)
            outputs = run(*self._inputs)
            found = [t.detach().clone() for t in (*outputs, *self._moments, *others)]
        return found, len(outputs)

    def __call__(self, runner: Callable[..., list]) -> None:
        (expected, outputs), (found, _) = self._run(self._graph), self._run(runner)
        gradients = outputs + len(self._moments)

        def name(i: int) -> str:
            if i == 0:
                return "the loss"
            if i < outputs:
                return f"the gradient of {self._names[i - 1]!r}" if i <= len(self._names) else f"output {i}"
            if i < gradients:
                return f"a moment of {self._names[(i - outputs) % len(self._names)]!r}"
            k = i - gradients
            return repr(self._labels[k]) if k < len(self._labels) else "the optimizer's state"

        least = _ROUNDING if autocasting() else 0.0
        sentence = difference(expected, found, gradients, least, name)
        if sentence:
            raise Mismatch(sentence)
