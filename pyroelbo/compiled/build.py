"""Inductor's builds of captured graphs."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pyroelbo.compiled.eager import quiet

__all__ = ["build_failure", "draws", "inductor", "repairing_inductor"]


def inductor(graph: fx.GraphModule, inputs: Sequence[Tensor], options: dict[str, Any]) -> Callable[..., list]:
    """Compile a captured graph. Random numbers come from torch's own generators, in eager's order.

    Draws that nothing uses are outputs of the build, since Inductor would drop them and so shift all later
    draws.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    patches: dict[str, Any] = {"fallback_random": True}
    patches |= {name: False for name in ("size_asserts", "alignment_asserts") if hasattr(config, name)}
    patches |= options
    own = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node in own.graph.find_nodes(op="placeholder"):
        node.meta.pop("val", None)  # cpp_wrapper would take these fake tensors, of several modes, for inputs
    output = own.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    live = _live(own.graph)
    unused = [node for node in draws(own) if node not in live]
    output.args = ([*results, *unused],)
    own.recompile()
    with torch.no_grad(), quiet():
        built: Any = compile_fx(own, list(inputs), config_patches=patches)
    if not unused:
        return built
    return lambda *inputs: list(built(*inputs))[: len(results)]


def draws(graph: fx.GraphModule) -> list[fx.Node]:
    """The operations that draw random numbers."""
    return [node for node in graph.graph.nodes if _draws(node)]


def _draws(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded in tags


def _live(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the outputs and the writes in place are computed from."""
    live: set[fx.Node] = set()
    todo = [n for n in graph.nodes if n.op == "output" or (n.is_impure() and not _draws(n))]
    while todo:
        node = todo.pop()
        if node not in live:
            live.add(node)
            todo += node.all_input_nodes
    return live


def repairing_inductor(
    graph: fx.GraphModule, inputs: list[Tensor], options: dict[str, Any]
) -> Callable[..., list]:
    """Inductor's build, after removing libraries in its cache that cannot be loaded, each once.

    The compiler writes a library where later processes look for it, and they take any file there for a
    complete one: what a killed process left would keep all later ones from that graph.
    """
    torn: set[str] = set()
    while True:
        try:
            return inductor(graph, inputs, options)
        except Exception as error:
            path = _unloadable(error)
            if path is None or path in torn:
                raise
            torn.add(path)
            with suppress(FileNotFoundError):
                os.remove(path)


def _unloadable(error: BaseException) -> str | None:
    """The library in Inductor's cache that ``error`` says could not be loaded."""
    from torch._inductor.codecache import cache_dir

    inner: Any = error
    while inner is not None:
        path = inner.path if isinstance(inner, ImportError) else None
        if path and Path(path).resolve().is_relative_to(Path(cache_dir()).resolve()):
            return path
        inner = getattr(inner, "inner_exception", None) or inner.__cause__
    return None


def build_failure(error: BaseException) -> str:
    """Why Inductor failed, as a sentence for a warning."""
    inner: Any = error
    while inner is not None and type(inner).__name__ not in ("InvalidCxxCompiler", "CppCompileError"):
        inner = getattr(inner, "inner_exception", None) or inner.__cause__
    if type(inner).__name__ == "InvalidCxxCompiler":
        return (
            "no working C++ compiler was found, which Inductor needs on the CPU (install g++ or set CXX);"
            " the captured graph runs operation by operation instead"
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"Inductor failed ({lines[0]}); the captured graph runs operation by operation instead"
