"""The shipped teacher, and the batches of its training."""

import json

import pytest
import torch

from streamr1_ref.tiny.codec import load_codec
from streamr1_ref.tiny.metrics import Oracle, judge
from streamr1_ref.tiny.teacher import TeacherConfig, TextToLatents, load_teacher, training_batch
from streamr1_ref.tiny.world import caption_split
from streamr1_ref.utils.files import data_path, load_tensors, save_tensors
from streamr1_ref.utils.runtime import seeded


def test_shipped_teacher_fits_its_limits():
    path = data_path("tiny_teacher.safetensors")
    assert path.stat().st_size < 8 * 2**20
    tensors, metadata = load_tensors(path)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert all(t.isfinite().all() for t in tensors.values())
    assert json.loads(metadata["training"])["seed"] == TeacherConfig().seed
    numbers = sum(p.numel() for p in TextToLatents().parameters())
    assert sum(t.numel() for t in tensors.values()) == numbers


def test_shipped_teacher_obeys():
    """A small sample with its own seed; 24 clips, so the bounds are wide."""
    teacher, captions = load_teacher(), caption_split()[1][3::11]
    latents = teacher.sample([str(c) for c in captions], seeded(77), num_steps=16)
    values = judge(Oracle(), teacher.codec.decode(latents), captions)
    assert values["colour"] >= 0.95 and values["digit"] >= 0.65 and values["motion_error"] < 0.9


def test_batches_never_show_heldout_captions():
    codec, (train, heldout) = load_codec(data_path("tiny_codec.safetensors")), caption_split()
    shown = set()
    for step in range(0, 40, 8):
        shown |= set(training_batch(TeacherConfig(batch=8), step, codec, train).prompts)
    assert len(shown) > 20 and shown <= {"", *map(str, train)}
    assert shown.isdisjoint(map(str, heldout))


def test_misfits_of_a_teacher_file_are_named(tmp_path):
    tensors, metadata = load_tensors(data_path("tiny_teacher.safetensors"))
    del tensors["text.embedding.weight"]
    path = save_tensors(tmp_path / "t.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match="missing text.embedding.weight"):
        load_teacher(path)
