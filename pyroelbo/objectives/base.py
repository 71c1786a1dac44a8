"""What `fit` asks of an objective, and the parts that objectives are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.util import torch_item
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyroelbo import batch as batches
from pyroelbo import evidence
from pyroelbo.batch import Batch
from pyroelbo.evaluation.masks import ModelMasks
from pyroelbo.evaluation.programs import Programs
from pyroelbo.objectives.order import mean_field_fault
from pyroelbo.pair import Pair
from pyroelbo.results import Bound

__all__ = [
    "Adapted_ELBO",
    "Objective",
    "OneExpression",
    "Pathwise",
    "PerDatum",
    "ScaleLatents",
    "Update",
    "Weighted_ELBO",
    "WrappedELBO",
    "adapt",
]


@dataclass(frozen=True)
class Update:
    """One parameter update of a training step.

    Args:
        loss: a Pyro ELBO with a ``differentiable_loss``; its gradient is taken for the parameters of
            ``parts`` only.
        parts: names of the pair's parts (:meth:`~pyroelbo.Pair.part`), or None for all trainable parameters.
        times: how often the update is made in one training step.
    """

    loss: ELBO
    parts: tuple[str, ...] | None = None
    times: int = 1


class Objective:
    """What :func:`~pyroelbo.fit` asks of an objective (abstract; a mixin for Pyro's ``ELBO``, or a class of
    its own that defines :meth:`updates`).

    A new objective overrides what differs from the defaults here and adds one row to
    :data:`~pyroelbo.objectives.OBJECTIVES`.
    """

    takes_particles = False
    """Whether the loss draws ``particles`` itself; otherwise ``fit`` repeats each batch."""

    weightable = True
    """Whether there is a KL term to weight."""

    scales_subsamples = True
    """Whether the loss is multiplied by the scale of a subsampled data plate."""

    scale: Tensor | None = None
    """The KL weight, a tensor [], so that compiled losses see it change; None where there is none."""

    @property
    def weight(self) -> float | None:
        """The KL weight in force; assign it between steps to anneal."""
        return None if self.scale is None else float(self.scale)

    @weight.setter
    def weight(self, value: float) -> None:
        if not value >= 0:
            raise ValueError(f"weight: expected a number of at least 0, got {value!r}")
        if self.scale is None:
            raise AttributeError(f"{type(self).__name__} has no KL weight: wrap it in Weighted_ELBO")
        self.scale.fill_(value)

    def weighted(self, weight: float) -> Objective:
        """This objective with KL weight ``weight``; ValueError where it has no KL term."""
        if not self.weightable:
            raise ValueError(f"kl_weight: expected 1.0, got {weight!r}: {self.describe()} has no KL to weigh")
        if self.scale is not None:
            self.weight = weight
            return self
        return Weighted_ELBO(self, weight)  # type: ignore[arg-type]

    def updates(self) -> Mapping[str, Update]:
        """The updates that make up one training step, by name, in order; their parts must not overlap."""
        return {"loss": Update(self)}  # type: ignore[arg-type]

    def check(self, pair: Pair, batch: Batch) -> None:
        """Refuse, before training, what this objective cannot train, by a ValueError or TypeError."""

    def validate(self, pair: Pair, y: Batch) -> Bound:
        """The bound on ln p(y) that belongs to this objective, in evaluation mode; its method names the
        metric.
        """
        return evidence.elbo(pair, y, particles=8)

    def describe(self) -> str:
        """Type and plain settings; a resumed run must have the same."""
        plain = {k: v for k, v in sorted(vars(self).items()) if isinstance(v, (bool, int, float, str))}
        plain.pop("max_plate_nesting", None)  # found by running the programs
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in plain.items())})"


def adapt(loss: Any) -> Objective:
    """``loss`` as an :class:`Objective`: itself, or a Pyro ELBO adapted.

    Raises TypeError for anything else, and for Pyro's losses without a ``differentiable_loss``.
    """
    if isinstance(loss, Objective):
        return loss
    if not isinstance(loss, ELBO):
        raise TypeError(
            f"objective: expected a name, an Objective or a pyro.infer.ELBO, got {type(loss).__name__}"
        )
    if not hasattr(loss, "differentiable_loss"):
        raise TypeError(
            f"objective: expected a loss with a differentiable_loss, got {type(loss).__name__}: train it "
            f"with "
            "pyro.infer.SVI"
        )
    return Adapted_ELBO(loss)


def refuse_failing(loss: Any, pair: Pair, batch: Batch, expected: str) -> None:
    """Run a loss once: whatever it raises becomes a ValueError that says what the loss expects of a pair."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return loss.differentiable_loss(pair.model, pair.guide, *args, **kwargs)

    nesting = loss.max_plate_nesting
    try:
        with torch.random.fork_rng(), torch.no_grad(), Programs(pair).quiet():
            batches.call(run, batch)
    except ValueError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"objective: expected {expected}, got {pair.name}, on which {loss.describe()} raises "
            f"{type(error).__name__}: {reason[0]}"
        ) from error
    finally:
        loss.max_plate_nesting = (
            nesting  # the first step finds it, with the same random draws as without a trial
        )


class WrappedELBO(ELBO):
    """An ELBO made from another one (abstract), with the same particles and plates."""

    def __init__(self, inner: ELBO) -> None:
        super().__init__(num_particles=inner.num_particles, vectorize_particles=inner.vectorize_particles)
        self.max_plate_nesting = inner.max_plate_nesting  # the constructor would add a particles' plate again
        self.inner = inner

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return self.inner._get_trace(model, guide, args, kwargs)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        return self.inner.loss(model, guide, *args, **kwargs)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        return self.inner.differentiable_loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        return self.inner.loss_and_grads(model, guide, *args, **kwargs)


class Adapted_ELBO(Objective, WrappedELBO):
    """One of Pyro's own losses, as an :class:`Objective`."""

    def check(self, pair: Pair, batch: Batch) -> None:
        if not isinstance(self.inner, TraceMeanField_ELBO):
            return

        def fault(*args: Any, **kwargs: Any) -> str | None:
            return mean_field_fault(pair.model, pair.guide, *args, **kwargs)

        with torch.random.fork_rng(), torch.no_grad(), pyro.validation_enabled(False):
            found = batches.call(fault, batch)
        if found is None:
            refuse_failing(self, pair, batch, "a guide site for every latent, with a density for each")
        if found is not None:
            raise ValueError(
                f"objective 'mean_field' (TraceMeanField_ELBO) is wrong for {pair.name}: {found}"
            )

    def describe(self) -> str:
        return Objective.describe(self.inner)  # type: ignore[arg-type]


def _inside(handler: Messenger, program: Any) -> Any:
    """``program`` run inside a handler."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with handler:
            return program(*args, **kwargs)

    run.pair = getattr(program, "pair", None)  # type: ignore[attr-defined]
    return run


class ScaleLatents(Messenger):
    """Multiplies ln p and ln q of every latent site by ``weight``, so that a loss is -E ln p(y|z) + weight ·
    KL.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and type(msg["fn"]).__name__ != "_Subsample":
            msg["scale"] = msg["scale"] * self.weight


class Weighted_ELBO(Objective, WrappedELBO):
    """E[-ln p(y | z)] + ``weight`` · KL: another ELBO with the latents' terms, in model and guide, scaled by
    ``weight``.

    The weight belongs to the objective, never to the model, so the model's evidence can still be evaluated.
    Set ``objective.weight`` between steps to anneal. With a weight below 1 the value is no lower bound on ln
    p(y), above 1 it is a looser one. Works with any of Pyro's ELBOs that multiplies latent sites by their
    scale.

    Source: Higgins et al. (2017); Bowman et al. (2016) for annealing.
    """

    def __init__(self, inner: ELBO, weight: float = 1.0) -> None:
        super().__init__(inner)
        self.scale = torch.tensor(1.0)
        self.weight = weight

    def _scaled(self, program: Any) -> Any:
        return _inside(ScaleLatents(self.scale), program)  # type: ignore[arg-type]

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return super()._get_trace(self._scaled(model), self._scaled(guide), args, kwargs)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        return super().loss(self._scaled(model), self._scaled(guide), *args, **kwargs)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        return super().differentiable_loss(self._scaled(model), self._scaled(guide), *args, **kwargs)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        return super().loss_and_grads(self._scaled(model), self._scaled(guide), *args, **kwargs)

    def check(self, pair: Pair, batch: Batch) -> None:
        adapt(self.inner).check(pair, batch)

    def validate(self, pair: Pair, y: Batch) -> Bound:
        return adapt(self.inner).validate(pair, y)

    def describe(self) -> str:
        return f"Weighted_ELBO({adapt(self.inner).describe()})"


class PerDatum(WrappedELBO):
    """Another ELBO divided by ``count(rows)``, its nats per datum, plus the mean of ``auxiliary(*batch)`` [B]
    if given; summed over the ``parts(*batch)`` of a batch (:meth:`~pyroelbo.Pair.unpadded`) if given.

    Latents that the model masks are masked in the guide too (:class:`~pyroelbo.evaluation.masks.ModelMasks`).
    """

    def __init__(
        self,
        inner: ELBO,
        count: Callable[[int], float],
        auxiliary: Callable[..., Tensor] | None = None,
        parts: Callable[..., Sequence[Batch]] | None = None,
    ) -> None:
        super().__init__(inner)
        self.count, self.auxiliary, self.parts = count, auxiliary, parts

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        rows = batches.size((*args, *kwargs.values()))
        model, guide = (_inside(ModelMasks(), program) for program in (model, guide))
        one = super().differentiable_loss
        if self.parts is None:
            loss = one(model, guide, *args, **kwargs)
        else:
            run = partial(one, model, guide)
            loss = sum(batches.call(run, part) for part in self.parts(*args, **kwargs))
        loss = loss / self.count(rows)
        return loss if self.auxiliary is None else loss + self.auxiliary(*args, **kwargs).mean()


class OneExpression:
    """Value and gradients of a loss that is all in its ``differentiable_loss`` (a mixin, before ``ELBO``)."""

    differentiable_loss: Callable[..., Tensor]

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The objective's value, a float."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The objective's value, after its gradient has been added to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return torch_item(loss)


class Pathwise(Objective, Trace_ELBO):
    """Its loss is one expression of reparametrized draws, ``_differentiable_loss_particle`` (abstract)."""

    scale: Tensor

    def __init__(self, weight: float, **options: Any) -> None:
        super().__init__(**options)
        self.scale = torch.tensor(1.0)
        self.weight = weight

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The objective's value, a float."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def _check_pathwise(self, name: str, drawn: Any) -> None:
        if not drawn["fn"].has_rsample:
            raise ValueError(
                f"guide site {name!r}: expected a reparametrized distribution, got "
                f"{type(drawn['fn']).__name__}: "
                f"{type(self).__name__} takes pathwise gradients; Trace_ELBO does not need them"
            )
