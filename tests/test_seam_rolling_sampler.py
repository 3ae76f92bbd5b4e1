"""A rolling sampler in one file: blocks at staggered noise levels are denoised together."""

import pytest
import torch
from conftest import relative_error

from streamr1_ref.cache import CacheConfig, make_cache
from streamr1_ref.rollout import SamplerConfig, StreamSampler, check_steps
from streamr1_ref.tiny.student import load_student

STUDENT = load_student()
NET, SCHEDULE = STUDENT.model.transformer.requires_grad_(False), STUDENT.schedule
PROMPT = STUDENT.model.text(["a red 3 moving left", "a cyan 0 moving up"]).detach()
STEPS = check_steps(SCHEDULE, SamplerConfig().denoising_steps)


class Rolling:
    """A block on its way: its latents [B,f,C,H,W] and how many calls it has had."""

    def __init__(self, x):
        self.x, self.calls = x, 0

    def level(self, done=0.0):
        """Its timestep, for each of its frames [B,f]."""
        return torch.full(self.x.shape[:2], STEPS[self.calls] if self.calls < 4 else done)


def joined(window):
    return torch.cat([b.x for b in window], 1), torch.cat([b.level() for b in window], 1)


def advance(window, cache, generator):
    """One call on all blocks of the window, each of which goes one level down."""
    x, timestep = joined(window)
    x0 = SCHEDULE.x0_from_flow(NET(x, timestep, PROMPT, cache=cache), x, timestep)
    for block, clean in zip(window, x0.split([b.x.shape[1] for b in window], 1)):
        block.x, block.calls = clean, block.calls + 1
        if block.calls < len(STEPS):
            noise = torch.randn(clean.shape, generator=generator)
            block.x = SCHEDULE.add_noise(clean, noise, block.level())


def rolling(noise, width, cache, generator):
    """Yield finished blocks; `width` blocks are in the window, the oldest is the cleanest."""
    waiting, window = list(noise.split(3, 1)), []
    while waiting or window:
        window += [Rolling(waiting.pop(0))] if waiting else []
        cache.begin_block(sum(block.x.shape[1] for block in window))
        for _ in range(len(STEPS) // width):
            advance(window, cache, generator)
        if window[0].calls < len(STEPS):
            cache.commit(0)  # the window is still filling up
            continue
        NET(*joined(window), PROMPT, cache=cache, write=True)
        cache.commit(frames=window[0].x.shape[1])
        yield window.pop(0).x


def clip(width, noise=torch.randn(2, 15, 16, 8, 8, generator=torch.Generator().manual_seed(1))):
    config = CacheConfig(window_frames=6 + 3 * width, alpha=0.9)
    cache = make_cache(NET.cfg, config, 2, (4, 4))
    made = torch.cat(list(rolling(noise, width, cache, torch.Generator().manual_seed(0))), 1)
    assert cache.length + cache.evicted_frames == noise.shape[1] and cache.open_frames == 0
    return made, noise


def test_one_block_in_the_window_is_the_streaming_sampler():
    made, noise = clip(1)
    sampler = StreamSampler(NET, SCHEDULE, cache=CacheConfig(alpha=0.9))
    streamed = sampler.sample(noise, PROMPT, generator=torch.Generator().manual_seed(0))
    assert relative_error(made, streamed) < 1e-5


@pytest.mark.parametrize("width", [1, 2, 4])
def test_blocks_of_a_window_are_made_together(width):
    made, noise = clip(width)
    assert made.shape == noise.shape and made.isfinite().all() and torch.equal(made, clip(width)[0])
    noise = noise.clone()
    noise[:, 3:6] *= -1  # the second block, which the first one sees if both are in the window
    assert (relative_error(clip(width, noise)[0][:, :3], made[:, :3]) > 1e-3) == (width > 1)
