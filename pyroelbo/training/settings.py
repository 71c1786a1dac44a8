"""Training settings, defined once: `fit`'s keywords, the stored configuration, the command line's options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyroelbo.numerics import duration, positive_count
from pyroelbo.objectives import OBJECTIVES, Objective
from pyroelbo.optim import OPTIMIZERS, UpdateRule
from pyroelbo.training.schedules import SCHEDULES, Schedule

__all__ = ["FitSettings"]


def _option(about: str, *flags: str, kind: Any = str, names: Any = ()) -> dict[str, Any]:
    """A setting in one line, further flags of the command line, what parses it there, and the names that it
    may take.
    """
    return {"about": about, "flags": flags, "kind": kind, "names": names}


@dataclass(frozen=True)
class FitSettings:
    """Settings of :func:`~pyroelbo.fit`: validated, and the same for a resumed run except for ``FREE``.

    Raises ValueError or TypeError, naming the setting, for invalid values.
    """

    objective: Any = field(
        default="elbo",
        metadata=_option(
            "what is trained, by name; in Python also an Objective or a pyro.infer.ELBO", names=OBJECTIVES
        ),
    )
    epochs: int = field(default=20, metadata=_option("passes over the data", "-n", "--num-epochs", kind=int))
    batch_size: int = field(default=128, metadata=_option("data per step", "-b", kind=int))
    learning_rate: float = field(default=1e-3, metadata=_option("step size", "-lr", kind=float))
    schedule: str | Schedule = field(
        default="constant",
        metadata=_option(
            "factor on the step size, by name; in Python also a function of the (fractional) epoch",
            names=SCHEDULES,
        ),
    )
    optimizer: str = field(
        default="adam", metadata=_option("update rule, as in torch.optim", names=OPTIMIZERS)
    )
    particles: int = field(default=1, metadata=_option("draws of the latents per datum and step", kind=int))
    kl_weight: float | Callable[[float], float] = field(
        default=1.0,
        metadata=_option(
            "weight of the KL term; in Python also a function of the (fractional) epoch", kind=float
        ),
    )
    clip_norm: float | None = field(
        default=None, metadata=_option("bound on the norm of the whole gradient", kind=float)
    )
    skip_norm: float | None = field(
        default=None,
        metadata=_option("leave out steps whose gradient is longer than this, and count them", kind=float),
    )
    ema: float | None = field(
        default=None,
        metadata=_option("decay of a moving average of the weights, which is validated and kept", kind=float),
    )
    patience: int | None = field(
        default=None,
        metadata=_option(
            "stop after this many epochs without a better validation bound; the best weights are kept",
            kind=int,
        ),
    )
    freeze: Sequence[str] = field(
        default=(), metadata=_option("parts to keep fixed: encoder, generator, ...", kind=list)
    )
    seed: int = field(
        default=0, metadata=_option("seed of initial parameters, data order and draws", kind=int)
    )
    checkpoint_seconds: float = field(
        default=10.0, metadata=_option("seconds between checkpoints, which resume starts from", kind=float)
    )
    budget: str | None = field(
        default=None,
        metadata=_option(
            "stop after this much time, such as 10min; with validation data the best weights are kept"
        ),
    )
    compile: bool = field(
        default=False,
        metadata=_option(
            "run loss, gradients and update as one graph (pays off after some thousand steps)", kind=bool
        ),
    )

    FREE = ("epochs", "checkpoint_seconds", "budget", "compile")
    """Settings that may change when a run is resumed."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "particles"):
            positive_count(name, getattr(self, name), "whole number")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected a whole number from 0 to 2**32 - 1, got {self.seed!r}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate!r}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience: expected a positive number of epochs, got {self.patience!r}")
        if not callable(self.kl_weight) and not self.kl_weight >= 0:
            raise ValueError(
                f"kl_weight: expected a number of at least 0 or a function of the epoch, got "
                f"{self.kl_weight!r}"
            )
        if not callable(self.schedule) and self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule: expected one of {tuple(SCHEDULES)} or a function of the epoch, got "
                f"{self.schedule!r}"
            )
        if self.budget is not None:
            duration(self.budget)
        if isinstance(self.freeze, str):
            raise TypeError(
                f"freeze: expected a sequence of part names, got the string {self.freeze!r}: write "
                f"({self.freeze!r},)"
            )
        self.rule  # noqa: B018  (checks the optimizer, the norms and the decay)

    @property
    def rule(self) -> UpdateRule:
        return UpdateRule(**self.rule_fields())

    def rule_fields(self) -> dict[str, Any]:
        """The settings that are fields of :class:`~pyroelbo.optim.UpdateRule`."""
        return {
            "optimizer": self.optimizer,
            "clip_norm": self.clip_norm,
            "skip_norm": self.skip_norm,
            "ema": self.ema,
        }

    @property
    def factor(self) -> Schedule:
        """Factor on the learning rate, as a function of the epoch."""
        return self.schedule if callable(self.schedule) else SCHEDULES[self.schedule](self.epochs)

    def serialize(self, objective: Objective) -> dict[str, Any]:
        """What ``config.json`` stores; functions and losses as what can be said of them."""
        stored = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("kl_weight", "schedule"):
            stored[name] = "a function" if callable(stored[name]) else stored[name]
        if not isinstance(self.objective, str):
            stored["objective"] = objective.describe()
        stored["freeze"] = list(self.freeze)
        # Other schedules depend on the last epoch, so such a run cannot be lengthened.
        named = not callable(self.schedule) and self.schedule != "constant"
        stored["schedule_epochs"] = self.epochs if named else None
        return stored
