"""The exact teacher against lists of all clips, and what a training on it uses."""

import math

import pytest
import torch

from streamr1_ref.tiny.better_teacher import (
    Muon,
    ScoreConfig,
    ScoreMethod,
    orthogonalise,
    save_next,
    score_batch,
)
from streamr1_ref.tiny.codec import fit_codec, load_codec
from streamr1_ref.tiny.exact import (
    ExactScore,
    ExactTeacher,
    GridWorld,
    Motion,
    Tilt,
    grid_clips,
    load_next,
    mixture_mean,
    place_clips,
)
from streamr1_ref.tiny.teacher import TinyTeacher, ema_model, tiny_trainer
from streamr1_ref.tiny.world import all_captions, caption_split, parse_caption
from streamr1_ref.transformer import WanConfig
from streamr1_ref.utils.files import data_path, load_tensors
from streamr1_ref.utils.runtime import seeded

SMALL = GridWorld(canvas=24, digit_size=16, num_frames=5)


@pytest.fixture(scope="module")
def small_codec():
    captions = all_captions()[::9]
    return fit_codec(grid_clips(captions, seeded(0), SMALL), channels=6)


def listed(codec, caption, glyphs, world):
    """All clean clips of a few handwritings as log weights list them: [n, places^2, numbers]."""
    places = torch.arange(world.places) / 2
    starts = torch.cartesian_prod(places, places)
    if not Motion.of(caption).vertical:
        starts = starts.flip(1)
    captions = [caption] * len(starts)
    clips = [
        codec.encode(place_clips(captions, g.expand(len(starts), 8, 8), starts, world))
        for g in glyphs
    ]
    return torch.stack([z.flatten(1) for z in clips]).double()


@pytest.mark.parametrize("direction", ["left", "right", "up", "down"])
@pytest.mark.parametrize("speed", ["slowly", "", "quickly"])
def test_every_motion_equals_brute_force(small_codec, direction, speed):
    """Log weights (up to a constant) and posterior mean, for all twelve motions."""
    caption = parse_caption(f"a yellow 4 moving {direction} {speed}".rstrip())
    score = ExactScore(small_codec, SMALL, dtype=torch.float64)
    rows = score.rows(caption) & (score.rows(caption).cumsum(0) <= 2)
    clips = listed(small_codec, caption, SMALL.glyphs()[0][rows], SMALL)
    for sigma in (0.98, 0.9, 0.6):
        noise = torch.randn(clips.shape[-1], generator=seeded(1), dtype=torch.float64)
        x = (1 - sigma) * clips[1, 700] + sigma * noise
        logits = -(x - (1 - sigma) * clips).square().sum(-1) / (2 * sigma**2)
        fast = score.log_weights(x.view(2, 6, 6, 6), sigma, caption, rows)
        gap = logits - fast
        assert (gap - gap.mean()).abs().max() < 1e-3 * max(1, logits.abs().max().item() / 1e3)
        mean = logits.flatten().softmax(0) @ clips.flatten(0, 1)
        assert (
            score.denoise(x.view(2, 6, 6, 6), sigma, caption, rows).flatten() - mean
        ).norm() < 1e-5 * mean.norm()


def test_float32_is_enough():
    """The shipped codec, whole clips, low and high noise: float32 against float64."""
    codec = load_codec(data_path("tiny_codec_next.safetensors"))
    caption = parse_caption("a red 8 moving up")
    single, double = ExactScore(codec), ExactScore(codec, dtype=torch.float64)
    z = codec.encode(grid_clips([caption], seeded(0)))[0]
    noise = torch.randn(z.shape, generator=seeded(1))
    for sigma in (0.99, 0.95, 0.8, 0.3, 0.02):
        x = (1 - sigma) * z + sigma * noise
        a, b = single.denoise(x, sigma, caption), double.denoise(x.double(), sigma, caption)
        assert (a - b).norm() < 1e-3 * b.norm(), sigma


def test_tilts_reweight_the_list(small_codec):
    """By handwriting, by start, and by colour in the mixture: the mean with weights exp(tilt)."""
    number = seeded(2)
    captions = [parse_caption(f"a {colour} 3 moving left") for colour in ("red", "blue")]
    position = torch.randn(SMALL.places, SMALL.places, generator=number, dtype=torch.float64)
    plain = ExactScore(small_codec, SMALL, dtype=torch.float64)
    glyph = torch.randn(len(plain.clips.labels), generator=number, dtype=torch.float64)
    tilt = Tilt(glyph=glyph, position=position, colour={"red": 1.0, "blue": -0.5})
    tilted = ExactScore(small_codec, SMALL, tilt=tilt, dtype=torch.float64)
    x = torch.randn(2, 6, 6, 6, generator=number, dtype=torch.float64)
    rows = plain.rows(captions[0])
    starts = position.T.flatten()  # horizontal motion: x is the moving axis
    parts = []
    for caption, colour in zip(captions, (1.0, -0.5)):
        logits = plain.log_weights(x, 0.95, caption, rows) + starts + glyph[rows, None]
        top = logits.max()
        ink = plain.mean_ink((logits - top).exp(), caption, rows)
        z = plain.clips.ink.push(ink, SMALL.palette[caption.colour])
        parts.append((top + colour, (logits - top).exp().sum(), z))
        alone = z / parts[-1][1] + plain.clips.constant
        assert torch.allclose(tilted.denoise(x, 0.95, caption), alone, atol=1e-8)
    shares = [math.exp(top - parts[0][0]) for top, _, _ in parts]
    total = sum(s * n for s, (_, n, _) in zip(shares, parts))
    mean = sum(s * z for s, (_, _, z) in zip(shares, parts)) / total + plain.clips.constant
    assert torch.allclose(mixture_mean(tilted, x, 0.95, captions), mean, atol=1e-8)


def test_refusals_name_the_argument(small_codec):
    teacher = ExactTeacher(ExactScore(small_codec, SMALL))
    x, caption = torch.zeros(1, 2, 6, 6, 6), "a red 3 moving left"
    for sigma in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match="timestep: expected one noise level a clip"):
            teacher(x, torch.tensor([1000 * sigma]), [caption])
    with pytest.raises(ValueError, match="x_t"):
        teacher(torch.zeros(1, 2, 16, 6, 6), torch.tensor([500.0]), [caption])
    with pytest.raises(ValueError, match="x_t"):
        teacher(torch.zeros(1, 9, 6, 6, 6), torch.tensor([500.0]), [caption])
    for prompt in ("a red 12 moving left", "a red 3 jumping left", "hello"):
        with pytest.raises(ValueError):
            teacher(x, torch.tensor([500.0]), [prompt])
    with pytest.raises(ValueError, match="start: expected multiples of half a pixel"):
        start = torch.tensor([[0.5, 0.7]])
        place_clips([parse_caption(caption)], torch.ones(1, 8, 8), start, SMALL)


def net_for(codec):
    """The small network for the channels of `codec`."""
    return WanConfig(
        dim=24,
        ffn_dim=48,
        num_heads=2,
        num_layers=1,
        in_channels=codec.channels,
        out_channels=codec.channels,
    )


def test_saved_weights_come_back(small_codec, tmp_path):
    cfg = ScoreConfig(batch=2, short_steps=0, save_every=1)
    method = ScoreMethod(cfg, small_codec, net_for(small_codec), SMALL)
    trainer = tiny_trainer(method, tmp_path, 1)
    trainer.train(progress=False)
    path = save_next(tmp_path / "weights.safetensors", tmp_path)
    teacher = load_next(path, small_codec)
    assert isinstance(teacher, TinyTeacher) and teacher.world == SMALL
    wanted, got = ema_model(trainer).state_dict(), teacher.model.state_dict()
    assert all(torch.equal(got[k], v.half().float()) for k, v in wanted.items())


def test_the_target_is_the_posterior_mean(small_codec):
    """Above `exact_from` the target is the exact flow, below it the clip's; there the two agree."""
    score, captions = ExactScore(small_codec, SMALL), caption_split()[0]
    settings = [ScoreConfig(batch=16, exact_from=e, drop_caption=0.0) for e in (0.0, 1.0)]
    exact, single = (score_batch(cfg, 3, score, captions) for cfg in settings)
    low = exact.sigma < 0.3
    assert torch.allclose(exact.flow[low], single.flow[low], atol=1e-2) and low.any()
    flow = ExactTeacher(score)(exact.x, exact.sigma * 1000, exact.prompts)
    assert torch.allclose(flow, exact.flow, atol=1e-3)


def test_orthogonal_updates():
    number = seeded(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 20, 50, generator=number)))
    assert values.min() > 0.6 and values.max() < 1.3
    p = torch.nn.Parameter(torch.zeros(8, 8))
    p.grad = torch.randn(8, 8, generator=number)
    Muon([p], lr=0.1).step()
    assert 0.01 < p.detach().square().mean().sqrt() < 0.03  # 0.2 x the learning rate


def test_shipped_teacher_fits_its_limits():
    path = data_path("tiny_teacher_next.safetensors")
    assert path.stat().st_size < 5 * 2**20
    assert int(load_tensors(path)[1]["step"]) > 0
    teacher = load_next()
    assert sum(p.numel() for p in teacher.model.parameters()) < 2_200_000
