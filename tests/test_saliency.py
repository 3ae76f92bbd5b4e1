"""Pooling, fusion and factors against the published code; invariances as properties."""

import json

import pytest
import torch
import videoreward_golden as gold
from conftest import GOLDEN, relative_error
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from streamr1_ref.published import patch_saliency
from streamr1_ref.saliency import (
    factor_weights,
    from_blocks,
    fuse_axes,
    patch_saliency_maps,
    pool_to_latent,
)

CASES = json.loads((GOLDEN / "saliency_weights.json").read_text())["cases"]


@pytest.mark.parametrize("case", [0, 1, 2])
def test_published_pooling(golden, case):
    tensors, info = golden("saliency_pool")
    c = info["cases"][case]
    pooled = patch_saliency(tensors[f"{case}.gradient"], tuple(c["grid_thw"]), c["merge"])
    latent = pool_to_latent(pooled, tuple(c["latent_fhw"]))
    assert relative_error(pooled[0], tensors[f"{case}.pooled"]) < 1e-6
    assert relative_error(latent[0], tensors[f"{case}.latent"]) < 1e-6


@pytest.mark.parametrize("c", CASES, ids=lambda c: f"{c['id']}-{c['maps']}-{c['combination']}")
def test_published_weights(golden, c):
    tensors, _ = golden("saliency_weights")
    maps = {axis: tensors[f"{c['maps']}.{axis}"][None] for axis in ("VQ", "MQ", "TA")}
    rewards = {axis: torch.tensor([r]) for axis, r in c["rewards"].items()}
    fused = fuse_axes(maps, rewards, c["combination"], c["temperature"])
    w = factor_weights(
        fused,
        c["temporal"],
        c["spatial_strength"],
        c["spatial_floor"],
        c["temporal_strength"],
        c["temporal_floor"],
    )
    assert relative_error(w.weight[0], tensors[f"case.{c['id']}.weight"]) < 1e-5
    if c["temporal"]:
        assert relative_error(w.temporal[0], tensors[f"case.{c['id']}.temporal"]) < 1e-5
        assert relative_error(w.spatial[0], tensors[f"case.{c['id']}.spatial"]) < 1e-5


shapes = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 6), st.integers(1, 6))
unit = st.floats(0, 1)


@st.composite
def saliencies(draw):
    shape, seed = draw(shapes), draw(st.integers(0, 10**6))
    kind = draw(st.sampled_from(["random", "spike", "steps", "tiny"]))
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {
        "random": x,
        "spike": (x == x.max()).double(),
        "steps": (4 * x).floor(),
        "tiny": 1e-6 * x,
    }[kind]


@given(
    s=saliencies(),
    temporal=st.booleans(),
    gs=unit,
    fs=st.floats(0.01, 1),
    gt=unit,
    ft=st.floats(0.01, 1),
)
@settings(max_examples=150, deadline=None)
def test_positive_mean_one_and_floors(s, temporal, gs, fs, gt, ft):
    w = factor_weights(s, temporal, gs, fs, gt, ft)
    assert w.weight.shape == s.shape and (w.weight > 0).all()
    assert torch.allclose(w.weight.mean((1, 2, 3)), torch.ones(len(s), dtype=s.dtype))
    within = w.spatial if temporal else w.spatial.flatten(1)[:, None]
    for x, floor in ((within.flatten(2), fs), *([(w.temporal[:, None], ft)] if temporal else [])):
        # floors, up to normalisation
        assert (x.min(2).values / x.max(2).values >= floor - 1e-9).all()


@given(
    s=saliencies(), scale=st.floats(1e-2, 1e3), shift=st.floats(0, 10), seed=st.integers(0, 1000)
)
@settings(max_examples=100, deadline=None)
def test_scale_shift_and_permutation(s, scale, shift, seed):
    frames, regions = s.mean((2, 3)), s.amax((2, 3)) - s.amin((2, 3))
    spans = [frames.amax(1) - frames.amin(1), regions.flatten()]
    # not near the published threshold for flat maps
    assume(not any(((x > 0) & (x < 1e-5)).any() for x in spans))
    w = factor_weights(s).weight
    assert torch.allclose(factor_weights(scale * s + shift).weight, w, atol=1e-4)
    g = torch.Generator().manual_seed(seed)
    f, h, v = (torch.randperm(n, generator=g) for n in s.shape[1:])
    assert torch.allclose(factor_weights(s[:, f][:, :, h][..., v]).weight, w[:, f][:, :, h][..., v])
    assert torch.allclose(factor_weights(s[:1]).weight, w[:1])  # clips do not mix


@given(shape=shapes, value=st.floats(0, 1e6), temporal=st.booleans())
def test_constant_maps_give_ones(shape, value, temporal):
    w = factor_weights(torch.full(shape, value, dtype=torch.float64), temporal).weight
    assert torch.allclose(w, torch.ones_like(w))


@given(rewards=st.lists(st.floats(-5, 5), min_size=3, max_size=3), temperature=st.floats(0.1, 10))
def test_the_weaker_axis_gets_more(rewards, temperature):
    maps = {a: torch.zeros(1, 1, 1, 3, dtype=torch.float64) for a in "abc"}
    for i, a in enumerate("abc"):
        maps[a][..., i] = 1.0
    shares = fuse_axes(
        maps, {a: torch.tensor([r]) for a, r in zip("abc", rewards)}, temperature=temperature
    )[0, 0, 0]
    assert abs(shares.sum() - 1) < 1e-9
    for i in range(3):
        for j in range(3):
            assert shares[i] >= shares[j] - 1e-9 or rewards[i] > rewards[j]


# Patch saliency: true places, and the published order


@pytest.fixture(scope="module")
def video_reward():
    return gold.reward()


def raw_maps(video_reward, clip, prompt, merge=None):
    """Rewards and saliency at the patches of a recorded clip, the maps of raw scores."""
    pixels = clip[None].float() / 255
    rewards, maps = patch_saliency_maps(video_reward, pixels, [prompt], merge)
    stacked = torch.cat([maps[axis] for axis in ("VQ", "MQ", "TA")])
    return rewards, stacked * video_reward.std.view(3, 1, 1, 1)


@pytest.mark.parametrize("name", gold.names("train_[a-z]"))
@pytest.mark.parametrize("merge", [None, 1], ids=["true places", "published"])
def test_golden_videoreward_patch_saliency(video_reward, name, merge):
    tensors, info = gold.load(name)
    rewards, maps = raw_maps(video_reward, tensors["pixels_u8"], info["prompt"], merge)
    assert (gold.raw(video_reward, rewards) - tensors["raw"]).abs().max() < 1e-5
    expected = tensors["saliency_patch" if merge else "saliency_patch_raster"]
    assert relative_error(maps, expected) < 3e-5
    if merge:
        latent = tensors["saliency_patch_latent"]
        assert relative_error(pool_to_latent(maps, tuple(latent.shape[1:])), latent) < 3e-5
        # a scrambled map is no small error
        assert relative_error(maps, tensors["saliency_patch_raster"]) > 0.1


def test_patch_saliency_takes_one_forward_pass_and_batches_do_not_mix(video_reward, monkeypatch):
    calls, score = [], video_reward.score_patches
    monkeypatch.setattr(video_reward, "score_patches", lambda *a: calls.append(1) or score(*a))
    clips = torch.rand(2, 4, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    prompts = gold.load("model")[1]["prompts"]
    rewards, maps = patch_saliency_maps(video_reward, clips, prompts)
    assert len(calls) == 1 and maps["VQ"].shape == (2, 2, 4, 6)
    for i in range(2):
        alone, own = patch_saliency_maps(video_reward, clips[i : i + 1], prompts[i : i + 1])
        for axis in maps:
            assert torch.allclose(alone[axis], rewards[axis][i : i + 1], atol=1e-5)
            assert relative_error(own[axis], maps[axis][i : i + 1]) < 1e-4


def test_the_published_order_at_full_size_is_scrambled():
    """Erratum 19: at 24 x 42 a cell in twenty is in place, and the mean error is 10.5 columns."""
    places = torch.arange(24 * 42)
    by_blocks = places.view(12, 2, 21, 2).transpose(1, 2).flatten()
    assert torch.equal(from_blocks(by_blocks, (1, 24, 42), 2).flatten(), places)
    shown = from_blocks(by_blocks, (1, 24, 42), merge=1).flatten()
    assert round((shown == places).float().mean().item(), 2) == 0.05
    assert abs((shown % 42 - places % 42).abs().float().mean() - 10.5) < 0.05


@given(
    t=st.integers(1, 3),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    merge=st.integers(1, 3),
    clips=st.integers(1, 3),
)
@settings(max_examples=50, deadline=None)
def test_every_patch_finds_its_place(t, h, w, merge, clips):
    places = torch.arange(clips * t * h * w * merge * merge).view(clips, t, h, merge, w, merge)
    values = places.permute(0, 1, 2, 4, 3, 5).flatten()
    assert torch.equal(
        from_blocks(values, (t, h * merge, w * merge), merge).flatten(), places.flatten()
    )


def test_patch_saliency_refuses(video_reward):
    clip = torch.rand(1, 2, 3, 56, 84)
    with pytest.raises(ValueError, match="in blocks of 5 x 5"):
        patch_saliency_maps(video_reward, clip, ["a"], merge=5)
    with pytest.raises(ValueError, match="pixels: expected B=2"):
        patch_saliency_maps(video_reward, clip, ["a", "b"])
    with pytest.raises(FloatingPointError, match="the gradient of VQ is not finite for clip 0"):
        patch_saliency_maps(video_reward, clip * float("nan"), ["a"])
