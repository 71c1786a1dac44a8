"""Chains that break scaled recursions, clamps, and finite stand-ins for -inf.

Each function returns the log potentials of one sequence, ``initial [S]``, ``transition [S,S]`` (from, to) and
``observation [T,S]``, in float64; what is right follows from ``oracles.forward_backward``.
"""

import math

import torch

INF = math.inf


def _ordinary(steps, states, seed=3):
    generator = torch.Generator().manual_seed(seed)
    initial = torch.randn(states, generator=generator, dtype=torch.float64).log_softmax(-1)
    transition = torch.randn(states, states, generator=generator, dtype=torch.float64).log_softmax(-1)
    observation = torch.randn(steps, states, generator=generator, dtype=torch.float64)
    return initial, transition, observation


def impossible_symbol():
    """No state can emit the symbol of step 3."""
    initial, transition, observation = _ordinary(8, 4)
    observation[3] = -INF
    return initial, transition, observation


def impossible_start():
    initial, transition, observation = _ordinary(8, 4)
    initial[1:] = -INF
    observation[0, 0] = -INF
    return initial, transition, observation


def left_to_right():
    """A chain that starts in its first state, moves right or stays, and must end in its last."""
    initial, transition, observation = _ordinary(40, 8)
    initial[1:] = -INF
    stay = torch.eye(8, dtype=torch.bool) | torch.diag(torch.ones(7, dtype=torch.bool), 1)
    transition = torch.where(stay, math.log(0.5), -INF)
    observation[-1, :-1] = -INF
    return initial, transition, observation


def banded_with_zero_emissions():
    """Steps to neighbours only, and symbols that half of the states cannot emit."""
    initial, transition, observation = _ordinary(30, 6)
    index = torch.arange(6)
    transition[(index[:, None] - index).abs() > 1] = -INF
    observation[::2, ::2] = -INF
    return initial, transition, observation


def _needed(log_weight, steps=6):
    """Two states; the second, of the only accepted ending, is reached by one rare step."""
    transition = torch.tensor([[0.0, log_weight], [-INF, 0.0]], dtype=torch.float64)
    observation = torch.full((steps, 2), -0.5, dtype=torch.float64)
    observation[-1, 0] = -INF
    return torch.tensor([0.0, -INF], dtype=torch.float64), transition, observation


def needed_step_of_minus_18():
    return _needed(-18.0)


def needed_step_of_minus_120():
    return _needed(-120.0)


def needed_step_of_minus_800():
    return _needed(-800.0)


def _overtaking(nats, steps=40):
    """Two paths that never meet; one is ``nats`` behind at half time and wins by as much in the end."""
    transition = torch.tensor([[0.0, -INF], [-INF, 0.0]], dtype=torch.float64)
    observation = torch.zeros(steps, 2, dtype=torch.float64)
    observation[: steps // 2, 1] = -2 * nats / steps
    observation[steps // 2 :, 0] = -4 * nats / steps
    return torch.full((2,), math.log(0.5), dtype=torch.float64), transition, observation


def overtaking_by_200():
    return _overtaking(200.0)


def overtaking_by_2000():
    return _overtaking(2000.0)


def twenty_thousand_steps():
    return _ordinary(20_000, 3)


def outlier_of_1000_sigma():
    """Gaussian emissions of unit scale; one observation lies 1000 scales away."""
    initial, transition, _ = _ordinary(30, 4)
    location = torch.tensor([-3.0, -1.0, 1.0, 3.0], dtype=torch.float64)
    y = torch.linspace(-3, 3, 30, dtype=torch.float64)
    y[15] = 1000.0
    return initial, transition, -0.5 * (y[:, None] - location) ** 2 - 0.5 * math.log(2 * math.pi)


def contradicting_outliers():
    """Two steps in a row each have but one state to be in, and to go between them is rare."""
    initial, transition, observation = _ordinary(12, 3)
    transition[0, 1] = transition[0, 2] = -400.0
    observation[4] = torch.tensor([0.0, -5000.0, -5000.0])
    observation[5] = torch.tensor([-5000.0, -5000.0, 0.0])
    return initial, transition, observation


def large_offsets():
    """Unnormalized potentials around a million."""
    initial, transition, observation = _ordinary(10, 4)
    return initial + 1e5, transition - 1e6, observation + 1e6


def dead_end():
    """The state that explains the beginning best cannot be left."""
    initial, transition, observation = _ordinary(10, 4)
    transition[0] = -INF
    observation[:9, 0] = 300.0
    return initial, transition, observation


def cycle_in_the_wrong_phase():
    """A deterministic cycle out of phase with the data: the only path is the worst at every step."""
    states, steps = 5, 400
    transition = torch.full((states, states), -INF, dtype=torch.float64)
    transition[torch.arange(states), (torch.arange(states) + 1) % states] = 0.0
    initial = torch.full((states,), -INF, dtype=torch.float64)
    initial[0] = 0.0
    time = torch.arange(steps)
    observation = torch.zeros(steps, states, dtype=torch.float64)
    observation[time, time % states] = -6.0
    return initial, transition, observation


CHAINS = {
    f.__name__.replace("_", " "): f
    for f in (
        impossible_symbol,
        impossible_start,
        left_to_right,
        banded_with_zero_emissions,
        needed_step_of_minus_18,
        needed_step_of_minus_120,
        needed_step_of_minus_800,
        overtaking_by_200,
        overtaking_by_2000,
        twenty_thousand_steps,
        outlier_of_1000_sigma,
        contradicting_outliers,
        large_offsets,
        dead_end,
        cycle_in_the_wrong_phase,
    )
}
