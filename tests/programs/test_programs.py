"""Each program of the gallery is audited against its reference, and compiled against eager.

A row may lie on the wrong side of ln p(y) by four standard errors of its own and the reference's; over the
some 500 values of the gallery a true bound that is tight would do so with a probability of 2 % on new seeds.
"""

from dataclasses import replace

import pytest

from tests.programs import PROGRAMS
from tests.programs.base import audited, compiled

CHEAP = (
    "linear regression AutoNormal",
    "gmm with an empty guide",
    "kidney cancer counties",
    "hmm of second order",
    "eight schools reparametrized",
    "linear regression AutoDelta",
)


def rows(keep=lambda entry: True):
    return [
        pytest.param(entry, marks=() if name in CHEAP else pytest.mark.slow, id=name.replace(" ", "-"))
        for name, entry in PROGRAMS.items()
        if keep(entry)
    ]


@pytest.mark.parametrize("entry", rows(lambda entry: entry.refused is None))
def test_rows_are_ordered_against_the_reference(entry):
    assert not audited(entry).faults


@pytest.mark.parametrize("entry", rows(lambda entry: entry.refused is not None))
def test_refusals_say_why(entry):
    with pytest.raises(ValueError, match=entry.refused):
        audited(entry)


@pytest.mark.parametrize("entry", rows())
def test_compiled_losses_are_eager_ones(entry):
    found = compiled(entry)
    assert found.apart < 1e-5
    if entry.eager is None:
        assert found.calls > 0, found.reasons
    else:
        assert found.calls == 0
        assert any(entry.eager in reason for reason in found.reasons), found.reasons


def test_the_gallery_is_large():
    assert len(PROGRAMS) >= 60
    assert sum(entry.eager is None for entry in PROGRAMS.values()) >= 50


@pytest.mark.parametrize("shift", [-0.5, 1.0])
def test_wrong_references_are_found(shift):
    """A reference half a nat too low contradicts the rows, one that is too high leaves an unexplained gap."""
    entry = PROGRAMS["kidney cancer counties"]

    def shifted():
        case = entry.build()
        return replace(case, reference=lambda: case.reference()[0] + shift)

    assert audited(replace(entry, build=shifted)).faults
