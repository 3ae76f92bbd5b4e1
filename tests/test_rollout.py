"""The sampler and the training rollout against the published ones, and what no reader needs to see."""
import pytest
import torch
from conftest import relative_error

from streamr1_ref.cache import CacheConfig
from streamr1_ref.flow import FlowSchedule
from streamr1_ref.rollout import StreamSampler, denoise_block, fresh_noise, remember, self_forcing_rollout
from streamr1_ref.cache import make_cache
from streamr1_ref.transformer import WanConfig, WanTransformer, load_wan_weights

SMALL = WanConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, latent_size=(4, 6))


def published(golden, name):
    tensors, info = golden(name)
    cfg = WanConfig(dim=info["dim"], ffn_dim=info["ffn_dim"], num_heads=info["heads"], num_layers=info["layers"], in_channels=info["channels"],
                    out_channels=info["channels"], text_dim=info["text_dim"], text_len=info["text_len"], freq_dim=info["freq_dim"], patch_size=tuple(info["patch"]))
    net = load_wan_weights(WanTransformer(cfg), {k[2:]: v for k, v in tensors.items() if k.startswith("w.")}).requires_grad_(False)
    cache = CacheConfig(info["window_frames"], info["sink_frames"], alpha=info["alpha"])
    renoise = [[tensors[f"renoise.{b}.{s}"] for s in range(4) if f"renoise.{b}.{s}" in tensors] for b in range(info["blocks"])]
    return tensors, info, net, cache, renoise


def test_published_sampler(golden):
    tensors, info, net, cache, renoise = published(golden, "rollout_inference")
    sampler = StreamSampler(net, FlowSchedule(info["shift"]), info["step_list"], info["frames_per_block"], cache)
    latents = sampler.sample(tensors["noise"], tensors["prompt_embeds"], renoise)
    assert relative_error(latents, tensors["latents"]) < 1e-4
    assert torch.allclose(sampler.schedule.warp(info["step_list"]), tensors["steps"], atol=1e-3)


def test_published_sampler_call_by_call(golden):
    tensors, info, net, cfg, renoise = published(golden, "rollout_inference")
    schedule, prompt = FlowSchedule(info["shift"]), tensors["prompt_embeds"]
    timesteps, cache = schedule.warp(info["step_list"]).tolist(), make_cache(net.cfg, cfg, 1, (2, 3))
    errors = []
    for b, x in enumerate(tensors["noise"].split(3, 1)):
        cache.open(3)
        for s in range(4):                                               # the block as it is after each of its calls
            x0 = denoise_block(net, x, prompt, cache, schedule, timesteps, fresh_noise(None, renoise[b]), exit_step=s)
            errors.append(relative_error(x0, tensors[f"x0.{b}.{s}"]))
        remember(net, x0, prompt, cache, schedule)
    assert len(errors) == 28 and max(errors) < 1e-4, errors
    for layer in range(2):
        for kind, name in enumerate(("k", "v")):
            assert relative_error(cache.store[kind, layer].flatten(1, 2), tensors[f"cache_{name}.{layer}"]) < 1e-4


@pytest.mark.parametrize("name", ["rollout_training_same_exit", "rollout_training_exit_per_block"])
def test_published_training_rollout(golden, name):
    tensors, info, net, cache, renoise = published(golden, name)
    r = self_forcing_rollout(net, tensors["noise"], tensors["prompt_embeds"], FlowSchedule(info["shift"]), info["step_list"], info["exit_flags"],
                             info["frames_per_block"], cache, evict=False, renoise=renoise)
    assert relative_error(r.latents, tensors["latents"]) < 1e-4
    assert r.exit_steps == info["exit_flags"]


def test_published_training_differs_from_inference_from_the_fourth_block_on(golden):
    """errata.md 1: the EMA sink moves at inference only."""
    tensors, info, net, cache, renoise = published(golden, "rollout_inference")
    args = (net, tensors["noise"], tensors["prompt_embeds"], FlowSchedule(), info["step_list"], [3], 3)
    frozen, static, moving = (self_forcing_rollout(*args, cache=c, evict=e, renoise=renoise).latents
                              for c, e in ((cache, False), (CacheConfig(sink="static"), True), (cache, True)))
    assert relative_error(frozen, static) < 1e-6
    assert relative_error(moving, tensors["latents"]) < 1e-4              # with evict=True the training rollout is the sampler
    gap = [relative_error(a, b) for a, b in zip(frozen.split(3, 1), tensors["latents"].split(3, 1))]
    assert max(gap[:3]) < 1e-6 and all(1e-5 < g < 1e-3 for g in gap[3:]), gap
