"""The codecs: any split into blocks, the shipped codec, the Wan VAE adapter, damaged files."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st

from streamr1_ref.ports import LatentCodec
from streamr1_ref.tiny.codec import PCACodec, fit_codec, load_codec, save_codec
from streamr1_ref.tiny.teacher import tiny_codec
from streamr1_ref.tiny.world import WorldConfig, all_captions, mixed_clips, sample_clips
from streamr1_ref.utils.files import data_path
from streamr1_ref.wan.vae import WanVAECodec


@pytest.fixture(scope="module")
def codec():
    return load_codec(data_path("tiny_codec.safetensors"))


@pytest.fixture(scope="module")
def vae():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.5, -0.5, 0.0, 0.1],
            latents_std=[1.0, 2.0, 3.0, 0.5],
        )
        return small.eval().requires_grad_(False)


def blocks_of(total):
    """Ways to write `total` as a sum of positive block lengths."""

    def lengths(cuts):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut]
        return [b - a for a, b in zip([0, *ends], [*ends, total])]

    return st.lists(st.booleans(), min_size=total - 1, max_size=total - 1).map(lengths)


def test_shipped_codec_is_what_the_command_makes(codec):
    refitted = tiny_codec()
    for name, tensor in codec.tensors.items():
        assert torch.allclose(refitted.tensors[name], tensor, atol=2e-4), name


@settings(max_examples=20, deadline=None)
@given(blocks_of(6), st.integers(1, 3))
def test_pca_stream_is_bit_exact_for_any_split(codec, sizes, batch):
    latents = torch.randn(batch, 6, 16, 4, 6, generator=torch.Generator().manual_seed(sum(sizes)))
    decode = codec.stream_decoder()
    streamed = torch.cat([decode(b) for b in latents.split(sizes, 1)], 1)
    assert torch.equal(streamed, codec.decode(latents))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels,patch,stride", [(16, 4, 4), (3, 2, 4), (48, 4, 2)])
def test_exact_on_the_subspace(channels, patch, stride, dtype, generator):
    clips = sample_clips(all_captions()[:24], generator, WorldConfig(num_frames=9))
    codec = fit_codec(clips, channels, patch, stride)
    codec.tensors = {k: v.to(dtype) for k, v in codec.tensors.items()}
    latents = torch.randn(2, 3, channels, 5, 4, generator=generator, dtype=dtype)
    error = (codec.encode(codec.decode(latents)) - latents).abs().max()
    # even with float64 latents the basis was rounded to float32
    assert error < (2e-4 if dtype == torch.float32 else 5e-6)
    assert isinstance(codec, LatentCodec)


def test_projection_never_gains_energy(codec, generator):
    pixels, _ = mixed_clips(all_captions()[:16], generator)
    through = codec.decode(codec.encode(pixels))
    noisy = pixels + 0.1 * torch.randn(pixels.shape, generator=generator)
    change = codec.decode(codec.encode(noisy)) - through
    assert change.square().sum() < (noisy - pixels).square().sum()


@settings(max_examples=8, deadline=None)
@given(blocks_of(4))
def test_wan_stream_equals_the_librarys_decode(vae, sizes):
    codec = WanVAECodec(vae)
    latents = torch.randn(1, 4, 4, 2, 3, generator=torch.Generator().manual_seed(1))
    mean, std = vae.config.latents_mean, vae.config.latents_std
    mean, std = (torch.tensor(values).view(4, 1, 1, 1) for values in (mean, std))
    whole = (vae.decode(latents.transpose(1, 2) * std + mean).sample.transpose(1, 2) + 1) / 2
    decode = codec.stream_decoder()
    streamed = torch.cat([decode(b) for b in latents.split(sizes, 1)], 1)
    assert torch.allclose(streamed, whole, atol=1e-5)


def test_wan_gradients_reach_pixels_and_latents(vae, generator):
    codec = WanVAECodec(vae)
    pixels = torch.rand(1, 5, 3, 16, 16, generator=generator).requires_grad_()
    latents = codec.encode(pixels)
    codec.decode(latents).square().sum().backward()
    assert pixels.grad.isfinite().all() and pixels.grad.abs().sum() > 0


def test_wan_first_frame_alone(vae, generator):
    codec = WanVAECodec(vae)
    video = torch.rand(1, 9, 3, 16, 16, generator=generator)
    assert torch.allclose(codec.encode(video[:, :1]), codec.encode(video)[:, :1], atol=1e-5)
    assert codec.decode(codec.encode(video[:, :1])).shape == (1, 1, 3, 16, 16)


@pytest.mark.parametrize(
    "wrong,say",
    [
        (torch.zeros(1, 5, 3, 8, 10), "multiples of 4, got 8x10"),
        (torch.zeros(1, 4, 3, 8, 8), "got T=4"),
        (torch.zeros(1, 0, 3, 8, 8), "got T=0"),
        (torch.zeros(5, 3, 8, 8), "expected 5 axes"),
        (torch.zeros(1, 3, 5, 8, 8), "expected C=3"),
        (torch.zeros(1, 5, 3, 8, 8).int(), "torch.int32"),
    ],
)
def test_encode_refuses(codec, wrong, say):
    with pytest.raises((ValueError, TypeError), match="pixels: ") as error:
        codec.encode(wrong)
    assert say in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 7, 100, 5000, -1])
def test_truncated_codec_file(codec, tmp_path, keep):
    path = save_codec(tmp_path / "codec.safetensors", codec)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load_codec(path)


def test_codec_with_a_wrong_basis_is_refused(codec):
    with pytest.raises(ValueError, match="first.basis: expected D=48"):
        PCACodec({**codec.tensors, "first.basis": torch.zeros(47, 16)})
