"""Sampler and training rollout against the published ones; frame counts, gradients and memory."""

import gc
from dataclasses import replace

import pytest
import torch
from conftest import SMALL_NET, relative_error

from streamr1_ref.cache import CacheConfig, make_cache
from streamr1_ref.flow import FlowSchedule
from streamr1_ref.rollout import (
    SamplerConfig,
    Stream,
    StreamSampler,
    commit_block,
    denoise_block,
    fresh_noise,
    self_forcing_rollout,
)
from streamr1_ref.transformer import WanConfig, WanTransformer, load_wan_weights


def published(golden, name):
    tensors, info = golden(name)
    cfg = WanConfig(
        dim=info["dim"],
        ffn_dim=info["ffn_dim"],
        num_heads=info["heads"],
        num_layers=info["layers"],
        in_channels=info["channels"],
        out_channels=info["channels"],
        text_dim=info["text_dim"],
        text_len=info["text_len"],
        freq_dim=info["freq_dim"],
        patch_size=tuple(info["patch"]),
    )
    net = load_wan_weights(
        WanTransformer(cfg), {k[2:]: v for k, v in tensors.items() if k.startswith("w.")}
    ).requires_grad_(False)
    cache = CacheConfig(info["window_frames"], info["sink_frames"], alpha=info["alpha"])
    renoise = [
        [tensors[f"renoise.{b}.{s}"] for s in range(4) if f"renoise.{b}.{s}" in tensors]
        for b in range(info["blocks"])
    ]
    return tensors, info, net, cache, renoise


def test_published_sampler(golden):
    tensors, info, net, cache, renoise = published(golden, "rollout_inference")
    sampler = StreamSampler(
        net, FlowSchedule(info["shift"]), info["step_list"], info["frames_per_block"], cache
    )
    latents = sampler.sample(tensors["noise"], tensors["prompt_embeds"], renoise)
    assert relative_error(latents, tensors["latents"]) < 1e-4
    assert torch.allclose(sampler.schedule.warp(info["step_list"]), tensors["steps"], atol=1e-3)


def test_published_sampler_call_by_call(golden):
    tensors, info, net, cfg, renoise = published(golden, "rollout_inference")
    schedule, prompt = FlowSchedule(info["shift"]), tensors["prompt_embeds"]
    timesteps = schedule.warp(info["step_list"]).tolist()
    cache = make_cache(net.cfg, cfg, 1, (2, 3))
    errors = []
    for b, x in enumerate(tensors["noise"].split(3, 1)):
        cache.begin_block(3)
        for s in range(4):  # the block as it is after each of its calls
            x0 = denoise_block(
                net,
                x,
                prompt,
                cache,
                schedule,
                timesteps,
                fresh_noise(None, renoise[b]),
                exit_step=s,
            )
            errors.append(relative_error(x0, tensors[f"x0.{b}.{s}"]))
        commit_block(net, x0, prompt, cache, schedule)
    assert len(errors) == 28 and max(errors) < 1e-4, errors
    for layer in range(2):
        for kind, name in enumerate(("k", "v")):
            assert (
                relative_error(
                    cache.store[kind, layer].flatten(1, 2), tensors[f"cache_{name}.{layer}"]
                )
                < 1e-4
            )


@pytest.mark.parametrize("name", ["rollout_training_same_exit", "rollout_training_exit_per_block"])
def test_published_training_rollout(golden, name):
    tensors, info, net, cache, renoise = published(golden, name)
    r = self_forcing_rollout(
        net,
        tensors["noise"],
        tensors["prompt_embeds"],
        FlowSchedule(info["shift"]),
        info["step_list"],
        info["exit_flags"],
        info["frames_per_block"],
        cache,
        evict=False,
        renoise=renoise,
    )
    assert relative_error(r.latents, tensors["latents"]) < 1e-4
    assert r.exit_steps == info["exit_flags"]


def test_published_training_differs_from_inference_from_the_fourth_block_on(golden):
    """Erratum 1: the EMA sink moves at inference only."""
    tensors, info, net, cache, renoise = published(golden, "rollout_inference")
    args = (
        net,
        tensors["noise"],
        tensors["prompt_embeds"],
        FlowSchedule(),
        info["step_list"],
        [3],
        3,
    )
    frozen, static, moving = (
        self_forcing_rollout(*args, cache=c, evict=e, renoise=renoise).latents
        for c, e in ((cache, False), (CacheConfig(sink="static"), True), (cache, True))
    )
    assert relative_error(frozen, static) < 1e-6
    # with evict=True the training rollout is the sampler
    assert relative_error(moving, tensors["latents"]) < 1e-4
    gap = [relative_error(a, b) for a, b in zip(frozen.split(3, 1), tensors["latents"].split(3, 1))]
    assert max(gap[:3]) < 1e-6 and all(1e-5 < g < 1e-3 for g in gap[3:]), gap


def small_net():
    torch.manual_seed(0)
    return WanTransformer(SMALL_NET)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "cache",
    [
        CacheConfig(),
        CacheConfig(sink="static"),
        CacheConfig(sink="none"),
        CacheConfig(window_frames=None, max_frames=30),
    ],
    ids=["ema", "static", "window", "full"],
)
@pytest.mark.parametrize("frames, per_block", [(21, 3), (10, 3), (8, 1), (11, 4)])
def test_any_frame_count_and_block_size(cache, frames, per_block):
    sampler = StreamSampler(
        small_net().requires_grad_(False),
        steps=(1000, 500),
        frames_per_block=per_block,
        cache=cache,
    )
    noise = randn(2, frames, 4, 4, 6)
    prompt = randn(2, 5, 16)
    first = frames % per_block + per_block
    make = lambda: sampler.sample(noise, prompt, generator=torch.Generator().manual_seed(0))
    if cache.window_frames and first > cache.window_frames - cache.num_sink:
        message = (
            rf"window_frames: expected at least sink_frames \+ the block = 3 \+ {first}, got 9"
        )
        with pytest.raises(ValueError, match=message):
            make()
        return
    out = make()
    assert out.shape == (2, frames, 4, 4, 6) and out.isfinite().all()


def test_clips_of_a_batch_do_not_mix():
    net = small_net().requires_grad_(False)
    noise = randn(2, 12, 4, 4, 6)
    prompt = randn(2, 5, 16, seed=1)
    renoise = [[randn(2, 3, 4, 4, 6, seed=10 * b + s) for s in range(3)] for b in range(4)]
    both = StreamSampler(net).sample(noise, prompt, renoise)
    for i in range(2):
        alone = StreamSampler(net).sample(
            noise[i : i + 1], prompt[i : i + 1], [[r[i : i + 1] for r in row] for row in renoise]
        )
        assert relative_error(alone, both[i : i + 1]) < 1e-5


def test_a_stream_does_not_depend_on_how_much_of_it_is_asked_for():
    net, prompt = small_net().requires_grad_(False), randn(1, 5, 16)
    long = list(StreamSampler(net).stream(prompt, torch.Generator().manual_seed(3), num_blocks=8))
    short = list(StreamSampler(net).stream(prompt, torch.Generator().manual_seed(3), num_blocks=5))
    assert all(torch.equal(a, b) for a, b in zip(short, long))


def test_an_endless_stream_keeps_no_history():
    net, prompt = small_net().requires_grad_(False), randn(1, 5, 16)
    stream = StreamSampler(net, steps=(1000,)).stream(prompt, torch.Generator().manual_seed(0))
    for _ in range(300):
        block = next(stream)
    assert block.isfinite().all() and len(stream.recent) == 3 and stream.cache.length == 9


@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize("exit_steps", [[0], [3], [1, 3, 0, 2]])
def test_gradient_reaches_the_weights_of_every_exit(evict, exit_steps):
    net = small_net()
    r = self_forcing_rollout(
        net,
        randn(1, 12, 4, 4, 6),
        randn(1, 5, 16),
        FlowSchedule(),
        exit_steps=exit_steps,
        evict=evict,
        cache=CacheConfig(alpha=0.5),
        generator=torch.Generator().manual_seed(0),
    )
    for part in r.latents.split(3, 1):
        grads = torch.autograd.grad(
            part.sum(), [p for p in net.parameters()], retain_graph=True, allow_unused=True
        )
        assert sum(g is not None and bool(g.abs().max() > 0) for g in grads) > 20


@pytest.mark.parametrize("evict", [True, False])
def test_recomputing_layers_in_the_backward_pass_changes_no_gradient(evict):
    """Blocks that are computed again must not notice what later ones wrote (LongLive #16)."""
    grads = []
    for checkpointing in (False, True):
        net = small_net().double()
        net.checkpointing = checkpointing
        r = self_forcing_rollout(
            net,
            randn(1, 15, 4, 4, 6).double(),
            randn(1, 5, 16).double(),
            FlowSchedule(),
            exit_steps=[1, 3, 0, 2, 1],
            evict=evict,
            cache=CacheConfig(alpha=0.5),
            generator=torch.Generator().manual_seed(0),
        )
        grads.append(torch.autograd.grad(r.latents.square().sum(), list(net.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and any(
        g.abs().max() > 0 for g in grads[0]
    )


def test_a_rollout_without_gradients_builds_no_graph():
    net = small_net()
    with torch.no_grad():
        r = self_forcing_rollout(
            net,
            randn(1, 6, 4, 4, 6),
            randn(1, 5, 16),
            FlowSchedule(),
            generator=torch.Generator().manual_seed(0),
        )
    assert not r.latents.requires_grad


def test_bfloat16_network_with_float32_latents():
    """Latents stay in float32 between steps; only the network's input is cast."""
    net = small_net().requires_grad_(False)
    noise, prompt = randn(1, 6, 4, 4, 6), randn(1, 5, 16)
    renoise = [[randn(1, 3, 4, 4, 6, seed=10 * b + s) for s in range(3)] for b in range(2)]
    reference = StreamSampler(net).sample(noise, prompt, renoise)
    half = StreamSampler(net.bfloat16()).sample(noise, prompt.bfloat16(), renoise)
    assert half.dtype == torch.float32 and relative_error(half, reference) < 3e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_streams_the_same_video():
    net, prompt = small_net().requires_grad_(False), randn(1, 5, 16)
    noise = randn(1, 12, 4, 4, 6)
    renoise = [[randn(1, 3, 4, 4, 6, seed=10 * b + s) for s in range(3)] for b in range(4)]
    reference = StreamSampler(net).sample(noise, prompt, renoise)
    ours = StreamSampler(net.cuda()).sample(noise.cuda(), prompt.cuda(), renoise)
    assert relative_error(ours.cpu(), reference) < 1e-3


def test_a_training_rollout_keeps_no_copy_of_the_past(monkeypatch):
    """The backward pass reads the store (copies took 8.84 GiB at 1.3B, 832 x 480)."""
    # meta has no values
    monkeypatch.setattr(
        FlowSchedule, "sigma", lambda self, t: torch.full(t.shape, 0.5, device=t.device)
    )
    frame = 2 * 30 * 52 * 1536 * 2  # bytes of a frame's keys and values in a layer, bfloat16
    per_layer = (kept_by_a_rollout(3) - kept_by_a_rollout(2)) / frame
    # the store holds 21 frames, and what enters a checkpointed layer is worth half as much;
    # copies would be 33 more
    assert per_layer == pytest.approx(31.5, rel=0.01), (
        f"{per_layer:.1f} frames of keys and values are kept a layer"
    )


def kept_by_a_rollout(num_layers):
    """Bytes that a rollout of 21 frames as wide as Wan2.1 1.3B keeps for its backward pass."""
    cfg = replace(WanConfig.wan_1_3b(), num_layers=num_layers)
    with torch.device("meta"):
        net = WanTransformer(cfg).to(torch.bfloat16)
    net.checkpointing = True
    noise = torch.empty(1, 21, 16, 60, 104, device="meta")
    prompt = torch.empty(1, 512, cfg.text_dim, device="meta", dtype=torch.bfloat16)
    before = meta_storages()
    rollout = self_forcing_rollout(net, noise, prompt, FlowSchedule(), exit_steps=[0], evict=False)
    assert rollout.latents.requires_grad
    return sum(size for key, size in meta_storages().items() if key not in before)


def meta_storages():
    """Bytes of every storage of a tensor on the meta device that Python can reach, by address."""
    gc.collect()
    tensors = [
        o
        for o in gc.get_objects()
        if type(o) in (torch.Tensor, torch.nn.Parameter) and o.device.type == "meta"
    ]
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


class Interrupted(torch.nn.Module):
    """A network that raises `error` at its call number `at`, once, after it has done its work."""

    def __init__(self, net, at, error=RuntimeError("out of memory")):
        super().__init__()
        self.cfg, self.net, self.at, self.error, self.calls = net.cfg, net, at, error, 0

    def forward(self, *args, **kwargs):
        out, self.calls = self.net(*args, **kwargs), self.calls + 1
        if self.calls == self.at:
            raise self.error
        return out


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 8, 10, 23, 25], ids="block {}".format)
def test_a_stream_goes_on_after_an_exception_as_if_there_had_been_none(at, error):
    """Blocks have five calls, the fifth writes; from the fourth block on, frames are evicted."""
    net, prompt = small_net().requires_grad_(False), randn(1, 5, 16)
    config = SamplerConfig(cache=CacheConfig(alpha=0.5), context_noise=20.0)
    whole = StreamSampler(net, config=config).stream(prompt, torch.Generator().manual_seed(3))
    fails = StreamSampler(Interrupted(net, at, error), config=config)
    stream = fails.stream(prompt, torch.Generator().manual_seed(3))
    for block in range(8):
        if block == (at - 1) // 5:
            with pytest.raises(type(error)):
                next(stream)
            assert stream.cache.open_frames == 0
        assert torch.equal(next(stream), next(whole))
    assert torch.equal(stream.cache.store, whole.cache.store)


def test_a_refused_block_is_refused_again_and_does_not_end_the_stream():
    bounded = CacheConfig(window_frames=None, max_frames=6)
    sampler = StreamSampler(small_net().requires_grad_(False), steps=(1000,), cache=bounded)
    stream = sampler.stream(randn(1, 5, 16), torch.Generator().manual_seed(0))
    next(stream), next(stream)
    for _ in range(2):
        with pytest.raises(ValueError, match="max_frames: this cache holds 6 frames"):
            next(stream)


def test_a_stream_whose_noise_fails_says_so_at_every_call():
    class Draws:
        count = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.count += 1
            if self.count == 2:
                raise RuntimeError("out of memory")
            return randn(1, 3, 4, 4, 6)

    sampler = StreamSampler(small_net().requires_grad_(False), steps=(1000,))
    stream = Stream(sampler, randn(1, 5, 16), Draws(), (4, 6))
    next(stream)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(stream)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="noise: .* make a new stream"):
            next(stream)


def test_a_switch_of_the_prompt_that_fails_is_made_up_for():
    net, prompts = small_net().requires_grad_(False), randn(2, 5, 16).split(1)
    config = SamplerConfig((1000,), context_noise=20.0)  # two calls a block
    streams = [
        StreamSampler(n, config=config).stream(prompts[0], torch.Generator().manual_seed(3))
        for n in (net, Interrupted(net, at=8))
    ]
    for stream in streams:
        _ = [next(stream) for _ in range(3)]
    streams[0].switch_prompt(prompts[1])
    with pytest.raises(RuntimeError, match="out of memory"):
        streams[1].switch_prompt(prompts[1])
    assert torch.equal(*(next(stream) for stream in streams))


def test_a_finished_stream_stays_finished():
    stream = StreamSampler(small_net().requires_grad_(False)).stream(
        randn(1, 5, 16), torch.Generator().manual_seed(0), num_blocks=2
    )
    assert len(list(stream)) == 2 and list(stream) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"denoising_steps": (1000, 500.0)}, "denoising_steps: expected falling whole numbers"),
        ({"denoising_steps": (True,)}, "denoising_steps: expected falling whole numbers"),
        ({"denoising_steps": ()}, "denoising_steps: expected falling whole numbers"),
        ({"denoising_steps": (500, 750)}, "denoising_steps: expected falling whole numbers"),
        ({"frames_per_block": 0}, "frames_per_block: expected a number of at least 1, got 0"),
        ({"frames_per_block": None}, "frames_per_block: expected a whole number"),
        ({"frames_per_block": 7}, r"window_frames: expected .* = 3 \+ 7, got 9"),
        ({"context_noise": 1001}, "context_noise: expected a number .* at most 1000, got 1001"),
        ({"context_noise": float("nan")}, "context_noise: expected a number"),
        ({"context_lookup": "closest"}, "context_lookup: expected one of"),
    ],
)
def test_settings_that_clash_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**change)


def test_settings_that_make_no_cache_are_refused():
    with pytest.raises(TypeError, match="cache: expected settings with make and check_block"):
        SamplerConfig(cache="ema")


def test_an_unknown_lookup_of_noise_is_refused():
    net, x = small_net().requires_grad_(False), randn(1, 3, 4, 4, 6)
    with pytest.raises(ValueError, match="context_lookup: expected 'exact' or 'nearest', got 'a'"):
        commit_block(net, x, randn(1, 5, 16), None, FlowSchedule(), context_lookup="a")
