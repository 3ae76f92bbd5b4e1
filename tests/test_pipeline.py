"""The pipeline: calls begin streams, folders hold all that changes a video, damage is named."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import pytest
import torch

from streamr1_ref.cache import CacheConfig
from streamr1_ref.pipeline import PARTS, PRESETS, StreamR1Pipeline
from streamr1_ref.tiny.player import Player
from streamr1_ref.training.presets import PRESETS as RUNS
from streamr1_ref.utils.files import read_config, write_config

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

    def begin_block(frames):
        made.append(frames)
        original(frames)

    stream.blocks.cache.begin_block = begin_block
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
        {"context_lookup": "nearest"},
        {"cache": CacheConfig(sink="none", window_frames=6)},
        {"cache": CacheConfig(window_frames=None, max_frames=30)},
    ],
)
def test_a_folder_keeps_all_that_changes_a_video(pipe, change, tmp_path):
    changed = replace(pipe, sampler=replace(pipe.sampler, **change), fps=8)
    changed.save_pretrained(tmp_path)
    back = StreamR1Pipeline.from_pretrained(tmp_path)
    assert back.fps == 8 and back.sampler.config == changed.sampler.config != pipe.sampler.config
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


def test_switching_needs_as_many_prompts_as_clips(pipe):
    stream = pipe.stream(PROMPTS)
    with pytest.raises(
        ValueError, match="prompts: expected 2, as many as the stream has clips, got 1"
    ):
        stream.switch_prompt("a red 3 moving left")
    before = stream.prompts
    with pytest.raises(ValueError, match="got .'purple'"):
        stream.switch_prompt(["a purple 3 moving left"] * 2)
    assert stream.prompts == before and next(stream).shape == (2, 3, 32, 32)


def test_folders_of_the_first_edition_load(pipe, tmp_path):
    """They do not name the classes of their parts."""
    index = pipe.save_pretrained(tmp_path) / "model_index.json"
    write_config(index, {"_class_name": "StreamR1Pipeline", "fps": 16})
    assert torch.equal(StreamR1Pipeline.from_pretrained(tmp_path)(PROMPTS, 1), pipe(PROMPTS, 1))


class EveryPrompt:
    """A text encoder to which all prompts are one; it counts how often it was written."""

    def __init__(self, value=0.5, saved=0):
        self.value, self.saved = value, saved

    def __call__(self, prompts):
        return torch.full((len(prompts), 2, 64), self.value)

    def save(self, folder):
        write_config(folder / "own.json", {"value": self.value, "saved": self.saved + 1})

    @classmethod
    def load(cls, folder):
        return cls(**read_config(folder / "own.json"))


class HalfSize:
    """A codec of another library, so to say: it cannot write itself."""

    channels, time_stride, space_stride = 16, 4, 4

    def __init__(self, inner):
        self.inner = inner

    def stream_decoder(self):
        decode = self.inner.stream_decoder()
        return lambda latents: decode(latents)[..., ::2, ::2]


class HalfSizeFiles:
    @staticmethod
    def save(part, folder):
        part.inner.save(folder / "inner")

    @staticmethod
    def load(folder):
        return HalfSize(type(StreamR1Pipeline.from_pretrained("tiny").codec).load(folder / "inner"))


def test_a_part_of_ones_own_is_saved_by_registering_it(pipe, tmp_path, monkeypatch):
    own = StreamR1Pipeline(pipe.sampler, EveryPrompt(0.25), HalfSize(pipe.codec))
    with pytest.raises(TypeError, match="text_encoder: expected a part registered in PARTS"):
        own.save_pretrained(tmp_path / "x")
    monkeypatch.setitem(PARTS, "EveryPrompt", f"{__name__}:EveryPrompt")
    with pytest.raises(TypeError, match="vae: .* got HalfSize"):
        own.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    monkeypatch.setitem(PARTS, "HalfSize", f"{__name__}:HalfSizeFiles")
    back = StreamR1Pipeline.from_pretrained(own.save_pretrained(tmp_path / "x"))
    assert (back.text.value, back.text.saved) == (0.25, 1)
    made = back("anything", 1)
    assert made.shape == (1, 16, 3, 16, 16) and torch.equal(made, own("anything", 1))


def test_a_namesake_of_a_registered_class_is_refused(pipe, tmp_path):
    namesake = type("WordEncoder", (EveryPrompt,), {})()
    with pytest.raises(TypeError, match="text_encoder: .* got WordEncoder"):
        StreamR1Pipeline(pipe.sampler, namesake, pipe.codec).save_pretrained(tmp_path / "x")


def test_a_file_never_chooses_what_is_imported(pipe, tmp_path):
    (tmp_path / "evil_part.py").write_text("raise SystemExit('imported')")
    folder = pipe.save_pretrained(tmp_path / "x")
    for name in ("evil_part:Evil", "evil_part", "os:system", "streamr1_ref.tiny.text:WordEncoder"):
        index = json.loads((folder / "model_index.json").read_text())
        write_config(folder / "model_index.json", index | {"text_encoder": name})
        with pytest.MonkeyPatch.context() as patched:
            patched.syspath_prepend(str(tmp_path))
            with pytest.raises(ValueError, match=f"part: {name} is not registered"):
                StreamR1Pipeline.from_pretrained(folder)
    assert "evil_part" not in sys.modules


IMPORTS = """
import sys
import streamr1_ref.MODULE
heavy = {"ipywidgets", "IPython", "matplotlib", "av", "PIL", "sklearn"} & set(sys.modules)
rooms = [m for m in sys.modules if m.startswith(("streamr1_ref.tiny.", "streamr1_ref.wan."))]
assert not heavy and not rooms, (heavy, rooms)
from streamr1_ref.utils.runtime import progress
list(progress(range(2), "steps", show=False))
assert not {"ipywidgets", "IPython"} & set(sys.modules)
"""


@pytest.mark.parametrize("module", ["pipeline", "transformer", "rollout", "dmd", "objective"])
def test_imports_bring_in_neither_widgets_nor_rooms(module):
    subprocess.run([sys.executable, "-c", IMPORTS.replace("MODULE", module)], check=True)


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


def test_settings_of_another_cache_are_refused_before_anything_is_written(pipe, tmp_path):
    @dataclass(frozen=True)
    class OtherConfig(CacheConfig):
        extra: int = 1

    other = replace(pipe, sampler=replace(pipe.sampler, cache=OtherConfig()))
    with pytest.raises(TypeError, match="cache: expected a CacheConfig, .* got OtherConfig"):
        other.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
