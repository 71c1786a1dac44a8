"""Checks of traced sites: what is refused because no bound would follow, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Multinomial, biject_to, constraints

from pyroelbo import batch as batches
from pyroelbo.batch import Batch
from pyroelbo.evaluation.supports import is_circular, spread, support_of, within_circle
from pyroelbo.pair import PLATE

__all__ = [
    "Unavailable",
    "check_joint",
    "check_observation",
    "check_scale",
    "check_sites",
    "check_support",
    "observed_part",
    "sample_sites",
    "sites_beyond",
    "summed_sites",
    "unenumerable",
]

POINT = (
    "guide site {!r}: expected a distribution with a density, got a point mass on a continuous latent. ln "
    "p(y, z) at a point is no bound on ln p(y); for latents outside the data plate, audit(..., "
    "given='globals') has rows of ln p(y | z) at the point"
)


class Unavailable(ValueError):
    """The pair has no such value; the message says why (``reason``), and what to do instead if there is
    something."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason}{remedy and ': '}{remedy}")
        self.reason = reason


def refuse_infinite(elbo: Tensor) -> None:
    """:class:`Unavailable` if an ELBO or a log weight is infinite and cannot be split."""
    if bool(elbo.isinf().any()):
        raise Unavailable(
            "the guide draws values of probability zero under the model: the ELBO is -inf and cannot be split"
        )


def sample_sites(trace: Any) -> Iterator[tuple[str, Any]]:
    """The sample sites of a trace by name, without those of ``pyro.deterministic`` (log probability 0)."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site["infer"].get("_deterministic"):
            yield name, site


def is_one(scale: Any) -> bool:
    return not isinstance(scale, Tensor) and scale == 1.0


def data_frame(site: Any, program: str) -> Any:
    for frame in site["cond_indep_stack"]:
        if frame.name == PLATE and frame.dim is not None:
            return frame
    kind = "observes" if site["is_observed"] else "draws a latent"
    plates = [f.name for f in site["cond_indep_stack"] if f.dim is not None]
    named = site.get("outside_plate", PLATE)
    remedy = f"Write `with pyro.plate({named!r}, len(y)):` around the sites of one datum"
    if plates and named == PLATE:
        remedy = (
            f"If its plate {plates[0]!r} runs over the data, only the name is in the way: pass Pair.of(..., "
            f"plate={plates[0]!r}), or call the plate {PLATE!r}"
        )
    raise ValueError(
        f"{program} site {site['name']!r} {kind} outside the plate {named!r}"
        f"{f' (in {plates})' if plates else ''}, so there is no bound per datum: only a joint one over the "
        f'whole batch, scope="joint". {remedy}'
    )


def observed_part(site: Any, batch: Batch) -> str | None:
    """The name of the part of the batch whose memory an observed site shares; None if it observes something
    else."""
    found = (k for k, part in batches.parts(batch).items() if batches.same_memory(site["value"], part))
    return next(found, None)


def check_observation(site: Any, batch: Batch, scope: str = "datum", support: bool = True) -> None:
    """Refuse an observation of the wrong shape or, with ``support``, outside its distribution's, naming the
    site."""
    fn, value, name = site["fn"], site["value"], site["name"]
    event = tuple(fn.event_shape)
    alone = scope == "datum" and event and value.dim() <= len(event)
    if alone and observed_part(site, batch) is not None:
        raise ValueError(
            f"observed site {name!r}: expected a batch of events of shape {event}, got data of shape "
            f"{tuple(value.shape)}. Pass y[None] for a single datum"
        )
    if event and tuple(value.shape[value.dim() - len(event) :]) != event:
        raise ValueError(
            f"observed site {name!r}: expected events of shape {event}, got data of shape "
            f"{tuple(value.shape)}"
        )
    declared = observed_support(fn)
    if support and declared is not None and isinstance(value, Tensor):
        check_support(name, type(base_of(fn)).__name__, declared, spread(fn, value))


def observed_support(fn: Any) -> Any:
    """The support of an observation: counts of any total for a multinomial, whose log probability takes the
    total from the data."""
    if isinstance(base_of(fn), Multinomial):
        return constraints.independent(constraints.nonnegative_integer, 1)
    return getattr(fn, "support", None)


def check_support(name: str, kind: str, support: Any, value: Tensor) -> None:
    """ValueError, naming the site, for a value outside the support."""
    if bool(support.check(value).all()):
        return
    base = support.base_constraint if isinstance(support, constraints.independent) else support
    wrong = value.masked_select(~base.check(value))
    bad = float(wrong[0]) if len(wrong) else float("nan")
    advice = ""
    if base is constraints.boolean and bool(((value >= 0) & (value <= 1)).all()):
        advice = (
            ". Grey pixels have no Bernoulli probability: binarize them, (y > 0.5).float() or "
            "pyroelbo.data.binarize(y), or choose a likelihood for grey values"
        )
    raise ValueError(f"observed site {name!r} ({kind}): expected values in {base}, got {bad:.6g}{advice}")


def inner_plates(site: Any) -> float:
    """Scale of subsampled plates within a datum (of time steps, of tokens): full size over size."""
    scale = 1.0
    for frame in site["cond_indep_stack"]:
        if frame.name != PLATE and frame.full_size is not None and frame.full_size != frame.size:
            scale *= frame.full_size / frame.size
    return scale


def check_scale(site: Any, program: str) -> bool:
    """Whether the site carries a scale within its datum; ValueError for any scale but that and the data
    plate's."""
    frame = data_frame(site, program)
    within = site.get("within_datum", 1.0) * inner_plates(site)
    outer = 1.0 if frame.full_size is None else frame.full_size / frame.size
    scale, expected = torch.as_tensor(site["scale"]), torch.as_tensor(within * outer)
    if not torch.allclose(scale.double(), expected.double(), rtol=1e-5):
        raise ValueError(
            f"{program} site {site['name']!r} is scaled by {float(scale.double().mean()):.4g} (poutine.scale "
            "or an outer plate): no bound follows. Put KL annealing into the objective (fit(..., "
            "kl_weight=...)), and mark a scale that belongs to one datum's estimate with "
            "pyroelbo.within_datum"
        )
    return "within_datum" in site or not is_one(within)


def check_joint(site: Any, program: str) -> None:
    """Refuse a site of a joint evaluation that is subsampled or scaled."""
    name = site["name"]
    for frame in site["cond_indep_stack"]:
        if frame.full_size is not None and frame.full_size != frame.size:
            raise ValueError(
                f"{program} site {name!r}: expected all {frame.full_size} elements of the plate "
                f"{frame.name!r} for a joint bound, got {frame.size}: the batch must be the whole data set"
            )
    scale = torch.as_tensor(site["scale"]).double()
    if "within_datum" in site or bool((scale != 1).any()):
        raise ValueError(
            f"{program} site {name!r} is scaled by {float(scale.mean()):.4g}: no bound follows. Put KL "
            "annealing into the objective (fit(..., kl_weight=...))"
        )


def summed_sites(guide: Any, model: Any) -> frozenset[str]:
    """Latent sites of the model that are summed out: those that the guide leaves out and that are marked
    ``infer={"enumerate": "parallel"}``, as by ``config_enumerate``."""
    return frozenset(
        name
        for name, site in sample_sites(model)
        if name not in guide.nodes
        and not site["is_observed"]
        and site["infer"].get("enumerate") == "parallel"
        and getattr(site["fn"], "has_enumerate_support", False)
    )


def unenumerable(error: Exception) -> ValueError:
    """What a model that cannot be run with enumerated latents is refused with."""
    reason = str(error).strip().splitlines() or [""]
    return ValueError(
        "model: expected a program that takes all values of its enumerated latents at once, got "
        f"{type(error).__name__}: {reason[0]}. Write branches with torch.where, and indices with "
        "pyro.ops.indexing.Vindex"
    )


def check_sites(guide: Any, model: Any, with_guide: bool, summed: frozenset[str] = frozenset()) -> None:
    latent = {k for k, s in sample_sites(model) if not s["is_observed"]}
    drawn = {k: s for k, s in sample_sites(guide) if not s["is_observed"]}
    if not any(s["is_observed"] for _, s in sample_sites(model)):
        raise ValueError("the model observes nothing: its last sites must be pyro.sample(..., obs=y)")
    if not with_guide:
        return
    extra = sorted(k for k, s in drawn.items() if k not in latent and not s["infer"].get("is_auxiliary"))
    if extra:
        where = "observed in" if extra[0] in {k for k, _ in sample_sites(model)} else "missing in"
        raise ValueError(
            f"guide site {extra[0]!r} is {where} the model, whose latent sites are {sorted(latent)}"
        )
    latent -= summed
    missing = sorted(latent - set(drawn))
    if missing:
        # A guide that draws nothing leaves its latents to be summed out; one that forgets some is a mistake.
        refusal: type[ValueError] = ValueError if drawn else Unavailable
        finite = getattr(model.nodes[missing[0]]["fn"], "has_enumerate_support", False)
        advice = '. To sum it out, mark it infer={"enumerate": "parallel"} in the model' if finite else ""
        raise refusal(
            f"model site {missing[0]!r} is missing in the guide, which draws {sorted(drawn)}{advice}"
        )
    for name in sorted(latent):
        _check_circular(name, drawn[name]["fn"], model.nodes[name]["fn"])
    auxiliary = sorted(set(drawn) - latent)
    if auxiliary:
        # A change of variables, as automatic guides make, has as many numbers on one side as on the other.
        made = [
            k for k in latent if is_point(drawn[k]["fn"]) and not model.nodes[k]["fn"].support.is_discrete
        ]
        inner = sum(biject_to(support_of(model.nodes[k]["fn"])).inv(drawn[k]["value"]).numel() for k in made)
        if sum(drawn[k]["value"].numel() for k in auxiliary) > inner:
            raise Unavailable(
                f"guide site {auxiliary[0]!r} is auxiliary and the latents are no function of it: their "
                "density under the guide is an integral over it, and no bound follows without a model of it"
            )
    watched = sorted(k for k, s in sample_sites(guide) if s["is_observed"])
    if watched and not auxiliary:
        # Beside auxiliary sites a factor may be the Jacobian of what was made of them.
        raise ValueError(
            f"guide site {watched[0]!r} is observed (a factor?): it would enter q(z | y), which is no "
            "density then, and no bound follows"
        )
    for name in sorted(latent):
        shapes = [tuple(s["fn"].event_shape) for s in (drawn[name], model.nodes[name])]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"guide site {name!r} draws events of shape {shapes[0]}, the model's are of shape {shapes[1]}"
            )
        kind, own = type(base_of(drawn[name]["fn"])).__name__, type(base_of(model.nodes[name]["fn"])).__name__
        point = kind == "Delta" != own and not any(s["infer"].get("is_auxiliary") for s in drawn.values())
        if point and not model.nodes[name]["fn"].support.is_discrete:
            raise ValueError(POINT.format(name))
        if (
            ("Relaxed" in kind or "StraightThrough" in kind) and "Relaxed" not in own
        ) or "StraightThrough" in kind:
            raise ValueError(
                f"guide site {name!r} is a {kind}, the model's a {own}: a relaxed draw's density "
                "is not the discrete latent's "
                "probability, and no bound follows from it. Evaluate with the hard counterpart of the guide"
            )
        supports = [_support(s["fn"]) for s in (drawn[name], model.nodes[name])]
        if (
            not is_point(drawn[name]["fn"])
            and all(supports)
            and supports[0].is_discrete != supports[1].is_discrete
        ):
            what = [
                f"a {'discrete' if s.is_discrete else 'continuous'} {k}"
                for s, k in zip(supports, (kind, own), strict=True)
            ]
            raise ValueError(
                f"guide site {name!r} is {what[0]}, the model's {what[1]}: a probability over a density is "
                "no weight, and no bound follows from it"
            )


def _check_circular(name: str, mine: Any, theirs: Any) -> None:
    """Refuse a guide that draws an angle of the model on the line."""
    support = _support(theirs)
    if support is None or not is_circular(support):
        return
    if is_point(mine) or not within_circle(_support(mine)):
        kind, own = (type(base_of(fn)).__name__ for fn in (mine, theirs))
        raise ValueError(
            f"guide site {name!r}: expected a circular distribution, as the model's {own}, got a {kind}. Use "
            "VonMises: a density on the line counts every angle many times"
        )


def sites_beyond(guide: Any, model: Any) -> frozenset[tuple[str, str]]:
    """(program, site) of the latents that may be asked for the density of values outside their support, as
    guide and model do not have the same (point masses of automatic guides are there by construction)."""
    found = set()
    for name, site in sample_sites(guide):
        if name in model.nodes and not site["is_observed"] and not is_point(site["fn"]):
            supports = {p: _support(s["fn"]) for p, s in (("guide", site), ("model", model.nodes[name]))}
            if None in supports.values() or not _same(*supports.values()):
                found |= {(p, name) for p, v in supports.items() if v not in (None, constraints.real)}
    return frozenset(found)


def is_point(fn: Any) -> bool:
    return type(base_of(fn)).__name__ == "Delta" or getattr(base_of(fn), "point_mass", False)


def _support(fn: Any) -> Any:
    try:
        support = support_of(fn)
    except NotImplementedError:
        return None
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _same(mine: Any, theirs: Any) -> bool:
    """Whether two supports are of one type, with bounds that are one number each."""
    if type(mine) is not type(theirs) or vars(mine).keys() != vars(theirs).keys():
        return False
    for name, bound in vars(mine).items():
        both = (bound, vars(theirs)[name])
        if all(isinstance(x, (int, float, Tensor)) for x in both):
            values = torch.cat([torch.as_tensor(x).reshape(-1).double() for x in both])
            if bool((values != values[0]).any()):
                return False
        elif both[0] is not both[1]:
            return False
    return True


def base_of(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn
