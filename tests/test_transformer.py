"""The transformer against the published code, diffusers and released checkpoints; its refusals."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, relative_error
from diffusers import WanTransformer3DModel

from streamr1_ref.transformer import (
    WanConfig,
    WanTransformer,
    load_wan_weights,
    to_diffusers_name,
    to_official_name,
    unwrap_state_dict,
)
from streamr1_ref.utils.files import load_tensors, save_tensors

SMALL = WanConfig(
    dim=48,
    ffn_dim=96,
    num_heads=2,
    num_layers=2,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    text_len=8,
    freq_dim=32,
)
KEYS = json.loads((GOLDEN / "wan_checkpoint_keys.json").read_text())
PRESETS = {"wan2.1-t2v-1.3b": WanConfig.wan_1_3b(), "wan2.1-t2v-14b": WanConfig.wan_14b()}


def build(cfg, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return WanTransformer(cfg).requires_grad_(False)


def inputs(cfg, generator, batch=2, frames=3, height=4, width=6, length=5):
    return (
        torch.randn(batch, frames, cfg.in_channels, height, width, generator=generator),
        torch.rand(batch, generator=generator) * 1000,
        torch.randn(batch, length, cfg.text_dim, generator=generator),
    )


def library(cfg, net):
    theirs = (
        WanTransformer3DModel(
            cfg.patch_size,
            cfg.num_heads,
            cfg.head_dim,
            cfg.in_channels,
            cfg.out_channels,
            cfg.text_dim,
            cfg.freq_dim,
            cfg.ffn_dim,
            cfg.num_layers,
            cross_attn_norm=True,
            eps=cfg.eps,
        )
        .eval()
        .requires_grad_(False)
    )
    theirs.load_state_dict({to_diffusers_name(k): v for k, v in net.state_dict().items()})
    return lambda x, t, p: theirs(
        x.transpose(1, 2), t, F.pad(p, (0, 0, 0, cfg.text_len - p.shape[1]))
    ).sample.transpose(1, 2)


def test_golden_bidirectional(golden):
    g, config = golden("bidirectional")
    net = load_wan_weights(
        WanTransformer(SMALL), {k[2:]: v for k, v in g.items() if k.startswith("w.")}
    )
    flow = net(g["x"].transpose(1, 2), g["t"], g["prompt_embeds"]).transpose(1, 2)
    assert relative_error(flow, g["flow"]) < 1e-5


@pytest.mark.parametrize(
    "cfg",
    [
        SMALL,
        WanConfig.tiny(),
        WanConfig(dim=96, ffn_dim=64, num_heads=3, num_layers=1, in_channels=3, out_channels=5),
        WanConfig(dim=64, num_heads=8, num_layers=3, text_len=4, text_dim=8),
    ],
)
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 8, 6), (7, 2, 10)])
def test_equal_to_diffusers(cfg, shape, generator):
    net = build(cfg)
    x, t, p = inputs(cfg, generator, 2, *shape, length=3)
    assert relative_error(net(x, t, p), library(cfg, net)(x, t, p)) < 1e-5


def test_per_frame_timesteps_equal_diffusers_per_token_timesteps(generator):
    net = build(SMALL)
    x, _, p = inputs(SMALL, generator)
    t = torch.tensor([[1000.0, 625.0, 0.0], [20.0, 980.0, 500.0]])
    assert relative_error(net(x, t, p), library(SMALL, net)(x, t.repeat_interleave(6, 1), p)) < 1e-5


def test_patches_of_several_frames(generator):
    cfg = WanConfig(
        dim=48,
        num_heads=2,
        num_layers=1,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        patch_size=(2, 2, 2),
    )
    net = build(cfg)
    x, t, p = inputs(cfg, generator, frames=4)
    assert relative_error(net(x, t, p), library(cfg, net)(x, t, p)) < 1e-5
    assert torch.allclose(net(x, t[:, None].expand(2, 2), p), net(x, t, p), atol=1e-5)
    with pytest.raises(ValueError, match="x_t: expected frames, height and width in multiples"):
        net(x[:, :3], t, p)


@pytest.mark.parametrize("name", PRESETS)
def test_every_released_tensor_has_its_place(name):
    """Names and shapes of the released checkpoints (825, 1,095 tensors), and diffusers' names."""
    spec, cfg = KEYS[name], PRESETS[name]
    assert {k: getattr(cfg, k) for k in spec["config"]} == spec["config"]
    official = {}
    for key, shape in spec["official"].items():
        copies = range(cfg.num_layers) if key.startswith("blocks.0.") else [None]
        official |= {
            key if i is None else key.replace("blocks.0.", f"blocks.{i}."): tuple(shape)
            for i in copies
        }
    with torch.device("meta"):
        net = WanTransformer(cfg)
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == official
    assert (
        len(official) == spec["n_tensors"]
        and sum(p.numel() for p in net.parameters()) == spec["n_params"]
    )
    for key in official:
        generic = ".".join(
            "#" if part.isdigit() and i == 1 and key.startswith("blocks.") else part
            for i, part in enumerate(key.split("."))
        )
        theirs = KEYS["official_to_diffusers"][generic]
        assert (
            to_diffusers_name(key) == theirs.replace("#", key.split(".")[1])
            and to_official_name(to_diffusers_name(key)) == key
        )
    checkpoint = {k: torch.empty(s, device="meta") for k, s in official.items()}
    load_wan_weights(net, checkpoint)
    load_wan_weights(net, {to_diffusers_name(k): v for k, v in checkpoint.items()})


@pytest.mark.parametrize("wrapper", KEYS["checkpoint_wrappers"]["top_level_keys"])
@pytest.mark.parametrize(
    "prefix", ["", *KEYS["checkpoint_wrappers"]["prefixes_to_strip"], "model._fsdp_wrapped_module."]
)
def test_wrapped_checkpoints(wrapper, prefix):
    net = build(SMALL)
    wrapped = {
        wrapper: {
            prefix + k.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): v
            for k, v in net.state_dict().items()
        },
        "step": 7,
    }
    other = load_wan_weights(build(SMALL, seed=1), wrapped)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))


def test_ema_weights_are_preferred():
    state = {
        "generator": {"a": torch.zeros(1)},
        "generator_ema": {"a": torch.ones(1)},
        "critic": {"a": torch.zeros(1)},
    }
    assert unwrap_state_dict(state)["a"] == 1


def test_all_misfits_are_in_one_error_and_nothing_is_loaded():
    state = build(SMALL, seed=1).state_dict()
    del state["blocks.0.norm3.bias"], state["head.modulation"]
    state |= {
        "img_emb.proj.weight": torch.zeros(3, 2),
        "blocks.1.self_attn.q.weight": torch.zeros(48, 47),
        "text_embedding.0.bias": torch.zeros(1),
    }
    net = build(SMALL)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_wan_weights(net, state)
    for say in (
        "5 tensors do not fit",
        "missing blocks.0.norm3.bias (48,)",
        "missing head.modulation (1, 2, 48)",
        "unexpected img_emb.proj.weight (3, 2)",
        "blocks.1.self_attn.q.weight: expected shape (48, 48), got (48, 47)",
        "text_embedding.0.bias: expected shape (48,), got (1,)",
    ):
        assert say in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_truncated_weights_are_refused(tmp_path):
    path = save_tensors(tmp_path / "w.safetensors", build(SMALL).state_dict())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"w.safetensors \(\d+ bytes\) is truncated"):
        load_tensors(path)


def test_bfloat16_stays_close(generator):
    net, (x, t, p) = build(SMALL), inputs(SMALL, generator)
    exact = net(x, t, p)
    half = build(SMALL).bfloat16()(x.bfloat16(), t, p.bfloat16())
    assert half.dtype == torch.bfloat16 and relative_error(half.float(), exact) < 0.03


def test_float64_agrees_to_float32_precision(generator):
    net, (x, t, p) = build(SMALL), inputs(SMALL, generator)
    exact = build(SMALL).double()(x.double(), t.double(), p.double())
    assert exact.dtype == torch.float64 and relative_error(net(x, t, p).double(), exact) < 1e-5


def test_clips_of_a_batch_do_not_mix(generator):
    net, (x, t, p) = build(SMALL), inputs(SMALL, generator, batch=3)
    together = net(x, t, p)
    for i in range(3):
        assert torch.allclose(
            net(x[i : i + 1], t[i : i + 1], p[i : i + 1]), together[i : i + 1], atol=1e-5
        )


def test_every_parameter_gets_a_gradient(generator):
    net, (x, t, p) = WanTransformer(SMALL), inputs(SMALL, generator)
    net(x, t, p).square().mean().backward()
    assert not [
        n for n, q in net.named_parameters() if q.grad is None or not q.grad.abs().sum() > 0
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_gpu_agrees_with_cpu(generator):
    net, (x, t, p) = build(SMALL), inputs(SMALL, generator)
    on_gpu = build(SMALL).cuda()(x.cuda(), t.cuda(), p.cuda()).cpu()
    assert relative_error(on_gpu, net(x, t, p)) < 1e-3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 0}, "num_heads: expected a number of at least 1, got 0"),
        ({"num_layers": 0}, "num_layers: expected a number of at least 1, got 0"),
        ({"ffn_dim": -4}, "ffn_dim: expected a number of at least 1"),
        ({"text_len": 0}, "text_len: expected a number of at least 1"),
        ({"eps": -1.0}, "eps: expected a number of at least 0"),
        ({"patch_size": (2, 2)}, r"patch_size: expected three numbers, got \(2, 2\)"),
        ({"patch_size": (1, 0, 2)}, "patch_size: expected a number of at least 1"),
        ({"latent_size": (8, 7)}, r"latent_size: expected .* multiples of \(2, 2\), got \(8, 7\)"),
        ({"dim": 130}, "dim, num_heads: expected dim / num_heads to be even"),
        ({"freq_dim": 7}, "freq_dim: expected an even number"),
    ],
)
def test_sizes_that_clash_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        WanConfig(**change)
