"""A whole training step as one graph: loss, gradients, clipping, optimizer update and averaged parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from pyroelbo.compiled.cache import Counters, GraphCache
from pyroelbo.compiled.eager import autocasting, evaluate, restored
from pyroelbo.compiled.environment import Untraceable
from pyroelbo.compiled.plan import Plan
from pyroelbo.compiled.verify import Mismatch, difference
from pyroelbo.optim import aligned, averaging

__all__ = ["CompiledStep"]

# Above so many parameters the update runs right after the graph, in torch's fused kernels: the time to build
# one loop a parameter grows faster than what it saves.
_MOST_INSIDE = 24
# Inductor keeps in float32 what the graph, run by itself, rounds to bfloat16 between two operations. Weights of
# particles are exponentials of sums over all pixels: their gradients differed by up to 0.13 of their size.
_ROUNDING = 0.3
_SLOTS = {"adam": ("exp_avg", "exp_avg_sq"), "adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum",)}


class CompiledStep:
    """loss ← objective; θ ← optimizer(θ, clip(∇loss)); θ̄ ← (1 − a)·θ̄ + a·θ, all in one graph.

    ::

        parameters = dict(pair.named_parameters())
        step = CompiledStep(Trace_ELBO(), pair.model, pair.guide, parameters, lr=1e-3, clip_norm=10.0)
        for y in loader:
            step.lr = schedule(i)              # written into a tensor: nothing is retraced
            loss = step(y)                     # a tensor; only reading it (loss.item()) waits for the device
        tensors = step.state_dict()            # flat, for safetensors; step.load_state_dict(tensors) resumes

    The parameters must exist already (call a lazy guide once). A new structure of input (shape, dtype,
    device, train/eval mode) is captured at its first call, compared with eager under equal seeds, and kept;
    beyond ``max_graphs``, and for models that cannot be a graph, the same update runs on Pyro's eager
    gradients after one ``CompileWarning``. For bf16, call the step inside ``torch.autocast``. With more than
    24 parameters the update runs right after the graph, in torch's fused kernels.

    :param objective: a Pyro ELBO; ``model`` and ``guide`` are its callables.
    :param parameters: the leaf tensors to train, by name; others that the loss reaches stay as they are.
    :param optimizer: "adam", "adamw" or "sgd", with torch.optim's rules for ``betas``, ``eps``,
        ``weight_decay`` (L2 for adam and sgd, decoupled for adamw and 0.01 there by default, as in torch),
        ``momentum`` and ``nesterov``.
    :param clip_norm: bound on the Euclidean norm of the whole gradient, or None.
    :param skip_norm: where the whole gradient is longer than this, or not finite, the step leaves the parameters
        and the optimizer's state as they are, and ``skipped`` counts it (Child, 2021). None takes every step.
    :param ema: decay d of the averaged parameters in ``averages``, or None: a = max(1 − d, 9/(9 + t)) at step t.
    :param buffers: tensors by name that the loss changes (BatchNorm's running statistics), to be averaged alike.
    :param backend: "inductor", or "eager": the captured graph run operation by operation.

    The loss is in nats, as the objective's. To anneal the KL's weight, give ``Weighted_ELBO`` and set its
    ``weight``: a tensor, so that nothing is retraced. A resumed run equals an unbroken one bit for bit on the
    CPU when random state, weights and ``state_dict`` are restored.
    Memory: two tensors a parameter for adam, one for sgd with momentum, one more with ``ema``.
    Sources: Kingma and Ba (2015), algorithm 1; Loshchilov and Hutter (2019), algorithm 2.
    """

    def __init__(
        self,
        objective: Any,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        parameters: Mapping[str, Tensor],
        *,
        optimizer: str = "adam",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        momentum: float = 0.0,
        nesterov: bool = False,
        clip_norm: float | None = None,
        skip_norm: float | None = None,
        ema: float | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        backend: str = "inductor",
        max_graphs: int = 8,
        options: dict[str, Any] | None = None,
    ):
        if optimizer not in _SLOTS:
            raise ValueError(f"optimizer: got {optimizer!r}, takes one of {', '.join(map(repr, _SLOTS))}")
        if not parameters:
            raise ValueError("parameters: got none, takes a mapping from names to leaf tensors")
        for name, p in parameters.items():
            if not (isinstance(p, Tensor) and p.is_leaf and p.requires_grad):
                raise ValueError(f"parameters[{name!r}]: takes a leaf tensor that requires a gradient")
        _positive("lr", lr, zero=True)
        if clip_norm is not None:
            _positive("clip_norm", clip_norm)
        if skip_norm is not None:
            _positive("skip_norm", skip_norm)
        if ema is not None and not 0 <= ema < 1:
            raise ValueError(f"ema: got {ema!r}, takes a decay in [0, 1) or None")
        if nesterov and momentum <= 0:
            raise ValueError("nesterov: takes a positive momentum")
        self.parameters = dict(parameters)
        self._kind = "differentiable" if hasattr(objective, "differentiable_loss") else "grads"
        decay = (0.01 if optimizer == "adamw" else 0.0) if weight_decay is None else weight_decay
        self._rule = (optimizer, betas, eps, decay, momentum, nesterov, clip_norm, ema)
        self._skip_norm = skip_norm
        first = next(iter(self.parameters.values()))
        exact = torch.float32 if first.device.type == "mps" else torch.float64

        def scalar(value: float) -> Tensor:
            return torch.tensor(value, dtype=exact, device=first.device)

        slots = _SLOTS[optimizer] if optimizer != "sgd" or momentum else ()
        self._clock, self._lr = scalar(0.0).float(), scalar(lr)
        self.skipped = scalar(0.0).float()
        self._slots = {
            slot: {n: torch.zeros_like(p, requires_grad=False) for n, p in self.parameters.items()}
            for slot in slots
        }
        self._buffers = {} if ema is None or buffers is None else dict(buffers)
        averaged = {} if ema is None else {**self.parameters, **self._buffers}
        self.averages = {n: t.detach().clone() for n, t in averaged.items()}
        self.objective, self._model, self._guide = objective, model, guide
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._cache = _StepCache(self, backend, max_graphs, options)

    @property
    def counters(self) -> Counters:
        """Calls, captures, builds and fallbacks so far."""
        return self._cache.counters

    @property
    def lr(self) -> float:
        """The learning rate; assigning writes it into the graph's input."""
        return float(self._lr)

    @lr.setter
    def lr(self, value: float) -> None:
        _positive("lr", value, zero=True)
        self._lr.fill_(value)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """One step on a batch; the loss before the update, a detached tensor of shape []."""
        cache = self._cache
        found = None
        if not (_PYRO_STACK and cache.inside_handlers()):
            found = cache.lookup(self._kind, self._model, self._guide, args, kwargs)
        if found is None:
            cache.counters.eager_calls += 1
            loss = self._eager(args, kwargs)
        else:
            graph, data, state = found
            loss = graph(cache.inputs(graph.plan, data, state))[0]
            cache.counters.compiled_calls += 1
        ema = self._rule[7]
        if self._buffers and ema is not None:
            averages = [self.averages[name] for name in self._buffers]
            self._average(averages, list(self._buffers.values()), self._clock, self._lr)
        return loss

    def _eager(self, args: tuple, kwargs: dict) -> Tensor:
        for p in self.parameters.values():
            p.grad = None
        value = evaluate(self.objective, self._kind, self._model, self._guide, args, kwargs)
        names = [n for n, p in self.parameters.items() if p.grad is not None]
        with torch.no_grad():
            gradients: list[Any] = [self.parameters[n].grad for n in names]
            skip = self._skip(gradients)
            if skip is None or not bool(skip):
                self._update([self.parameters[n] for n in names], gradients, self._extra(names))
            else:
                self.skipped += 1
        for p in self.parameters.values():
            p.grad = None
        return torch.as_tensor(value).detach()

    def _trained(self, plan: Plan) -> list[tuple[int, int, str]]:
        """(output, state, name) for each gradient of the plan that belongs to a parameter."""
        state = plan.state() or []
        names = {id(p): n for n, p in self.parameters.items()}
        return [(1 + k, i, names[id(state[i])]) for k, i in enumerate(plan.leaves) if id(state[i]) in names]

    def _extra(self, names: list[str]) -> list[Tensor]:
        extra = [self._clock, self._lr]
        for slot in (*self._slots.values(), *([self.averages] if self.averages else [])):
            extra += [slot[name] for name in names]
        return extra

    def _clip(self, gradients: list[Tensor]) -> list[Tensor]:
        clip = self._rule[6]
        if clip is None or not gradients:
            return gradients
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        factor = (clip / (norm + 1e-6)).clamp(max=1.0)
        return [g * factor for g in gradients]

    def _skip(self, gradients: list[Tensor]) -> Tensor | None:
        """1 where the step is to be left out, 0 where not, a tensor []; None where none ever is."""
        if self._skip_norm is None or not gradients:
            return None
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        return (~(norm <= self._skip_norm)).float()

    def _split(self, extra: list[Tensor], size: int) -> list[list[Tensor]]:
        return [extra[2 + i * size : 2 + (i + 1) * size] for i in range((len(extra) - 2) // max(size, 1))]

    def _update(self, params: list[Tensor], gradients: list[Tensor], extra: list[Tensor]) -> None:
        kind, (beta1, beta2), eps, decay, momentum, nesterov, _, ema = self._rule
        clock, lr = extra[:2]
        slots = self._split(extra, len(params))
        clock.add_(1)
        time = clock.to(lr.dtype)
        long = (1 - beta2**time).sqrt()
        # A view puts the number into memory; Inductor would else raise to powers anew for every 16 elements.
        rate = (lr * long / (1 - beta1**time)).as_strided((), ())
        small = (eps * long).as_strided((), ())
        newest = averaging(ema or 0.0, time).as_strided((), ())
        for i, (p, g) in enumerate(zip(params, self._clip(gradients), strict=True)):
            if kind == "adamw":
                p.mul_(1 - lr * decay)
            elif decay:
                g = g + decay * p
            if kind == "sgd":
                if momentum:
                    velocity = slots[0][i].mul_(momentum).add_(g)
                    g = g + momentum * velocity if nesterov else velocity
                p.sub_(lr * g)
            else:
                mean = slots[0][i].lerp_(g, 1 - beta1)
                square = slots[1][i].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                p.sub_(rate * mean / (square.sqrt() + small))
            if ema is not None:
                slots[-1][i].lerp_(p, newest.to(p.dtype))

    def _fused_update(
        self, params: list[Tensor], gradients: list[Tensor], extra: list[Tensor], skip: Tensor | None
    ) -> None:
        """``_update`` after clipping, by torch's kernels for many tensors at once; they do nothing where ``skip``
        is 1."""
        kind, (beta1, beta2), eps, decay, momentum, nesterov, _, ema = self._rule
        clock, lr = extra[:2]
        slots = self._split(extra, len(params))
        gradients = [aligned(g, p) for g, p in zip(gradients, params, strict=True)]
        clock.add_(1 if skip is None else 1 - skip)
        if skip is not None:
            self.skipped.add_(skip)
        rate: Any = lr if lr.is_cuda else lr.item()
        if kind == "sgd":
            torch._fused_sgd_(
                params,
                gradients,
                slots[0] if momentum else [],
                weight_decay=decay,
                momentum=momentum,
                lr=rate,
                dampening=0.0,
                nesterov=nesterov,
                maximize=False,
                is_first_step=False,
                found_inf=skip,
            )
        else:
            fused = torch._fused_adamw_ if kind == "adamw" else torch._fused_adam_
            fused(
                params,
                gradients,
                slots[0],
                slots[1],
                [],
                [clock] * len(params),
                lr=rate,
                beta1=beta1,
                beta2=beta2,
                weight_decay=decay,
                eps=eps,
                amsgrad=False,
                maximize=False,
                found_inf=skip,
            )
        if ema is not None:
            self._average(slots[-1], params, clock, lr)

    def _average(self, averages: list[Tensor], tensors: list[Tensor], clock: Tensor, lr: Tensor) -> None:
        newest = averaging(self._rule[-1] or 0.0, clock.to(lr.dtype))
        if lr.is_cuda:  # nothing waits for the device
            torch._foreach_lerp_(averages, tensors, [newest.to(t.dtype) for t in tensors])
        else:
            torch._foreach_lerp_(averages, tensors, newest.item())

    def state_dict(self) -> dict[str, Tensor]:
        """The optimizer's state as one flat dict of copied tensors: "step", "lr", "exp_avg.NAME", ..."""
        return {name: t.detach().clone() for name, t in self._named_state()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values of ``state_dict`` back in place; names and shapes must agree."""
        own = dict(self._named_state())
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())[0]
            raise ValueError(f"tensors: {odd!r} is missing or unknown; takes the keys of state_dict()")
        for name, t in own.items():
            if t.shape != tensors[name].shape:
                raise ValueError(
                    f"tensors[{name!r}]: got shape {tuple(tensors[name].shape)}, takes {tuple(t.shape)}"
                )
        with torch.no_grad():
            for name, t in own.items():
                t.copy_(tensors[name])

    def _named_state(self) -> list[tuple[str, Tensor]]:
        named = [("step", self._clock), ("lr", self._lr)]
        if self._skip_norm is not None:
            named.append(("skipped", self.skipped))
        for slot, tensors in (*self._slots.items(), ("ema", self.averages)):
            named += [(f"{slot}.{name}", t) for name, t in tensors.items()]
        return named


class _StepCache(GraphCache):
    def __init__(self, step: CompiledStep, backend: str, max_graphs: int, options: dict[str, Any] | None):
        super().__init__(step.objective, backend, max_graphs, options, patient=False)
        self._step = step
        self._extras: dict[int, list[Tensor]] = {}

    def inputs(self, plan: Plan, data: list[Tensor], state: list[Tensor]) -> list[Tensor]:
        return [*data, *state, *self._extras[id(plan)]]

    def checked(self, plan: Plan, runner: Callable[..., list]) -> Callable[..., list]:
        return plan.graph

    def build(self, plan: Plan, data: list[Tensor], eager: Any) -> Callable[..., list]:
        from torch.fx.experimental.proxy_tensor import make_fx

        step, state = self._step, plan.state() or []
        trained = step._trained(plan)
        if not trained:
            raise Untraceable("no parameter of the step receives a gradient")
        extra = self._extras[id(plan)] = step._extra([name for _, _, name in trained])
        first, last = len(data), len(data) + len(state)
        params = [first + i for _, i, _ in trained]
        inside = len(trained) <= _MOST_INSIDE and step._skip_norm is None

        def whole(*inputs: Tensor) -> list[Tensor]:
            outputs = plan.graph(*inputs[:last])
            gradients = [outputs[k] for k, _, _ in trained]
            if not inside:
                skip = step._skip(gradients)
                return [outputs[0], *step._clip(gradients), *([] if skip is None else [skip])]
            step._update([inputs[i] for i in params], gradients, list(inputs[last:]))
            return [outputs[0]]

        inputs = [*data, *state, *extra]
        off = torch.autocast(inputs[0].device.type, enabled=False)
        with torch.no_grad(), restored(inputs[first:]), off:
            graph = make_fx(whole)(*inputs)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        outputs = 1 if inside else 1 + len(trained)
        runner = self.attempt(graph, inputs, lambda runner: _same_step(graph, runner, inputs, first, outputs))
        if inside:
            return runner

        def both(*inputs: Tensor) -> list[Tensor]:
            outputs = runner(*inputs)
            gradients = list(outputs[1:])
            skip = None if step._skip_norm is None else gradients.pop()
            step._fused_update([inputs[i] for i in params], gradients, list(inputs[last:]), skip)
            return [outputs[0]]

        return both


def _same_step(
    graph: Callable[..., list], runner: Callable[..., list], inputs: list[Tensor], first: int, outputs: int
) -> None:
    results = []
    for run in (graph, runner):
        with torch.no_grad(), restored(inputs[first:]):
            torch.manual_seed(20)
            results.append([t.detach().clone() for t in (*run(*inputs), *inputs[first:])])
    least = _ROUNDING if autocasting() else 0.0
    found = difference(results[0], results[1], outputs, least)
    if found:
        raise Mismatch(found)


def _positive(name: str, value: Any, zero: bool = False) -> None:
    if not isinstance(value, (int, float)) or not (value > 0 or (zero and value == 0)) or value != value:
        raise ValueError(f"{name}: got {value!r}, takes a {'non-negative' if zero else 'positive'} number")
