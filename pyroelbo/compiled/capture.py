"""One run of a Pyro loss, with its gradients, as a graph of tensor operations."""

from __future__ import annotations

import copy
import itertools
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
import torch.fx as fx
from pyro.ops.provenance import ProvenanceTensor, detach_provenance
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from pyroelbo.compiled.environment import Environment

__all__ = ["Mismatch", "Plan", "Untraceable", "capture", "inductor", "reference", "verify"]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
LOOSE = 5e-2
_FRESH = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)


class Untraceable(RuntimeError):
    """The loss cannot become one static graph; the message says why and at which site."""


class Mismatch(RuntimeError):
    """A graph does not reproduce the eager loss or gradients under the same seed."""


class _Census(TorchDispatchMode):
    """Collects the tensors that a run reads and did not make itself."""

    def __init__(self) -> None:
        super().__init__()
        self.free: dict[int, Tensor] = {}
        self._made: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _FRESH:
            for x in pytree.arg_tree_leaves(*args, **kwargs):
                if isinstance(x, Tensor) and x not in self._made:
                    self.free.setdefault(id(x), x)
        out = func(*args, **kwargs)
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor) and id(x) not in self.free:
                self._made[x] = True
        return out


class _Interception(TorchFunctionMode):
    """Keeps the numbers of Pyro's loss code in the graph, and gathers gradients beside ``.grad``."""

    def __init__(self, whole_plates: set[str]) -> None:
        super().__init__()
        self._whole = whole_plates
        self.gradients: dict[Tensor, Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return self._backward(args[0], *args[1:], **kwargs)
        if func is Tensor.__getitem__ and _scalar_index(args[1]):
            return args[0][args[1].reshape(1)].squeeze(0)  # torch would ask for the number behind the index
        if func is Tensor.item or func is Tensor.__bool__:
            frame = sys._getframe(1)
            module = frame.f_globals.get("__name__", "")
            if module == "pyro.poutine.indep_messenger":
                plate = frame.f_locals["self"]
                if plate.name in self._whole and plate.size == plate.subsample_size:
                    with _disable_current_modes():  # a sequential plate without subsampling: 0, 1, 2, ...
                        return args[0].item()
            if func is Tensor.item and (
                module.startswith("pyro.infer.") or module.startswith("pyroelbo.objectives.")
            ):
                value = args[0].detach()
                return value.double() if value.is_floating_point() and value.device.type != "mps" else value
            if func is Tensor.__bool__ and module == "pyro.infer.util":
                return True  # Dice: the masked product below covers the other branch
        return func(*args, **kwargs)

    def _backward(self, root, gradient=None, retain_graph=None, create_graph=False, inputs=None):
        leaves, seen, todo = [], set(), [root.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                leaves.append(node.variable)
            todo.extend(parent for parent, _ in node.next_functions)
        found = torch.autograd.grad(
            root, leaves, gradient, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
        )
        for leaf, g in zip(leaves, found, strict=True):
            if g is not None:
                self.gradients[leaf] = self.gradients[leaf] + g if leaf in self.gradients else g


def _scalar_index(index: Any) -> bool:
    return isinstance(index, Tensor) and not index.dim() and index.dtype in (torch.int64, torch.int32)


class _LastSite(Messenger):
    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None
        self.plates: set[str] = set()

    def _pyro_sample(self, msg) -> None:
        self.name = msg["name"]
        if type(msg["fn"]).__name__ == "_Subsample" and msg["value"] is None:
            self.plates.add(msg["name"])


def _masked_dot(x: Tensor, y: Tensor) -> Tensor:
    y = torch.where(x > 0, y, torch.zeros_like(y))
    return x * y if x.dim() == 0 else torch.tensordot(x, y, dims=x.dim())


def _tril_matrix_to_vec(mat: Tensor, diag: int = 0) -> Tensor:
    row, column = torch.tril_indices(mat.shape[-1], mat.shape[-1], diag, device=mat.device)
    return mat[..., row, column]


def _vec_to_tril_matrix(vec: Tensor, diag: int = 0) -> Tensor:
    n = next(n for n in itertools.count(max(1, -diag)) if _tril_size(n, diag) >= vec.shape[-1])
    row, column = torch.tril_indices(n, n, diag, device=vec.device)
    mat = vec.new_zeros(*vec.shape[:-1], n, n)
    mat[..., row, column] = vec
    return mat


def _tril_size(n: int, diag: int) -> int:
    return sum(max(0, min(n, i + 1 + diag)) for i in range(n))


@contextmanager
def _static_pyro() -> Iterator[None]:
    """Pyro and torch without the steps that look at values: their results are compared with eager instead."""
    import pyro.infer.util
    import pyro.util
    from torch.distributions import Distribution, transforms

    patches: list[tuple[Any, str, Any]] = [
        (pyro.infer.util, "_fulldot", _masked_dot),
        (pyro.util, "torch_isnan", lambda x: False),
        # A distribution made before the run keeps the validation of its own that was on then.
        (Distribution, "_validate_sample", lambda self, value: None),
        # Torch picks the triangle by a mask, which the sampler and density of LKJ need.
        (transforms, "tril_matrix_to_vec", _tril_matrix_to_vec),
        (transforms, "vec_to_tril_matrix", _vec_to_tril_matrix),
    ]
    before = [getattr(owner, name) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        for (owner, name, _), value in zip(patches, before, strict=True):
            setattr(owner, name, value)


def evaluate(loss: Any, kind: str, model: Any, guide: Any, args: tuple, kwargs: dict) -> Any:
    """Run the loss as Pyro would: ``kind`` is "loss" (the value alone), "grads" (as SVI does) or
    "differentiable" (as a torch loop does)."""
    if kind == "loss":
        with torch.no_grad():
            return loss.loss(model, guide, *args, **kwargs)
    if kind == "grads" and hasattr(loss, "loss_and_grads"):
        return loss.loss_and_grads(model, guide, *args, **kwargs)
    if hasattr(loss, "differentiable_loss"):
        value = loss.differentiable_loss(model, guide, *args, **kwargs)
        value.backward()
        return value.detach()
    return loss.loss_and_grads(model, guide, *args, **kwargs)


class _FirstValues(Messenger):
    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[str, Tensor] = {}

    def _pyro_post_param(self, msg) -> None:
        self.entries.setdefault(msg["name"], msg["value"].unconstrained())


def materialize(loss: Any, kind: str, model: Any, guide: Any, args: tuple, kwargs: dict) -> None:
    """Run once so that lazily made parameters exist; draws, buffers, gradients and values are put back."""
    seen = [t for t in Environment([model, guide, loss])._kept if isinstance(t, Tensor)]
    store = pyro.get_param_store()
    gradients = [(t, t.grad) for t in (*seen, *store._params.values()) if t.is_leaf]
    before = set(store._params)
    with restored([t for t in seen if not t.requires_grad]), _quiet(), _FirstValues() as first:
        evaluate(loss, kind, model, guide, args, kwargs)
        made = [name for name in store._params if name not in before]
    for name in made:
        if name in first.entries:
            store._params[name] = first.entries[name]
            store._param_to_name[first.entries[name]] = name
            first.entries[name].grad = None
    for t, g in gradients:
        t.grad = g


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put back, afterwards, the values of ``tensors``, the param store's entries, and the random state."""
    store = pyro.get_param_store()
    caching = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a cached cast of a weight would be a constant of the graph
    torch.clear_autocast_cache()
    entries, names = dict(store._params), dict(store._param_to_name)
    saved = [t.detach().clone() for t in tensors]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        torch.set_autocast_cache_enabled(caching)
        store._params.clear()
        store._params.update(entries)
        store._param_to_name.clear()
        store._param_to_name.update(names)
        with torch.no_grad():
            for t, value in zip(tensors, saved, strict=True):
                if not torch.equal(t, value):
                    t.copy_(value)


class Plan:
    """A captured loss: ``graph(*data, *state) -> [loss, *gradients]``, and where its state lives.

    State are the parameters, buffers and other tensors that the model reads; each call looks them up again
    in the param store or in the place where the model finds them, so replaced tensors are followed.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        num_data: int,
        state: list[Tensor],
        leaves: list[int],
        sites: list[str],
        environment: Environment,
    ):
        self.graph = graph
        self.num_data = num_data
        self.leaves = leaves
        self.sites = sites
        self.environment = environment
        names = {id(t): name for name, t in pyro.get_param_store()._params.items()}
        self._stored = [names[id(t)] for t in state if id(t) in names]
        self._placed = [environment.tensors[id(t)] for t in state if self._kind(t, names, environment) == 1]
        self._fixed = [t for t in state if self._kind(t, names, environment) == 2]
        self._cells = [place[0] for place in self._placed if place[1] is None and isinstance(place[0], _CELL)]
        self._mapped = [place for place in self._placed if not isinstance(place[0], _CELL)]
        self._shapes = [_layout(t) for t in state]
        self._pointers = [t.data_ptr() for t in state]
        self._trained = [t.requires_grad for t in state]

    @staticmethod
    def _kind(t: Tensor, names: dict[int, str], environment: Environment) -> int:
        return 0 if id(t) in names else 1 if id(t) in environment.tensors else 2

    @classmethod
    def order(cls, free: list[Tensor], environment: Environment) -> list[Tensor]:
        names = {id(t): name for name, t in pyro.get_param_store()._params.items()}

        def rank(t: Tensor) -> tuple[int, int]:
            kind = cls._kind(t, names, environment)
            return kind, int(kind == 1 and isinstance(environment.tensors[id(t)][0], _CELL))

        return sorted(free, key=rank)

    def state(self) -> list[Tensor] | None:
        """The tensors as they are now, or None where one is gone or has another layout than at capture."""
        try:
            params = pyro.get_param_store()._params
            now = [params[name] for name in self._stored]
            now += [container[key] for container, key in self._mapped]
            now += [cell.cell_contents for cell in self._cells]
        except (KeyError, IndexError, ValueError):
            return None
        now += self._fixed
        try:
            pointers = [t.data_ptr() for t in now]
            trained = [t.requires_grad for t in now]
        except (AttributeError, RuntimeError):  # not a tensor any more, or one without storage
            return None
        if trained != self._trained:  # frozen or thawed in place
            return None
        if pointers != self._pointers:
            if [_layout(t) for t in now] != self._shapes:
                return None
            self._pointers = pointers
        return now

    def mutable(self) -> list[Tensor]:
        """The state that a run may write: everything but the trained leaves."""
        now = self.state() or []
        leaves = set(self.leaves)
        return [t for i, t in enumerate(now) if i not in leaves]


_CELL = type((lambda x: lambda: x)(0).__closure__[0])  # type: ignore[index]


def _layout(t: Tensor) -> tuple:
    return t.shape, t.stride(), t.dtype, t.device


def capture(loss: Any, kind: str, model: Any, guide: Any, args: tuple, kwargs: dict) -> Plan:
    """Trace the loss and its gradients once through Pyro's handlers; what the run changes is put back.

    Raises ``Untraceable`` where the run depends on values of tensors or changes Python numbers that it reads.
    Cost: three eager runs and about a millisecond per operation.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    flat, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]
    data = [flat[i].detach().contiguous() for i in places]
    store = pyro.get_param_store()
    for name, t in list(store._params.items()):
        if isinstance(t, ProvenanceTensor):  # TraceGraph_ELBO leaves its baselines' averages so
            del store._param_to_name[t]
            store._params[name] = plain = detach_provenance(t).detach().requires_grad_()
            store._param_to_name[plain] = name
    sites: dict[str, bool] = {}
    last = _LastSite()

    def run(tensors: Sequence[Tensor]) -> tuple[Tensor, dict[Tensor, Tensor], dict[str, Tensor]]:
        values = list(flat)
        for i, t in zip(places, tensors, strict=True):
            values[i] = t
        a, k = pytree.tree_unflatten(values, spec)
        before = dict(store._params)
        seen = _Interception(last.plates)
        with _static_pyro(), last, pyro.poutine.trace(param_only=True) as params, seen:
            value = evaluate(loss, kind, model, guide, a, k)
        for name in params.trace.nodes:
            sites[name] = True
        if not isinstance(value, Tensor):
            raise Untraceable(f"the loss returned {type(value).__name__}, not one tensor")
        if store._params.keys() != before.keys():
            raise Untraceable("the model makes new parameters at every call")
        writes = {name: t for name, t in store._params.items() if t is not before[name]}
        return value, seen.gradients, {name: before[name] for name in writes}

    environment = Environment([model, guide, loss, *(x for x in flat if not isinstance(x, Tensor))])
    with _reasons(last, model, guide):
        with restored([]), _quiet():
            census = _Census()
            before = {id(t): t for t in environment._kept if isinstance(t, Tensor) and not t.requires_grad}
            with restored(list(before.values())), census:
                run(data)
        changed = environment.forgive()
        if changed is not None:
            raise Untraceable(
                f"running the model changes the Python value {changed!r}, which a compiled call would not do;"
                " keep it in a tensor"
            )
        environment = Environment([model, guide, loss, *(x for x in flat if not isinstance(x, Tensor))])
        own = {id(t) for t in data}
        free = Plan.order([t for i, t in census.free.items() if i not in own], environment)
        leaves: list[Tensor] = []

        def whole(tensors: list[Tensor], state: list[Tensor]) -> list[Tensor]:
            entries = dict(store._params)
            value, gradients, written = run(tensors)
            leaves[:] = list(gradients)
            taken = {t.untyped_storage()._cdata for t in (*tensors, *state)}
            outputs = [value.detach()]
            if kind == "differentiable" and leaves:
                outputs = [value.detach().to(leaves[0].dtype)]
            for leaf, g in gradients.items():
                g = g.detach()
                if g.stride() != leaf.stride() or g.untyped_storage()._cdata in taken:
                    g = (
                        torch.empty_like(leaf).copy_(g)
                        if not leaf.is_contiguous()
                        else g.clone(memory_format=torch.contiguous_format)
                    )
                taken.add(g.untyped_storage()._cdata)
                outputs.append(g)
            with torch.no_grad():
                for name, old in written.items():
                    old.copy_(detach_provenance(store._params[name]))
            store._params.clear()
            store._params.update(entries)
            return outputs

        buffers = [t for t in free if not t.requires_grad or any(t is p for p in store._params.values())]
        with restored(buffers), _quiet():
            graph = make_fx(whole)(data, free)
    graph.graph.set_codegen(fx.graph.CodeGen())
    _refuse_dynamic(graph)
    _tidy(graph)
    used = _prune(graph, len(data), len(free))
    state = [free[i] for i in used]
    where = {id(t): i for i, t in enumerate(state)}
    missing = [leaf for leaf in leaves if id(leaf) not in where]
    if missing:
        raise Untraceable("a parameter is made anew inside the model at every call")
    stale = environment.changed()
    if stale is not None:
        environment.forgive()
    return Plan(graph, len(data), state, [where[id(x)] for x in leaves], list(sites), environment)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _reasons(last: _LastSite, model: Any, guide: Any) -> Iterator[None]:
    try:
        yield
    except Untraceable:
        raise
    except Exception as error:
        message = str(error).strip().splitlines()
        text = message[0] if message else type(error).__name__
        if "tracing tensor" in text or "data-dependent" in text or "_local_scalar_dense" in text:
            text = "Python code or a sampler asks for the value of a tensor"
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not _internal(f.filename)]
        at = f", {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
        site = re.search(r"site '([^']+)'", str(error))
        name = site.group(1) if site else last.name
        raise Untraceable(f"{text} (last site {name!r}{at})") from error


def _internal(path: str) -> bool:
    return any(part in path for part in ("/torch/", "/pyro/", "/pyroelbo/compiled/", "contextlib.py"))


def _refuse_dynamic(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        func = node.target
        if node.op != "call_function" or not isinstance(func, torch._ops.OpOverload):
            continue
        packet = func.overloadpacket
        if packet is torch.ops.aten.index:
            masks = [i for i in node.args[1] if i is not None and _dtype(i) in (torch.bool, torch.uint8)]
            dynamic = bool(masks)
        else:
            dynamic = torch.Tag.dynamic_output_shape in func.tags
        if dynamic:
            raise Untraceable(f"the shape of {packet.__name__}'s result depends on values of tensors")


def _dtype(node: Any) -> Any:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return getattr(value, "dtype", None)


def _tidy(graph: fx.GraphModule) -> None:
    """Constants of one element become literals, and a filled-in standard normal becomes ``randn``: the same
    numbers and the same draws, in forms that Inductor can fuse or call cheaply."""
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.target in _FRESH and getattr(node.args[0], "op", "") == "get_attr":
            constant = getattr(graph, node.args[0].target)
            if constant.numel() != 1 or constant.is_complex():
                continue
            options = {"dtype": constant.dtype, "device": constant.device, "pin_memory": False}
            new = (aten.full.default, (list(constant.shape), constant.item()), options)
        elif (
            node.target is aten.normal_.default
            and len(node.args) == 1
            and not node.kwargs
            and node.args[0].target is aten.empty.memory_format
            and len(node.args[0].users) == 1
        ):
            new = (aten.randn.default, node.args[0].args, dict(node.args[0].kwargs))
        else:
            continue
        with graph.graph.inserting_before(node):
            made = graph.graph.call_function(*new)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.graph.erase_node(node)
    for node in reversed(list(graph.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.graph.erase_node(node)


def _prune(graph: fx.GraphModule, num_data: int, num_state: int) -> list[int]:
    holders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    assert len(holders) == num_data + num_state
    used = [i for i in range(num_state) if holders[num_data + i].users]
    for i in range(num_state):
        if not holders[num_data + i].users:
            graph.graph.erase_node(holders[num_data + i])
    graph.recompile()
    return used


def inductor(graph: fx.GraphModule, inputs: Sequence[Tensor], options: dict[str, Any]) -> Callable[..., list]:
    """Compile a captured graph. Random numbers come from torch's own generators, in eager's order."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    patches: dict[str, Any] = {"fallback_random": True}
    patches |= {name: False for name in ("size_asserts", "alignment_asserts") if hasattr(config, name)}
    patches |= options
    own = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node in own.graph.find_nodes(op="placeholder"):
        node.meta.pop("val", None)  # cpp_wrapper would take these fake tensors, of several modes, for inputs
    with torch.no_grad(), _quiet():
        return compile_fx(own, list(inputs), config_patches=patches)  # type: ignore[return-value]


def reference(
    loss: Any, kind: str, model: Any, guide: Any, args: tuple, kwargs: dict, plan: Plan, seed: int
) -> list[Tensor | None]:
    """Eager loss, gradients and written state under ``seed``; everything is put back."""
    state = plan.state() or []
    trained = [t for t in state if t.requires_grad]
    leaves = [state[i] for i in plan.leaves]
    saved = [t.grad for t in trained]
    others = plan.mutable()
    names = pyro.get_param_store()._param_to_name
    stored = [names.get(t) for t in others]
    try:
        for t in trained:
            t.grad = None
        with restored(others), _quiet():
            torch.manual_seed(seed)
            value = evaluate(loss, kind, model, guide, args, kwargs)
            params = pyro.get_param_store()._params
            found = (params.get(n, t) for t, n in zip(others, stored, strict=True))
            after = [detach_provenance(t).detach().clone() for t in found]
        extra = [t for t in trained if t.grad is not None and not any(t is leaf for leaf in leaves)]
        if extra and kind != "loss":
            raise Mismatch("eager finds a gradient that the graph lacks")
        gradients = [None if t.grad is None else t.grad.clone() for t in leaves]
        return [torch.as_tensor(value, dtype=torch.float64).detach(), *gradients, *after]
    finally:
        for t, g in zip(trained, saved, strict=True):
            t.grad = g


def autocasting() -> bool:
    return torch.is_autocast_enabled("cpu") or (
        torch.cuda.is_available() and torch.is_autocast_enabled("cuda")
    )


def verify(
    plan: Plan,
    runner: Callable[..., list],
    data: Sequence[Tensor],
    eager: Callable[[int], list[Tensor | None]],
) -> None:
    """Compare ``runner`` with eager under equal seeds: loss, every gradient, every buffer.

    A draw may fall on the other side of a threshold by rounding, so the best of three seeds counts. Under autocast the
    two round to half precision in other places: that tolerance then holds for all numbers.
    Raises ``Mismatch`` with the largest relative difference.
    """
    worst, least = "", LOOSE if autocasting() else 0.0
    for seed in (20, 21, 22):
        expected = eager(seed)
        state = plan.state() or []
        others = plan.mutable()
        with restored(others), torch.no_grad():
            torch.manual_seed(seed)
            outputs = list(runner(*data, *state))
            outputs = [t.detach().clone() for t in (*outputs, *others)]
        worst = difference(expected, outputs, 1 + len(plan.leaves), least)
        if not worst:
            return
    raise Mismatch(worst)


def difference(
    expected: Sequence[Tensor | None], found: Sequence[Tensor | None], gradients: int, least: float = 0.0
) -> str:
    """Empty where all agree, else a sentence; norms are compared, gradients beside the whole gradient's. No tolerance
    is below ``least``."""
    whole = sum(float(g.detach().double().norm()) ** 2 for g in expected[1:gradients] if g is not None) ** 0.5
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a is None or b is None:
            if a is not b:
                return f"output {i} is missing on one side"
            continue
        tolerance = TOLERANCE.get(b.dtype, LOOSE)
        if i == 0:
            tolerance = max(TOLERANCE.get(t.dtype, LOOSE) for t in found[:gradients] if t is not None)
        tolerance = max(tolerance, least)
        x, y = a.detach().double(), b.detach().double()
        if not torch.equal(x.isfinite(), y.isfinite()):
            return f"output {i} is finite on one side only"
        x, y = x.nan_to_num(0, 0, 0), y.nan_to_num(0, 0, 0)
        scale = float(x.norm()) + (0.01 * whole if 0 < i < gradients else 0.0)
        gap = float((x - y).norm())
        if gap > tolerance * scale + 1e-12:
            what = (
                "the loss" if i == 0 else f"gradient {i - 1}" if i < gradients else f"buffer {i - gradients}"
            )
            return f"{what} differs by {gap / max(scale, 1e-300):.1e} of its size"
    return ""
