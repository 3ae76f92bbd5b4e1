"""Agreement with the published schedule and with diffusers, and round trips for any input."""

import pytest
import torch
from conftest import relative_error
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from streamr1_ref.flow import (
    FlowSchedule,
    euler_sample,
    flow_to_x0,
    mix_noise,
    shift_sigma,
    x0_to_flow,
)


def test_golden_schedule(golden):
    g, config = golden("schedule")
    schedule = FlowSchedule(config["shift"], config["num_train_timesteps"])
    t = g["t"]
    ours = {
        "sigmas": schedule.sigmas,
        "timesteps": schedule.timesteps,
        "training_weights": schedule.training_weights,
        "t_score": schedule.score_timestep(g["t_uniform"]),
        "noisy": schedule.add_noise(g["clean"], g["noise"], t),
        "x0_from_flow": schedule.x0_from_flow(g["noise"] - g["clean"], g["noisy"], t),
        "warp_1": schedule.warp([1000]),
        "warp_2": schedule.warp([1000, 500]),
        "warp_4": schedule.warp([1000, 750, 500, 250]),
    }
    for name, value in ours.items():
        assert value.shape == g[name].shape and relative_error(value, g[name]) < 1e-6, name


def test_golden_lookup_differs_from_exact_division_off_the_table(golden):
    """Else the test above would not show that the look-up is the published one."""
    g, _ = golden("schedule")
    exact = FlowSchedule(lookup="exact").add_noise(g["clean"], g["noise"], g["t"])
    assert relative_error(exact, g["noisy"]) > 1e-6


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 4, 24, 50])
def test_one_sampler_is_diffusers_sampler(shift, steps, generator):
    library = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    library.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    schedule = FlowSchedule(shift)
    assert torch.allclose(schedule.sampling_sigmas(steps), library.sigmas, atol=1e-6)
    noise = torch.randn(1, 2, 3, 4, 4, generator=generator)
    weight = torch.randn(4, 4, generator=generator) / 4

    def net(x, t, prompt_embeds):
        return torch.tanh(x @ weight) + t.view(-1, 1, 1, 1, 1) / 1000

    x = noise
    for t in library.timesteps:
        x = library.step(net(x, t[None], None), t, x).prev_sample
    ours = euler_sample(net, noise, None, schedule=schedule, num_steps=steps)
    assert relative_error(ours, x) < 1e-5


levels = st.floats(0.015625, 1, width=32)


@settings(deadline=None)
@given(levels, st.integers(0, 2**31))
def test_round_trips(level, seed):
    x0, noise = torch.randn(
        2, 2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    sigma = torch.tensor([level, 1.0], dtype=torch.float64)
    x_t = mix_noise(x0, noise, sigma)
    assert torch.allclose(x0_to_flow(x0, x_t, sigma), noise - x0, atol=1e-9)
    assert torch.allclose(flow_to_x0(noise - x0, x_t, sigma), x0, atol=1e-9)


@given(st.floats(0, 1), st.floats(0.1, 20), st.floats(0.1, 20))
def test_shift_is_a_group_and_monotone(s, k1, k2):
    s = torch.tensor(s, dtype=torch.float64)
    assert torch.allclose(shift_sigma(shift_sigma(s, k1), k2), shift_sigma(s, k1 * k2), atol=1e-9)
    assert 0 <= shift_sigma(s, k1) <= 1 + 1e-12
    if k1 >= 1:
        assert shift_sigma(s, k1) >= s - 1e-12


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8))
def test_warped_steps_are_on_the_table(steps):
    schedule = FlowSchedule()
    warped = schedule.warp(steps)
    inside = warped[torch.tensor(steps) > 0]
    assert torch.allclose(schedule.sigma(inside), inside / 1000, atol=1e-6)


@pytest.mark.parametrize("bad", [-1.0, 1000.5, float("nan")])
def test_timesteps_outside_the_table_are_refused(bad):
    with pytest.raises(ValueError, match=r"timestep: expected values in \[0, 1000\]"):
        FlowSchedule().sigma(torch.tensor([500.0, bad]))


def test_float64_stays_float64(generator):
    x0, noise = torch.randn(2, 1, 2, 3, generator=generator, dtype=torch.float64)
    assert FlowSchedule().add_noise(x0, noise, torch.tensor([500.0])).dtype == torch.float64
