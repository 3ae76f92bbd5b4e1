"""The shipped teacher, and a training that is killed."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from streamr1_ref.tiny.codec import load_codec
from streamr1_ref.tiny.metrics import Oracle, judge
from streamr1_ref.tiny.teacher import (
    TeacherConfig,
    TextToLatents,
    load_teacher,
    train_teacher,
    training_batch,
)
from streamr1_ref.tiny.world import caption_split
from streamr1_ref.transformer import WanConfig
from streamr1_ref.utils.files import data_path, load_tensors, save_tensors
from streamr1_ref.utils.runtime import seeded

NET = "WanConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=1)"
RUN = (
    "import sys, torch; torch.set_num_threads(1)\nfrom streamr1_ref.teacher import *\nfrom streamr1_ref.transformer import WanConfig\n"
    f"train_teacher(TeacherConfig(steps=60, batch=1, save_every=7), sys.argv[1], net={NET}, progress=False)"
)


def test_killed_and_resumed_training_ends_with_the_same_bits(tmp_path):
    """SIGKILL at a moment nobody chose, several times; the weights and the record are those of a training in one go."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([sys.executable, "-c", RUN, str(whole)], check=True)
    kills = 0
    for patience in (9, 31, 0):
        process = subprocess.Popen([sys.executable, "-c", RUN, str(killed)])
        log = killed / "log.jsonl"
        while (
            patience
            and process.poll() is None
            and not (log.exists() and len(log.read_text().splitlines()) >= patience)
        ):
            time.sleep(0.01)
        if patience and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 1 and process.returncode == 0
    a, b = (load_tensors(f / "checkpoint.safetensors")[0] for f in (whole, killed))
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert (whole / "log.jsonl").read_text() == (killed / "log.jsonl").read_text()


def test_a_damaged_checkpoint_is_refused(tmp_path):
    cfg, net = (
        TeacherConfig(steps=2, batch=1, save_every=1),
        WanConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=1),
    )
    train_teacher(cfg, tmp_path, net=net, progress=False)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated"):
        train_teacher(cfg, tmp_path, net=net, progress=False)


def test_other_settings_are_refused_before_work(tmp_path):
    net = WanConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=1)
    train_teacher(TeacherConfig(steps=1, batch=1, save_every=1), tmp_path, net=net, progress=False)
    before = (tmp_path / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="was made with"):
        train_teacher(
            TeacherConfig(steps=1, batch=1, save_every=1, lr=1.0), tmp_path, net=net, progress=False
        )
    assert (tmp_path / "log.jsonl").read_text() == before


def test_shipped_teacher_fits_its_limits():
    path = data_path("tiny_teacher.safetensors")
    assert path.stat().st_size < 8 * 2**20
    tensors, metadata = load_tensors(path)
    assert {t.dtype for t in tensors.values()} == {torch.float16} and all(
        t.isfinite().all() for t in tensors.values()
    )
    assert json.loads(metadata["training"])["seed"] == TeacherConfig().seed
    assert sum(t.numel() for t in tensors.values()) == sum(
        p.numel() for p in TextToLatents().parameters()
    )


def test_shipped_teacher_obeys():
    """A small sample with its own seed; the full table is in the chapter. 24 clips, so the bounds are wide."""
    teacher, captions = load_teacher(), caption_split()[1][3::11]
    latents = teacher.sample([str(c) for c in captions], seeded(77), num_steps=16)
    values = judge(Oracle(), teacher.codec.decode(latents), captions)
    assert values["colour"] >= 0.95 and values["digit"] >= 0.65 and values["motion_error"] < 0.9


def test_batches_never_show_heldout_captions():
    codec, (train, heldout) = load_codec(data_path("tiny_codec.safetensors")), caption_split()
    shown = {
        sentence
        for step in range(0, 40, 8)
        for sentence in training_batch(TeacherConfig(batch=8), step, codec, train)[3]
    }
    assert (
        len(shown) > 20 and shown <= {"", *map(str, train)} and shown.isdisjoint(map(str, heldout))
    )


def test_misfits_of_a_teacher_file_are_named(tmp_path):
    tensors, metadata = load_tensors(data_path("tiny_teacher.safetensors"))
    del tensors["text.embedding.weight"]
    path = save_tensors(tmp_path / "t.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match="missing text.embedding.weight"):
        load_teacher(path)
