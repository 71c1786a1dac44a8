"""Comparison of a captured or built graph with eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro.ops.provenance import detach_provenance
from torch import Tensor

from pyroelbo.compiled.eager import Call, Place, autocasting, quiet, restored, unhooked
from pyroelbo.compiled.plan import Plan

__all__ = ["Mismatch", "difference", "reference", "verify"]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
LOOSE = 5e-2
_SEEDS = (20, 21)
_SCALE = 1.01


class Mismatch(RuntimeError):
    """A graph does not reproduce the eager loss, gradients or buffers under the same seed."""


class Case(NamedTuple):
    """Inputs and a seed on which eager and graph are compared.

    ``required`` says that eager accepts them, ``scaled_state`` that all floating state is scaled meanwhile.
    """

    tensors: list[Tensor]
    numbers: list[float]
    seed: int
    required: bool
    scaled_state: bool = False


def reference(plan: Plan, call: Call, case: Case) -> list[Tensor | None]:
    """Eager loss, gradients and mutable state of a case; everything is put back."""
    state = plan.state() or []
    trained = [t for t in state if t.requires_grad]
    leaves = [state[i] for i in plan.leaves]
    saved = [t.grad for t in trained]
    others = plan.mutable()
    names = pyro.get_param_store()._param_to_name
    stored = [names.get(t) for t in others]
    floats, placed = list(call.floats), []
    for where, number in zip(plan.lifted, case.numbers, strict=True):
        if isinstance(where, Place):
            placed.append((where, number))
        else:
            floats[where] = number
    try:
        for t in trained:
            t.grad = None
        with restored(others), quiet(), unhooked(state):
            torch.manual_seed(case.seed)
            value = call.evaluate(case.tensors, floats, placed)
            params = pyro.get_param_store()._params
            found = (params.get(n, t) for t, n in zip(others, stored, strict=True))
            after = [detach_provenance(t).detach().clone() for t in found]
        extra = [t for t in trained if t.grad is not None and not any(t is leaf for leaf in leaves)]
        if extra and call.kind != "loss":
            raise Mismatch("eager finds a gradient that the graph lacks")
        gradients = [None if t.grad is None else t.grad.clone() for t in leaves]
        return [_exact(value), *gradients, *after]
    finally:
        for t, g in zip(trained, saved, strict=True):
            t.grad = g


def _exact(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64)
    value = detach_provenance(value).detach()
    return value if value.device.type == "mps" else value.double()


def cases(plan: Plan, call: Call, thorough: bool) -> Iterator[Case]:
    """The batch under two seeds; with ``thorough`` also with its rows resampled, with each floating tensor or
    all floating state scaled by 1.01, and with other values for the lifted numbers."""
    numbers = plan.numbers(call.floats) or []
    for seed in _SEEDS:
        yield Case(call.tensors, numbers, seed, True)
    if not thorough:
        return
    resampled = _resampled(call.tensors)
    if resampled is not None:
        yield Case(resampled, numbers, _SEEDS[0], False)
    if any(t.is_floating_point() for t in call.tensors):
        scaled = [t * _SCALE if t.is_floating_point() else t for t in call.tensors]
        yield Case(scaled, numbers, _SEEDS[0], False)
    yield Case(call.tensors, numbers, _SEEDS[0], False, True)
    for i in range(len(numbers)):
        other = [v * _SCALE + (_SCALE - 1 if v == 0 else 0.0) if k == i else v for k, v in enumerate(numbers)]
        yield Case(call.tensors, other, _SEEDS[0], False)


def _resampled(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """Rows drawn with replacement, the same for all tensors of the most common first dimension."""
    sizes = [t.shape[0] for t in tensors if t.dim()]
    if not sizes:
        return None
    n = max(set(sizes), key=sizes.count)
    if n < 2:
        return None
    rows = torch.randint(n, (n,), generator=torch.Generator().manual_seed(_SEEDS[0]))
    return [t[rows.to(t.device)] if t.dim() and t.shape[0] == n else t for t in tensors]


def verify(plan: Plan, call: Call, runner: Callable[..., list], thorough: bool = False) -> None:
    """Compare ``runner`` with eager under equal seeds: loss, every gradient, every buffer.

    Variants of the batch that eager refuses, or that the graph's guards exclude, are skipped. Under autocast
    the two round to half precision in different places, and the tolerance of half precision holds for all
    numbers. Raises ``Mismatch`` with the first relative difference.
    """
    least = LOOSE if autocasting() else 0.0
    for case in cases(plan, call, thorough):
        state = plan.state() or []
        with restored(state if case.scaled_state else []):
            if case.scaled_state:
                _scale(state)
            found = _compared(plan, call, runner, case, least)
        if found:
            raise Mismatch(found)


def _scale(state: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for t in state:
            overlapping = any(n > 1 and not s for n, s in zip(t.shape, t.stride(), strict=True))
            if t.is_floating_point() and not overlapping:
                t.data.mul_(_SCALE)  # no new version, as in ``restored``


def _compared(plan: Plan, call: Call, runner: Callable[..., list], case: Case, least: float) -> str:
    state, others = plan.state() or [], plan.mutable()
    inputs = [*case.tensors, *plan.number_tensors(case.numbers), *state]
    if not case.required and plan.guards.failed(inputs, case.numbers) is not None:
        return ""
    try:
        expected = reference(plan, call, case)
    except Mismatch:
        raise
    except Exception:
        if case.required:
            raise
        return ""
    with restored(others), torch.no_grad():
        torch.manual_seed(case.seed)
        try:
            outputs = list(runner(*inputs))
        except Exception as error:  # of an LSTM's fused kernel, which leaves nothing for a backward pass
            line = str(error).partition("\n")[0]
            raise Mismatch(f"the graph fails where eager does not: {line}") from error
        outputs = [t.detach().clone() for t in (*outputs, *others)]
    return difference(expected, outputs, 1 + len(plan.leaves), least, plan.output_name, inputs)


def difference(
    expected: Sequence[Tensor | None],
    found: Sequence[Tensor | None],
    gradients: int,
    least: float = 0.0,
    name: Callable[[int], str] = "output {}".format,
    inputs: Sequence[Tensor] = (),
) -> str:
    """A sentence about the first output that differs in norm, or "" where all agree.

    The loss, which Pyro sums in float64, is as exact as the least exact gradient or input. Gradients (outputs
    1 to ``gradients`` − 1) are compared relative to their own norm and a hundredth of the whole gradient's.
    ``least`` bounds all tolerances from below.
    """
    whole = sum(float(g.detach().double().norm()) ** 2 for g in expected[1:gradients] if g is not None) ** 0.5
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a is None or b is None:
            if a is not b:
                return f"{name(i)} is missing on one side"
            continue
        tolerance = TOLERANCE.get(b.dtype, LOOSE)
        if i == 0:
            others = [
                t.dtype for t in (*found[1:gradients], *inputs) if t is not None and t.is_floating_point()
            ]
            tolerance = max(TOLERANCE.get(t, LOOSE) for t in others or [torch.get_default_dtype()])
        tolerance = max(tolerance, least)
        x, y = a.detach().double(), b.detach().double()
        if not torch.equal(x.isfinite(), y.isfinite()) or not torch.equal(x.isposinf(), y.isposinf()):
            return f"{name(i)} has other infinities or NaN"
        x, y = x.nan_to_num(0, 0, 0), y.nan_to_num(0, 0, 0)
        scale = float(x.norm()) + (0.01 * whole if 0 < i < gradients else 0.0)
        gap = float((x - y).norm())
        if gap > tolerance * scale + 1e-12:
            return f"{name(i)} differs by {gap / max(scale, 1e-300):.1e} of its size"
    return ""
