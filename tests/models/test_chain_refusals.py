"""Links, layers and guides that do not fit are named."""

import warnings

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyroelbo import Pair, fit, models
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.models.chain import Chain
from pyroelbo.models.links import TopDownLink
from pyroelbo.priors import StandardNormal
from tests.models.chains import ladder, links
from tests.pairs import binary


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Chain(
                StandardNormal(2), links((2, 3)), *links((3, 5)), links((5, 4), (4, 2)), event=(5,)
            ),
            "layer 1: the encoder link of z_1: expected an output of 3 numbers, as the",
        ),
        (
            lambda: Chain(
                StandardNormal(2), links((4, 3)), *links((3, 5)), links((5, 3), (3, 2)), event=(5,)
            ),
            "layer 1: the generator link of z_1: expected an input of 2 numbers, the size of z_2,",
        ),
        (
            lambda: Chain(
                StandardNormal(2), links((2, 3)), *links((4, 5)), links((5, 3), (3, 2)), event=(5,)
            ),
            "the observation: expected an input of 3 numbers, the size of z_1, got one of 4",
        ),
        (
            lambda: Chain(
                StandardNormal(2), links((2, 3)), *links((3, 5)), links((5, 3), (4, 2)), event=(5,)
            ),
            "layer 2: the encoder link of z_2: expected an input of 3 numbers, the size of z_1,",
        ),
        (
            lambda: Chain(
                StandardNormal(2), links((2, 3)), *links((3, 5)), links((7, 3), (3, 2)), event=(5,)
            ),
            "layer 1: the encoder link of z_1: expected an input of 5 numbers, the size of y, got",
        ),
        (
            lambda: Chain(
                StandardNormal(2),
                links((2, 3)),
                *links((3, 5)),
                links((5, 3), (3, 2)),
                event=(5,),
                order="top-down",
            ),
            r"layer 1: expected an encoder link of z_1 that is called with \(state, seen, p\), as",
        ),
        (
            lambda: Chain(
                StandardNormal(2),
                links((2, 3)),
                *links((3, 5)),
                [TopDownLink(2, 5, 3), TopDownLink(0, 5, 2)],
                event=(5,),
            ),
            "layer 1: expected an encoder link of z_1 that is called with the layer below, as",
        ),
        (
            lambda: Chain(StandardNormal(2), [], *links((2, 5)), links((5, 3), (3, 2)), event=(5,)),
            r"encoder: expected 1 links, one per latent \(a prior and 0 generator links\), got 2",
        ),
        (
            lambda: models.Hierarchy(6, order="sideways"),
            r"order: expected one of \('bottom-up', 'top-down'\), got 'sideways'",
        ),
        (
            lambda: models.Hierarchy(6, (3, 0)),
            "latent: expected a positive width for each layer, got 0 for layer 2",
        ),
        (lambda: models.Hierarchy(6, ()), "latent: expected at least one layer, got none"),
        (lambda: models.Hierarchy(6, 3), r"latent: expected a width for each layer, such as \(3,\), got 3"),
        (
            lambda: models.Hierarchy(6, (3, 1), prior="flow"),
            "prior 'flow' of 'z_2': dims: expected at least 2 for a coupling, which splits them,",
        ),
        (
            lambda: models.Ladder(6, (3,), (8,), prior="vamp", components="x"),
            "prior 'vamp' of 'z_1': components: expected a positive number of pseudo-inputs, got 'x'",
        ),
        (
            lambda: models.Ladder(6, (8,), (8, "a")),
            "hidden: expected a positive width for each layer, got 'a' for layer 2",
        ),
        (
            lambda: models.Hierarchy(6, prior="vamp", components=3).initialize(binary(9, 5)),
            r"y: expected shape \[B, 6\] \(flattened images\) for this Hierarchy, got \(9, 5\)",
        ),
        (
            lambda: models.ConvLadder((12, 12), (1, 1, 1, 1)),
            "groups: expected at most 3 resolutions for images of 12x12, got 4; resolution 3",
        ),
        (
            lambda: models.ConvLadder((4, 4), (1, 0)),
            r"groups: expected a positive number for each resolution, got \(1, 0\)",
        ),
        (lambda: models.ConvLadder(16), r"shape: expected \(height, width\), got 16"),
        (lambda: models.ConvLadder((4, 4), latent=0), "latent: expected a positive number of maps, got 0"),
        (
            lambda: models.Ladder(6, (3, 2), (8,)),
            r"hidden: expected a width for each of the 2 layers of latent=\(3, 2\), got \(8,\)",
        ),
        (
            lambda: models.Ladder(6, (3,), (8,), merge="sum"),
            r"merge: expected one of \('network', 'precision'\), got 'sum'",
        ),
        (
            lambda: models.Ladder(6, (3,), (8,), norm="group"),
            r"norm: expected one of \('batch', 'layer', 'none'\), got 'group'",
        ),
        (
            lambda: models.Ladder(6, (3,), (8,), network="conv"),
            r"network: expected one of \('mlp', 'gated'\), got 'conv'",
        ),
    ],
)
def test_links_that_do_not_fit_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_layers_that_do_not_fit_are_named_when_they_run():
    class Bare(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.linear = nn.Linear(a, b)

        def forward(self, x, seen=None, p=None):
            return dist.Normal(self.linear(x if seen is None else seen), 1.0).to_event(1)

    y = torch.randn(4, 5)
    chain = Chain(StandardNormal(2), [Bare(2, 3)], Bare(3, 5), [Bare(5, 4), Bare(4, 2)], event=(5,))
    with pytest.raises(
        ValueError,
        match=r"encoder: expected z_1 of event shape \(3,\), as the generator's, got \(4, 4\) in layer 1",
    ):
        Evaluator(chain, y)
    chain = Chain(StandardNormal(2), [Bare(2, 3)], Bare(3, 5), [Bare(5, 3), Bare(4, 2)], event=(5,))
    with pytest.raises(ValueError, match=r"encoder link of z_2: got inputs of shape \[\(4, 3\)\]"):
        Evaluator(chain, y)
    chain = Chain(
        StandardNormal(2), [Bare(2, 3)], Bare(3, 5), [Bare(5, 4), Bare(5, 2)], event=(5,), order="top-down"
    )
    with pytest.raises(
        ValueError, match=r"encoder: expected z_1 of shape \(3,\), as the generator's, got \(4,\) in layer 1"
    ):
        Evaluator(chain, y)
    with pytest.raises(ValueError, match=r"y: expected shape \[B, 5\] for this Chain, got \(4, 6\)"):
        chain.model(torch.randn(4, 6))


def test_a_top_down_model_under_a_bottom_up_guide_is_told_apart():
    ladder_, hierarchy = models.Ladder(6, (3, 2), (8, 6)), models.Hierarchy(6, (3, 4, 2))
    with pytest.raises(
        ValueError,
        match=r"encoder: expected z_2 of event shape \(2,\), as the generator's, got \(4, 4\) in layer 2",
    ):
        Evaluator(Pair.of(ladder_.model, hierarchy.guide), binary(4, 6))
    same = Pair.of(ladder_.model, models.Hierarchy(6, (3, 2)).guide)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="not a term of this bound"):
        fit(same, binary(4, 6), objective="mean_field", epochs=1, progress=False)


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (
            "conv_ladder",
            "ladder",
            r"encoder: expected z_2 of event shape \(4,\), as the generator's, got \(4, 2\) in layer 2",
        ),
        (
            "ladder",
            "conv_ladder",
            r"encoder: expected z_2 of event shape \(2,\), as the generator's, got \(4, 4\) in layer 2",
        ),
        (
            "conv_ladder",
            "hierarchy",
            r"encoder: expected z_2 of event shape \(4,\), as the generator's, got \(4, 2\) in layer 2",
        ),
        (
            "hierarchy",
            "pixels",
            r"encoder: expected z_2 of event shape \(2,\), as the generator's, got \(4, 14\) in layer 2",
        ),
        ("pixels", "hierarchy", r"model site 'z_1\d' is missing in the guide, which draws"),
        ("hierarchy", "vae", "guide site 'z' is missing in the model"),
    ],
)
def test_a_guide_of_another_family_is_told_apart(model, guide, message):
    make = {
        "hierarchy": lambda: models.Hierarchy((4, 4), (3, 2), 8),
        "ladder": lambda: models.Ladder((4, 4), (3, 2), (8, 6)),
        "conv_ladder": lambda: models.ConvLadder((4, 4), (1, 1), 1, 4),
        "pixels": lambda: models.Autoregressive((4, 4), width=4, layers=1),
        "vae": lambda: models.VAE((4, 4), 2, (8,)),
    }
    with pytest.raises(ValueError, match=message):
        Evaluator(Pair.of(make[model]().model, make[guide]().guide), binary(4, 16)).sample_pass(1)


def test_a_model_is_its_own_under_the_guide_of_another_ladder():
    """Of the same sizes, whose guide hands on what it found on another generator's path."""
    one, other, y = ladder(norm="layer"), ladder(norm="layer"), binary(5, 6)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    terms = Evaluator(Pair.of(one.model, other.guide), y).sample_pass(3)
    torch.testing.assert_close(terms.log_joint, Evaluator(one, y).terms(terms.latents).log_joint)
    torch.testing.assert_close(terms.log_proposal, Evaluator(other, y).terms(terms.latents).log_proposal)
