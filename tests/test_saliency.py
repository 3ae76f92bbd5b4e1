"""Pooling, fusion and factors against the published code; invariances as properties."""
import json

import pytest
import torch
from conftest import GOLDEN, relative_error
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from streamr1_ref.saliency import factor_weights, fuse_axes, patch_saliency, pool_to_latent

CASES = json.loads((GOLDEN / "saliency_weights.json").read_text())["cases"]


@pytest.mark.parametrize("case", [0, 1, 2])
def test_published_pooling(golden, case):
    tensors, info = golden("saliency_pool")
    c = info["cases"][case]
    pooled = patch_saliency(tensors[f"{case}.gradient"], tuple(c["grid_thw"]), c["merge"])
    assert relative_error(pooled[0], tensors[f"{case}.pooled"]) < 1e-6
    assert relative_error(pool_to_latent(pooled, tuple(c["latent_fhw"]))[0], tensors[f"{case}.latent"]) < 1e-6


@pytest.mark.parametrize("c", CASES, ids=lambda c: f"{c['id']}-{c['maps']}-{c['combination']}")
def test_published_weights(golden, c):
    tensors, _ = golden("saliency_weights")
    maps = {axis: tensors[f"{c['maps']}.{axis}"][None] for axis in ("VQ", "MQ", "TA")}
    rewards = {axis: torch.tensor([r]) for axis, r in c["rewards"].items()}
    fused = fuse_axes(maps, rewards, c["combination"], c["temperature"])
    w = factor_weights(fused, c["temporal"], c["spatial_strength"], c["spatial_floor"], c["temporal_strength"], c["temporal_floor"])
    assert relative_error(w.weight[0], tensors[f"case.{c['id']}.weight"]) < 1e-5
    if c["temporal"]:
        assert relative_error(w.temporal[0], tensors[f"case.{c['id']}.temporal"]) < 1e-5
        assert relative_error(w.spatial[0], tensors[f"case.{c['id']}.spatial"]) < 1e-5


shapes = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 6), st.integers(1, 6))
unit = st.floats(0, 1)


@st.composite
def saliencies(draw):
    shape, seed, kind = draw(shapes), draw(st.integers(0, 10**6)), draw(st.sampled_from(["random", "spike", "steps", "tiny"]))
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"random": x, "spike": (x == x.max()).double(), "steps": (4 * x).floor(), "tiny": 1e-6 * x}[kind]


@given(s=saliencies(), temporal=st.booleans(), gs=unit, fs=st.floats(0.01, 1), gt=unit, ft=st.floats(0.01, 1))
@settings(max_examples=150, deadline=None)
def test_positive_mean_one_and_floors(s, temporal, gs, fs, gt, ft):
    w = factor_weights(s, temporal, gs, fs, gt, ft)
    assert w.weight.shape == s.shape and (w.weight > 0).all()
    assert torch.allclose(w.weight.mean((1, 2, 3)), torch.ones(len(s), dtype=s.dtype))
    within = w.spatial if temporal else w.spatial.flatten(1)[:, None]
    for x, floor in ((within.flatten(2), fs), *([(w.temporal[:, None], ft)] if temporal else [])):
        assert (x.min(2).values / x.max(2).values >= floor - 1e-9).all()           # floors, up to normalisation


@given(s=saliencies(), scale=st.floats(1e-2, 1e3), shift=st.floats(0, 10), seed=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_scale_shift_and_permutation(s, scale, shift, seed):
    spans = [s.mean((2, 3)).amax(1) - s.mean((2, 3)).amin(1), (s.amax((2, 3)) - s.amin((2, 3))).flatten()]
    assume(not any(((x > 0) & (x < 1e-5)).any() for x in spans))                   # not near the published threshold for flat maps
    w = factor_weights(s).weight
    assert torch.allclose(factor_weights(scale * s + shift).weight, w, atol=1e-4)
    g = torch.Generator().manual_seed(seed)
    f, h, v = (torch.randperm(n, generator=g) for n in s.shape[1:])
    assert torch.allclose(factor_weights(s[:, f][:, :, h][..., v]).weight, w[:, f][:, :, h][..., v])
    assert torch.allclose(factor_weights(s[:1]).weight, w[:1])                     # clips do not mix


@given(shape=shapes, value=st.floats(0, 1e6), temporal=st.booleans())
def test_constant_maps_give_ones(shape, value, temporal):
    w = factor_weights(torch.full(shape, value, dtype=torch.float64), temporal).weight
    assert torch.allclose(w, torch.ones_like(w))


@given(rewards=st.lists(st.floats(-5, 5), min_size=3, max_size=3), temperature=st.floats(0.1, 10))
def test_the_weaker_axis_gets_more(rewards, temperature):
    maps = {a: torch.zeros(1, 1, 1, 3, dtype=torch.float64) for a in "abc"}
    for i, a in enumerate("abc"):
        maps[a][..., i] = 1.0
    shares = fuse_axes(maps, {a: torch.tensor([r]) for a, r in zip("abc", rewards)}, temperature=temperature)[0, 0, 0]
    assert abs(shares.sum() - 1) < 1e-9
    for i in range(3):
        for j in range(3):
            assert shares[i] >= shares[j] - 1e-9 or rewards[i] > rewards[j]
