"""One run of a Pyro loss, with its gradients, as a graph of tensor operations."""

from __future__ import annotations

import operator
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
import torch.fx as fx
from pyro.ops.provenance import ProvenanceTensor, detach_provenance
from torch import Tensor

from pyroelbo.compiled.eager import Call, Place, quiet, restored, rewind_sources, source_states, unhooked
from pyroelbo.compiled.environment import Environment, Untraceable, at
from pyroelbo.compiled.interception import (
    FRESH,
    Census,
    Interception,
    LastSite,
    Read,
    internal,
    static_pyro,
    unread,
)
from pyroelbo.compiled.number import Numbers, shadowed
from pyroelbo.compiled.plan import Plan

__all__ = ["capture"]


class _Run:
    """Runs the loss of ``call`` under interception; keeps the names of its sites and the last one reached."""

    def __init__(self, call: Call):
        self.call = call
        self.last = LastSite()
        self.sites: dict[str, bool] = {}

    def __call__(
        self,
        seen: Interception,
        tensors: Sequence[Tensor],
        floats: Sequence[Any],
        placed: Sequence[tuple[Place, Any]] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the entries of the param store that the run has replaced, by name."""
        store = pyro.get_param_store()
        before = dict(store._params)
        with static_pyro(), self.last, pyro.poutine.trace(param_only=True) as params, seen:
            value = self.call.evaluate(tensors, floats, placed)
        self.sites.update(dict.fromkeys(params.trace.nodes, True))
        if isinstance(value, (int, float)):
            value = torch.tensor(float(value))
        if not isinstance(value, Tensor):
            raise Untraceable(f"expected one tensor or float as loss, got {type(value).__name__}")
        if store._params.keys() != before.keys():
            raise Untraceable("the model makes new parameters at every call")
        return value, {name: before[name] for name, t in store._params.items() if t is not before[name]}


def capture(call: Call, lifted: Sequence[Place | int] = (), followed: Sequence[str] = ()) -> Plan:
    """Trace the loss and its gradients once through Pyro's handlers; what the run changes is put back.

    ``lifted`` are Python floats that become inputs: places, or indices among the float arguments.
    ``followed`` are lines whose ``.item()`` becomes a number of the graph, where Python code never needs its
    value; otherwise it is a guard.
    Raises ``Untraceable`` where the run depends on values of tensors that no guard can check, changes Python
    numbers, or draws from generators that torch's seed does not set.
    Cost: three eager runs and about a millisecond per operation.
    """
    _plain_store()
    run = _Run(call)
    environment = Environment(call.roots)
    hooked = [t for t in environment.kept if isinstance(t, Tensor)]
    for t in hooked:
        if t.layout is not torch.strided:
            name = environment.tensor_names[id(t)]
            raise Untraceable(f"{name!r} is a tensor of layout {t.layout}, which has no strides")
    with _reasons(run.last), quiet(), unhooked(hooked):
        free, environment, census = _census(run)
        return _Tracer(run, free, lifted, environment, census, followed).plan()


def _plain_store() -> None:
    store = pyro.get_param_store()
    for name, t in list(store._params.items()):
        if isinstance(t, ProvenanceTensor):  # TraceGraph_ELBO leaves its baselines' averages so
            del store._param_to_name[t]
            store._params[name] = plain = detach_provenance(t).detach().requires_grad_()
            store._param_to_name[plain] = name


def _census(run: _Run) -> tuple[list[Tensor], Environment, Census]:
    """The tensors that the loss reads besides its arguments, and the environment after a run."""
    call = run.call
    environment = Environment(call.roots)
    census = _Counted(environment)
    values = [t for t in environment.kept if isinstance(t, Tensor) and not t.requires_grad]
    tensors = [t.clone() for t in call.tensors]
    versions = [t._version for t in tensors]
    try:
        with restored(list({id(t): t for t in values}.values())), census:
            run(Interception(census), tensors, call.floats)
            drawn = census.drawn()
        if [t._version for t in tensors] != versions:
            raise Untraceable("the model changes its arguments in place; let it work on a copy")
        if drawn is not None:
            raise Untraceable(f"the model draws from {drawn}; draw with torch instead")
        _check_unchanged(environment, census)
    except Exception:
        environment.restore()
        census.rewind()
        raise
    environment = Environment(call.roots)
    own = {id(t) for t in tensors}
    free = Plan.order([t for i, t in census.free.items() if i not in own], environment)
    return free, environment, census


def _check_unchanged(environment: Environment, census: Census) -> None:
    """Refuse a run that has changed Python values, left tensors behind, or reads gradients."""
    stored = environment.stored()
    if stored is not None:
        raise Untraceable(
            f"running the model leaves another tensor in {stored!r}, which a compiled call would not do;"
            " write into the one that is there"
        )
    changed = environment.forgive()
    if changed is not None:
        raise Untraceable(
            f"running the model changes the Python value {changed!r}, which a compiled call would not do;"
            " keep it in a tensor"
        )
    leaves = [*environment.kept, *pyro.get_param_store()._params.values()]
    gradients = {id(t.grad) for t in leaves if isinstance(t, Tensor) and t.is_leaf and t.grad is not None}
    if not gradients.isdisjoint(census.free):
        raise Untraceable("the model reads the .grad of a parameter")
    for tensor, container, key in environment.spots:
        if id(tensor) in census.free and at(container, key) is not tensor:
            name = environment.tensor_names[id(tensor)]
            raise Untraceable(
                f"running the model replaces the tensor {name!r} that it reads; change it in place"
            )


class _Counted(Census):
    def __init__(self, environment: Environment) -> None:
        super().__init__()
        self._environment = environment
        self._before = source_states(environment)

    def drawn(self) -> str | None:
        """The generator outside torch's seed that has moved, or None."""
        after = source_states(self._environment)
        return next((name for (name, a), (_, b) in zip(self._before, after, strict=True) if a != b), None)

    def rewind(self) -> None:
        """Put back the states of the model's own generators."""
        rewind_sources(self._environment, self._before)


class _Tracer:
    """The second run of a loss, under ``make_fx``."""

    def __init__(
        self,
        run: _Run,
        free: list[Tensor],
        lifted: Sequence[Place | int],
        environment: Environment,
        census: Census,
        followed: Sequence[str],
    ):
        self._census, self._followed = census, (*followed, *census.unguarded)
        self._run, self._free, self._lifted, self._environment = run, free, list(lifted), environment
        self._floats = run.call.floats
        self._values = [self._floats[p] if isinstance(p, int) else p.get() for p in self._lifted]
        self._leaves: list[Tensor] = []
        self._reads: list[Read] = []
        self._numbers = Numbers([], [])

    def _whole(self, tensors: list[Tensor], lifted: list[Tensor], state: list[Tensor]) -> list[Tensor]:
        store = pyro.get_param_store()
        entries = dict(store._params)
        self._numbers = Numbers(self._values, lifted)
        pairs = list(zip(self._lifted, self._numbers.inputs, strict=True))
        floats: list[Any] = list(self._floats)
        for p, number in pairs:
            if isinstance(p, int):
                floats[p] = number
        placed = [(p, number) for p, number in pairs if isinstance(p, Place)]
        seen = Interception(None, self._census.ranges, self._followed, self._numbers)
        with shadowed(list(self._census.readers.values()) if self._followed else []):
            value, replaced = self._run(seen, tensors, floats, placed)
        self._leaves, self._reads = list(seen.gradients), self._constant(seen.reads)
        value = detach_provenance(value).detach()
        if self._run.call.kind == "differentiable" and self._leaves:
            value = value.to(self._leaves[0].dtype)
        outputs = [value, *_own_memory(seen.gradients, (*tensors, *state))]
        with torch.no_grad():
            for name, old in replaced.items():
                old.copy_(detach_provenance(store._params[name]))
        store._params.clear()
        store._params.update(entries)
        return outputs + [read.tensor for read in self._reads]

    def _constant(self, reads: list[Read]) -> list[Read]:
        """The reads whose value left the graph, or was compared."""
        numbers = self._numbers
        lines = {r.number: r.where for r in reads if r.number is not None}
        found = [r for r in reads if r.number is None or r.number in numbers.read]
        for t, indices in numbers.asked:
            found += [Read(t, lines[i], compared=True) for i in sorted(indices) if i in lines]
        for read in found:
            if read.where in self._census.unguarded:
                raise Untraceable(unread(self._census.unguarded[read.where], read.where))
        return found

    def plan(self) -> Plan:
        from torch.fx.experimental.proxy_tensor import make_fx

        store, call = pyro.get_param_store(), self._run.call
        device = next((t.device for t in (*call.tensors, *self._free)), torch.device("cpu"))
        lifted = [torch.tensor(v, dtype=torch.float64, device=device) for v in self._values]
        owned = {id(p) for p in store._params.values()}
        buffers = [t for t in self._free if not t.requires_grad or id(t) in owned]

        def whole(tensors: list[Tensor], lifted: list[Tensor], state: list[Tensor]) -> list[Tensor]:
            return self._whole(tensors, lifted, state)

        with restored(buffers):
            graph = make_fx(whole)(call.tensors, lifted, self._free)
        graph.graph.set_codegen(fx.graph.CodeGen())
        _tidy(graph)
        _hoist(graph)
        guards, kept = _split_reads(graph, len(self._reads))
        first = len(call.tensors) + len(lifted)
        used = _prune([graph, guards] if kept else [graph], first, len(self._free))
        state = [self._free[i] for i in used]
        where = {id(t): i for i, t in enumerate(state)}
        if any(id(leaf) not in where for leaf in self._leaves):
            raise Untraceable("the model makes a parameter anew at every call")
        if self._environment.changed() is not None:
            self._environment.forgive()
        for p in self._lifted:
            if isinstance(p, Place):
                self._environment.release(p.container, p.key)
        leaves = [where[id(x)] for x in self._leaves]
        plan = Plan(
            graph, first, state, leaves, list(self._run.sites), self._environment, self._floats, self._lifted
        )
        plan.guards.numbers = self._number_guards()
        plan.read = {i for i in self._numbers.read if i < len(self._lifted)}
        if kept:
            plan.guards.tensors = guards
            plan.guards.reads = [self._reads[i] for i in kept]
            with torch.no_grad():
                plan.guards.expected = [t.clone() for t in guards(*call.tensors, *lifted, *state)]
        return plan

    def _number_guards(self) -> list[tuple[Any, Any]]:
        guards = list(self._numbers.guards)
        for i in self._numbers.read & set(range(len(self._lifted))):
            guards.append((operator.itemgetter(i), self._values[i]))
        return guards


def _own_memory(gradients: dict[Tensor, Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, copied where they share an input's memory or lack their parameter's memory order."""
    taken = {t.untyped_storage()._cdata for t in inputs}
    outputs = []
    for leaf, g in gradients.items():
        g = detach_provenance(g).detach()
        if g.stride() != leaf.stride() or g.untyped_storage()._cdata in taken:
            if leaf.is_contiguous():
                g = g.clone(memory_format=torch.contiguous_format)
            else:
                g = torch.empty_like(leaf).copy_(g)
        taken.add(g.untyped_storage()._cdata)
        outputs.append(g)
    return outputs


@contextmanager
def _reasons(last: LastSite) -> Iterator[None]:
    """Turn any error of a run into ``Untraceable`` with the site and line that it comes from."""
    try:
        yield
    except Untraceable as error:
        text = str(error).partition("\n")[0]  # Pyro appends the shapes of the trace
        raise Untraceable(text if last.name is None else f"{text} (last site {last.name!r})") from error
    except Exception as error:
        message = str(error).strip().splitlines()
        text = message[0] if message else type(error).__name__
        if "tracing tensor" in text or "data-dependent" in text or "_local_scalar_dense" in text:
            text = "Python code or a sampler asks for the value of a tensor"
        site = re.search(r"site '([^']+)'", str(error))
        name = site.group(1) if site else last.name
        raise Untraceable(f"{text} (last site {name!r}{_line(error)})") from error


def _line(error: BaseException) -> str:
    """The line of user code that led to ``error``, or of the library's where the trace began there."""
    frames = traceback.extract_tb(error.__traceback__)
    user = [f for f in frames if not internal(f.filename)]
    ours = sys.modules[__name__].__file__.rpartition("/")[0]  # type: ignore[union-attr]
    found = user or [f for f in frames if not f.filename.startswith(ours)]
    return f", {found[-1].filename.rpartition('/')[2]}:{found[-1].lineno}" if found else ""


def _tidy(graph: fx.GraphModule) -> None:
    """Constants of one element become literals, and a filled-in standard normal becomes ``randn``: the same
    numbers and the same draws, in forms that Inductor can fuse or call cheaply."""
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.target in FRESH and getattr(node.args[0], "op", "") == "get_attr":
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


_COSTLY = (torch.ops.aten.lgamma.default, torch.ops.aten.digamma.default)


def _hoist(graph: fx.GraphModule) -> None:
    """Costly functions of an expanded tensor are computed once for each of its own elements.

    Pyro expands a distribution's parameters to its batch: the 200 rates of a negative binomial to 100,000
    counts. ``as_strided`` puts the values into memory; otherwise Inductor computes them again for each use.
    """
    aten = torch.ops.aten
    for node in [node for node in graph.graph.nodes if node.target in _COSTLY]:
        inner = node.args[0]
        while inner.target is aten.expand.default:
            inner = inner.args[0]
        small, shape = inner.meta.get("val"), node.meta["val"].shape
        if not isinstance(small, Tensor) or 2 * small.numel() > shape.numel():
            continue
        like = node.target(torch.empty_strided(small.shape, small.stride(), dtype=small.dtype, device="meta"))
        with graph.graph.inserting_before(node):
            made = graph.graph.call_function(node.target, (inner,))
            held = graph.graph.call_function(
                aten.as_strided.default, (made, list(like.shape), like.stride(), 0)
            )
            whole = graph.graph.call_function(aten.expand.default, (held, list(shape)))
        whole.meta = dict(node.meta)
        node.replace_all_uses_with(whole)
        graph.graph.erase_node(node)


def _split_reads(graph: fx.GraphModule, reads: int) -> tuple[fx.GraphModule, list[int]]:
    """Take the last ``reads`` outputs out of ``graph`` into a graph of their own, which the guards run.

    Returns that graph, and which reads it computes: those that do not depend on inputs are constants.
    """
    if not reads:
        return graph, []
    output = graph.graph.output_node()
    outputs = list(output.args[0])  # type: ignore[arg-type]
    needed = [_needed(graph, node) for node in outputs[-reads:]]
    kept = [i for i, nodes in enumerate(needed) if any(n.op == "placeholder" for n in nodes)]
    names = {n.name for i in kept for n in needed[i]}
    wanted = [outputs[len(outputs) - reads + i].name for i in kept]
    output.args = (outputs[:-reads],)
    own = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    by_name = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder" or node.name in names:
            by_name[node.name] = copies[node] = own.node_copy(node, copies.__getitem__)
    own.output([by_name[name] for name in wanted])
    guards = fx.GraphModule(graph, own)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return guards, kept


def _needed(graph: fx.GraphModule, target: fx.Node) -> set[fx.Node]:
    """The nodes that ``target`` is computed from, with earlier writes in place to any of their tensors."""
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    needed: set[fx.Node] = set()
    todo = [target]
    while todo:
        while todo:
            node = todo.pop()
            if node not in needed:
                needed.add(node)
                todo += node.all_input_nodes
        roots = {_root(node) for node in needed}
        todo = [
            node
            for node in order
            if node not in needed and order[node] < order[target] and _writes(node) and _root(node) in roots
        ]
    return needed


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _root(node: fx.Node) -> fx.Node:
    """The node that made the memory of ``node``'s result."""
    while node.op == "call_function" and node.all_input_nodes:
        schema = getattr(node.target, "_schema", None)
        aliases = schema is None or any(r.alias_info is not None for r in schema.returns) or schema.is_mutable
        if not aliases:
            break
        node = node.all_input_nodes[0]
    return node


def _prune(graphs: Sequence[fx.GraphModule], first: int, num_state: int) -> list[int]:
    """Remove the state that no graph uses from the inputs of all; the indices of what is left."""
    holders = [[node for node in g.graph.nodes if node.op == "placeholder"] for g in graphs]
    assert all(len(h) == first + num_state for h in holders)
    used = [i for i in range(num_state) if any(h[first + i].users for h in holders)]
    for graph, nodes in zip(graphs, holders, strict=True):
        for i in set(range(num_state)) - set(used):
            graph.graph.erase_node(nodes[first + i])
        graph.recompile()
    return used
