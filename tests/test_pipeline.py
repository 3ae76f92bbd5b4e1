"""The pipeline: streams are prefixes, folders hold everything that changes a video, damaged folders are named."""

import time
from dataclasses import replace

import pytest
import torch

from streamr1_ref.cache import CacheConfig
from streamr1_ref.pipeline import PRESETS, Player, StreamR1Pipeline
from streamr1_ref.training.presets import PRESETS as RUNS

PROMPTS = ["a red 3 moving left", "a cyan 0 moving up quickly"]


@pytest.fixture(scope="module")
def pipe():
    return StreamR1Pipeline.from_pretrained("tiny")


def test_a_call_is_the_beginning_of_the_stream(pipe):
    stream = pipe.stream(PROMPTS, seed=7)
    assert torch.equal(
        torch.stack([next(stream) for _ in range(20)], 1), pipe(PROMPTS, seconds=20 / 16, seed=7)
    )
    assert torch.equal(pipe(PROMPTS, 1, seed=7), pipe(PROMPTS, 2, seed=7)[:, :16])
    assert not torch.equal(pipe(PROMPTS, 1, seed=7), pipe(PROMPTS, 1, seed=8))


def test_frames_arrive_before_the_clip_is_complete(pipe):
    stream, made = pipe.stream(PROMPTS[0]), []
    original = stream.blocks.cache.begin_block
    stream.blocks.cache.begin_block = lambda frames: (made.append(frames), original(frames))[1]
    for _ in range(9):
        next(stream)
    assert made == [3]  # one block, nine frames
    next(stream)
    assert made == [3, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"steps": (1000, 500)},
        {"frames_per_block": 2},
        {"context_noise": 100.0},
        {"cache": CacheConfig(sink="none", window_frames=6)},
        {"cache": CacheConfig(window_frames=None, max_frames=30)},
    ],
)
def test_a_folder_keeps_all_that_changes_a_video(pipe, change, tmp_path):
    changed = replace(pipe, sampler=replace(pipe.sampler, **change), fps=8)
    changed.save_pretrained(tmp_path)
    back = StreamR1Pipeline.from_pretrained(tmp_path)
    assert back.fps == 8 and all(
        getattr(back.sampler, name) == value for name, value in change.items()
    )
    made = back(PROMPTS, 6)
    assert torch.equal(made, changed(PROMPTS, 6)) and not torch.equal(made, pipe(PROMPTS, 3))


def test_damaged_folders_are_named(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors .*truncated"):
        StreamR1Pipeline.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model.safetensors"):
        StreamR1Pipeline.from_pretrained(tmp_path)
    (tmp_path / "transformer" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        StreamR1Pipeline.from_pretrained(tmp_path)


def test_switching_needs_as_many_sentences_as_clips(pipe):
    stream = pipe.stream(PROMPTS)
    with pytest.raises(
        ValueError, match="prompts: expected 2, as many as the stream has clips, got 1"
    ):
        stream.switch_prompt("a red 3 moving left")
    before = stream.prompts
    with pytest.raises(ValueError, match="got .'purple'"):
        stream.switch_prompt(["a purple 3 moving left"] * 2)
    assert stream.prompts == before and next(stream).shape == (2, 3, 32, 32)


def test_presets_are_shipped():
    assert set(PRESETS) == {"tiny", "tiny-start"} and "wan-1.3b" in RUNS
    a, b = (StreamR1Pipeline.from_pretrained(name).sampler.net.head.head.weight for name in PRESETS)
    assert not torch.equal(a, b)


def test_player_runs_and_stops(pipe):
    player = Player(pipe, enlarge=1)
    seen = []
    player.image.observe(
        lambda change: (seen.append(1), len(seen) == 3 and setattr(player.playing, "value", False)),
        "value",
    )
    player.playing.value = True  # starts a thread
    for _ in range(200):
        if len(seen) >= 3 and not player.playing.value:
            break
        time.sleep(0.05)
    assert len(seen) >= 3 and not player.playing.value
