"""Runs as processes: killed and resumed, two ranks and one, damaged files, Ctrl-C, lost ranks."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import tyro
from PIL import Image, ImageChops

import streamr1_ref.cli.train as cli
from streamr1_ref.objective import DistillationConfig, DistillationMethod
from streamr1_ref.tiny.models import tiny_models
from streamr1_ref.tiny.world import caption_split
from streamr1_ref.training import distributed
from streamr1_ref.training.checkpoint import newest, optimizer_numbers
from streamr1_ref.training.distributed import start_processes
from streamr1_ref.training.presets import PRESETS, distillation_trainer
from streamr1_ref.training.trainer import Trainer
from streamr1_ref.wan.build import compile_blocks

SMALL = [
    "--save-every",
    "2",
    "--distillation.micro-batch-size",
    "1",
    "--distillation.frames",
    "3",
    "--distillation.critic-steps",
    "1",
    "--distillation.micro-batches",
    "2",
    "--distillation.exit-group",
    "2",
]
CLI = [sys.executable, "-m", "streamr1_ref.cli.main", "train", "tiny", *SMALL]
FIVE = ["--max-steps", "5"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
pytestmark = pytest.mark.xdist_group("train")  # one worker: `whole` is made once
PROMPTS = [str(c) for c in caption_split()[0]]


def run(command, **options):
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300, **options)


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def checkpoint_tensors(folder):
    """All that a checkpoint holds, as one process reads it."""
    cfg = replace(
        PRESETS["tiny"],
        distillation=DistillationConfig(
            micro_batch_size=1, frames=3, critic_steps=1, micro_batches=2, exit_group=2
        ),
    )
    trainer = distillation_trainer(tiny_models(), PROMPTS, cfg, folder)
    assert trainer.resume() == []
    return trainer.step_count, trainer.tensors()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    done = run([*CLI, *FIVE, "--out", str(folder)])
    assert done.returncode == 0, done.stderr
    return folder


def test_killed_at_a_random_moment_and_resumed_bit_for_bit(whole, tmp_path):
    seed = int(os.environ.get("STREAMR1_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(
        f"to kill at the same step again: STREAMR1_TEST_SEED={seed}"
    )  # pytest shows it if this test fails
    wanted = random.Random(seed).choice([2, 3, 4])  # there is a checkpoint, or one is being written
    process = subprocess.Popen(
        [*CLI, *FIVE, "--out", str(tmp_path)],
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / "log.jsonl").exists() and len(
            (tmp_path / "log.jsonl").read_text().splitlines()
        ) >= wanted:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (tmp_path / "pipeline").exists()
    resumed = run([*CLI, *FIVE, "--out", str(tmp_path), "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    (step, ours), (_, theirs) = checkpoint_tensors(tmp_path), checkpoint_tensors(whole)
    assert step == 5 and all(torch.equal(ours[name], theirs[name]) for name in theirs), (
        f"killed after step {wanted}"
    )
    assert log(tmp_path) == log(whole)
    weights = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (whole / weights).read_bytes()


def test_two_processes_are_one_and_one_goes_on_where_two_stopped(whole, tmp_path):
    done = run([*TORCHRUN, *CLI[1:], "--max-steps", "4", "--out", str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, theirs in zip(log(tmp_path), log(whole)):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), (
                ours["step"],
                name,
            )
    alone = run([*CLI, *FIVE, "--out", str(tmp_path), "--resume"])
    assert alone.returncode == 0, alone.stderr
    assert len(log(tmp_path)) == 5
    assert log(tmp_path)[4]["loss"] == pytest.approx(log(whole)[4]["loss"], rel=1e-5)
    (_, ours), (_, theirs) = checkpoint_tensors(tmp_path), checkpoint_tensors(whole)
    emas = [name for name in theirs if name.startswith("ema.")]
    assert emas and all(((ours[name] - theirs[name]).abs() < 1e-4).all() for name in emas)


def test_a_rank_that_dies_stops_the_others_and_torchrun_resumes(whole, tmp_path):
    """Rank 1 is killed twice. That ends the run and names the rank; --max-restarts goes on."""
    script = tmp_path / "dies.py"
    script.write_text(f"""
import os, signal, sys
from pathlib import Path
from streamr1_ref.cli import main as cli
from streamr1_ref.training import trainer as train
deaths, original = Path({str(tmp_path / "deaths")!r}), train.Trainer.advance
def advance(self):
    count = int(deaths.read_text()) if deaths.exists() else 0
    if self.rank == 1 and self.step_count == 3 and count < 2:
        deaths.write_text(str(count + 1))
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self)
train.Trainer.advance = advance
args = [*{SMALL + FIVE!r}, "--out", {str(tmp_path / "run")!r}, "--resume"]
sys.exit(cli.main(["train", "tiny", *args]))
""")
    done = run([*TORCHRUN, str(script)])
    assert (
        done.returncode != 0 and "SIGKILL" in done.stderr and re.search(r"rank\s*: 1", done.stderr)
    ), done.stderr[-3000:]
    done = run([*TORCHRUN, "--max-restarts", "1", str(script)])
    assert done.returncode == 0 and (tmp_path / "deaths").read_text() == "2", done.stderr[-3000:]
    assert [r["step"] for r in log(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert log(tmp_path / "run")[4]["loss"] == pytest.approx(log(whole)[4]["loss"], rel=1e-5)


def test_trouble_in_one_rank_is_everyones(tmp_path):
    """Rank 1's reward model breaks at its second step: all skip that step, nobody waits."""
    script = tmp_path / "trouble.py"
    script.write_text(f"""
import sys
from streamr1_ref import objective
from streamr1_ref.cli import main as cli
original = objective.judge_rollouts
def judge_rollouts(model, codec, latents, prompts, cfg):
    import torch.distributed as dist
    judge_rollouts.calls += 1
    if dist.get_rank() == 1 and judge_rollouts.calls == 2:
        raise FloatingPointError("reward: MQ is not finite for clip 0")
    return original(model, codec, latents, prompts, cfg)
judge_rollouts.calls = 0
objective.judge_rollouts = judge_rollouts
args = [*{SMALL!r}, "--max-steps", "3", "--out", {str(tmp_path / "run")!r}]
sys.exit(cli.main(["train", "tiny", *args]))
""")
    done = run([*TORCHRUN, str(script)])
    assert done.returncode == 0, done.stderr[-3000:]
    records = log(tmp_path / "run")
    assert ["skipped" in r for r in records] == [
        False,
        True,
        False,
    ] and "another process" in records[1]["skipped"]


def test_any_exception_in_one_rank_ends_all_with_its_message(tmp_path):
    """Rank 1's disk is full in its second update; rank 0, which waits for it, is told."""
    script = tmp_path / "full.py"
    script.write_text(f"""
import sys, time
from streamr1_ref import objective
from streamr1_ref.cli import main as cli
from streamr1_ref.training import distributed
original = objective.judge_rollouts
def judge_rollouts(*args):
    import torch.distributed as dist
    if dist.get_rank() == 1:
        raise OSError("no space left on the disk")
    return original(*args)
anywhere = distributed.anywhere
def waits(mesh, flag):
    waits.calls += 1
    if mesh.get_rank() == 0 and waits.calls == 2:
        time.sleep(600)  # as a collective operation of NCCL would
    return anywhere(mesh, flag)
waits.calls = 0
objective.judge_rollouts, distributed.anywhere = judge_rollouts, waits
args = [*{SMALL!r}, "--max-steps", "3", "--out", {str(tmp_path / "run")!r}]
sys.exit(cli.main(["train", "tiny", *args]))
""")
    began = time.monotonic()
    done = run([*TORCHRUN, str(script)])
    assert done.returncode != 0 and time.monotonic() - began < 120
    assert "streamr1: no space left on the disk" in done.stderr, done.stderr[-3000:]


def test_a_waiting_process_is_told_what_ended_the_run(tmp_path):
    """Without torchrun's watch over its workers, too: the message travels through the store."""
    script = tmp_path / "alone.py"
    script.write_text("""
import os, sys, time
from streamr1_ref.training.distributed import all_or_none, start_processes
mesh = start_processes(timeout=5)
try:
    with all_or_none(mesh, grace=0.1):
        if mesh.get_rank() == 1:
            raise MemoryError("out of memory")
        time.sleep(600)
except MemoryError:
    time.sleep(600)  # a process that does not die of its exception
""")
    ports = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**ENV, **ports, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, said = both[0].communicate(timeout=120)
    finally:
        for process in both:
            process.kill()
    assert (
        both[0].returncode == 1
        and "streamr1: stopped by process 1: MemoryError: out of memory" in said
    ), said


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_every_rank_reads_its_own_files_and_makes_its_own_pictures(tmp_path):
    """Each rank computes checksums of its own files and makes its share of the pictures."""
    script = tmp_path / "reads.py"
    script.write_text(f"""
import os, sys
from pathlib import Path
from streamr1_ref.cli import main as cli
from streamr1_ref import objective
from streamr1_ref.training import checkpoint
rank, folder = os.environ["RANK"], Path({str(tmp_path)!r})
checksum, sample, made = checkpoint.checksum, objective.DistillationMethod.sample, []
def noted(path):
    with (folder / f"read-{{rank}}").open("a") as file: file.write(path.name + "\\n")
    return checksum(path)
def counted(self, number):
    made.append(str(number))
    (folder / f"made-{{rank}}").write_text(" ".join(made))
    return sample(self, number)
checkpoint.checksum, objective.DistillationMethod.sample = noted, counted
args = [*{SMALL!r}, "--max-steps", "2", "--sample-every", "2", *sys.argv[1:]]
sys.exit(cli.main(["train", "tiny", *args, "--out", {str(tmp_path / "run")!r}]))
""")
    done = run([*TORCHRUN, str(script)])
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((tmp_path / f"read-{rank}").read_text().split() for rank in range(2))
    assert len(first) == len(second) == 1 and first != second, (first, second)
    assert [(tmp_path / f"made-{rank}").read_text() for rank in range(2)] == ["0 2", "1 3"]
    for rank in range(2):
        (tmp_path / f"read-{rank}").unlink()
    done = run([*TORCHRUN, str(script), "--resume"])
    assert done.returncode == 0, done.stderr[-3000:]
    shares = [(tmp_path / f"read-{rank}").read_text().split() for rank in range(2)]
    assert [len(share) for share in shares] == [1, 1] and shares[0] != shares[1], shares
    one = run([*CLI, "--max-steps", "2", "--sample-every", "2", "--out", str(tmp_path / "one")])
    assert one.returncode == 0, one.stderr
    a, b = (Image.open(tmp_path / name / "samples" / "step-000002.png") for name in ("run", "one"))
    assert (
        a.size == b.size and ImageChops.difference(a, b).getextrema()[0][1] <= 2
    )  # the same pictures


def test_the_timeout_is_the_one_that_was_set(monkeypatch):
    asked = {}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(
        distributed.dist, "rendezvous", lambda url: iter([(distributed.dist.HashStore(), 0, 1)])
    )
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda *args, **kwargs: asked.update(kwargs)
    )
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(distributed, "init_device_mesh", lambda kind, shape: None)
    start_processes(timeout=7)
    assert asked["timeout"] == timedelta(minutes=7)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_sigterm_saves_as_ctrl_c_does(tmp_path, number, code):
    process = subprocess.Popen(
        [*CLI, "--max-steps", "500", "--save-every", "500", "--out", str(tmp_path)],
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (
        not (tmp_path / "log.jsonl").exists() or len(log(tmp_path)) < 2
    ):
        time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    saved = newest(tmp_path)[0]
    assert (
        process.returncode == code
        and saved is not None
        and saved.name == f"step-{len(log(tmp_path)):06d}"
    )
    assert f"interrupted by {number.name}; saved {saved}" in said, said


def test_fused_adam_resumes_where_it_was(tmp_path):
    """Its counters live on the parameters' device; its steps are the plain one's up to rounding."""
    runs = {
        fused: trainer_in(tmp_path / str(fused), max_steps=2, save_every=1, fused=fused)
        for fused in (False, True)
    }
    for trainer in runs.values():
        trainer.train(progress=False)
    again = trainer_in(tmp_path / "True", max_steps=2, fused=True)
    again.resume()
    for role, net in again.method.roles.items():
        assert optimizer_numbers(net, again.optimizers[role]) == {"step": 2.0}
    for name, value in again.tensors().items():
        assert torch.equal(value, runs[True].tensors()[name]), name
    assert again.advance()["loss"] == pytest.approx(runs[False].advance()["loss"], rel=1e-3)


def test_compiled_layers_train_the_same_weights(tmp_path):
    """torch.compile inside activation checkpointing, of all three networks; traced only."""
    losses = []
    for compiled in (False, True):
        trainer = trainer_in(tmp_path / str(compiled), max_steps=2, checkpointing=True)
        if compiled:
            for net in (
                trainer.method.models.student,
                trainer.method.models.critic,
                trainer.method.models.teacher,
            ):
                compile_blocks(net, "aot_eager")
        losses.append([r["loss"] for r in trainer.train(progress=False)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(whole, tmp_path):
    trainer = trainer_in(tmp_path, max_steps=3, save_every=1)
    trainer.train(progress=False)
    newest_one = tmp_path / "checkpoints" / "step-000003"
    shard = next(newest_one.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    again = trainer_in(tmp_path, max_steps=3, save_every=1)
    problems = again.resume()
    assert (
        again.step_count == 2
        and "step-000003 is damaged" in problems[0]
        and shard.name in problems[0]
    )
    again.train(progress=False)
    assert [r["step"] for r in log(tmp_path)] == [1, 2, 3] and newest(tmp_path)[0] == newest_one
    for checkpoint in tmp_path.glob("checkpoints/*"):
        (checkpoint / "state.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        trainer_in(tmp_path, max_steps=3).resume()


def trainer_in(folder, **settings):
    cfg = replace(
        PRESETS["tiny"],
        distillation=DistillationConfig(micro_batch_size=1, frames=3, critic_steps=1),
        **settings,
    )
    return distillation_trainer(tiny_models(), PROMPTS, cfg, folder)


def test_half_written_checkpoints_are_not_seen(tmp_path):
    trainer = trainer_in(tmp_path, max_steps=1)
    trainer.train(progress=False)
    half = tmp_path / "checkpoints" / "step-000002.partial"
    half.mkdir()
    (half / "shard.safetensors").write_bytes(b"half")
    again = trainer_in(tmp_path, max_steps=2)
    assert again.resume() == [] and again.step_count == 1
    again.train(progress=False)
    assert not half.exists() and newest(tmp_path)[0].name == "step-000002"


def test_ctrl_c_saves_and_exits_cleanly(tmp_path):
    process = subprocess.Popen(
        [*CLI, "--max-steps", "500", "--save-every", "400", "--out", str(tmp_path)],
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        (tmp_path / "log.jsonl").exists() and (tmp_path / "log.jsonl").read_text().count("\n") >= 2
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "interrupted" in err
    saved, _ = newest(tmp_path)
    assert saved is not None and int(saved.name[-6:]) == len(log(tmp_path))


def test_broken_student_stops_with_step_and_checkpoint(whole, tmp_path):
    trainer = trainer_in(tmp_path, max_steps=4, save_every=1)
    trainer.train(progress=False)
    broken = trainer_in(tmp_path, max_steps=6)
    broken.resume()
    next(broken.method.models.student.parameters()).data.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError,
        match="student: its weights are not finite, at step 5; last good checkpoint: .*step-000004",
    ):
        broken.train(progress=False)


def test_gives_up_after_skips_in_a_row(tmp_path):
    trainer = trainer_in(tmp_path, max_steps=9, max_skipped=3)
    axes = trainer.method.models.reward.axes
    trainer.method.models.reward = lambda pixels, prompts: {
        a: pixels.sum((1, 2, 3, 4)) * float("nan") for a in axes
    }
    trainer.method.models.reward.axes = axes
    with pytest.raises(
        FloatingPointError,
        match="3 steps in a row, the last because of step 3: .*not finite.*checkpoint: none",
    ):
        trainer.train(progress=False)
    assert trainer.skipped == 3


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--distillation.student-lr", "1"], "distillation.student_lr: 1.0, 0.0001"),
        (["--weighting.beta", "1"], "weighting.beta: 1.0, 2.0"),
    ],
)
def test_other_settings_are_refused(whole, wrong, message):
    done = run([*CLI, *FIVE, "--out", str(whole), "--resume", *wrong])
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_user_errors_before_training(whole, tmp_path):
    again = run([*CLI, "--out", str(whole)])
    assert again.returncode == 2 and "go on with --resume" in again.stderr
    (tmp_path / "file").write_text("")
    blocked = run([*CLI, "--out", str(tmp_path / "file")])
    assert (
        blocked.returncode == 2
        and "out: expected a folder that can be written" in blocked.stderr
        and "Traceback" not in blocked.stderr
    )


def test_tensorboard_gets_every_step_once(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer_in(tmp_path, max_steps=1, trackers=("tensorboard",)).train(progress=False)
    again = trainer_in(tmp_path, max_steps=2, trackers=("tensorboard",))
    again.resume()
    again.train(progress=False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"VQ", "MQ", "TA", "critic", "weight", "ess"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("loss")] == [1, 2]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="tensorboard: not installed .*pip install tensorboard"):
        trainer_in(tmp_path / "b", max_steps=1, trackers=("tensorboard",)).train(progress=False)


def test_a_full_disk_is_found_before_training(tmp_path, monkeypatch):
    from streamr1_ref.utils import files

    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"out: expected \d+ MB free for .*, there are 1 MB"):
        cli.train(cli.TinyTrainConfig(out=str(tmp_path / "run")))
    assert not list((tmp_path / "run").iterdir())


def test_uneven_processes_are_refused():
    class Mesh:
        device_type = "cpu"

        def get_rank(self):
            return 0

        def size(self):
            return 2

    cfg = replace(
        PRESETS["tiny"],
        distillation=DistillationConfig(micro_batch_size=1, micro_batches=3, exit_group=2),
    )
    with pytest.raises(
        ValueError, match="micro_batches: expected a multiple of the 2 processes, got 3"
    ):
        distillation_trainer(tiny_models(), PROMPTS, cfg, "nowhere", Mesh())
    with pytest.raises(
        ValueError, match="exit_group: expected a multiple of the 2 processes, got 1"
    ):
        distillation_trainer(
            tiny_models(),
            PROMPTS,
            replace(cfg, distillation=DistillationConfig(micro_batches=4)),
            "nowhere",
            Mesh(),
        )


def test_accumulated_gradient_is_the_mean_of_the_micro_batches():
    cfg = DistillationConfig(
        micro_batch_size=1, frames=3, micro_batches=3, critic_steps=0, clip_norm=1e9
    )
    run = DistillationMethod(tiny_models(), PROMPTS, cfg=cfg)
    parts, trainer = [], Trainer(run)
    for batch in range(3):
        loss, _ = run.loss("student", batch)
        parts.append(torch.autograd.grad(loss, list(run.models.student.parameters())))
    trainer.optimizers["student"].step = lambda: None
    trainer.step()
    for p, *grads in zip(run.models.student.parameters(), *parts):
        assert torch.allclose(p.grad, sum(grads) / 3, atol=1e-6)


def test_an_attention_kernel_that_cannot_run_here_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "advance", lambda self: pytest.fail("a step was taken"))
    run_of = cli.TinyTrainConfig(
        **vars(PRESETS["tiny"]) | {"attention": "flash", "out": str(tmp_path / "run")}
    )
    with pytest.raises(
        ValueError, match="backend: flash needs an NVIDIA GPU, the network is on cpu"
    ):
        cli.train(run_of)


def test_a_preset_on_the_command_line_sets_the_defaults_and_flags_win():
    args = [
        "wan-1.3b",
        "--preset",
        "stream-r1",
        "--teacher",
        "weights/wan-1.3b",
        "--distillation.guidance-scale",
        "4",
    ]
    made = tyro.cli(cli.train_command(args).__annotations__["run"], args=args)
    assert (
        made.preset == "stream-r1"
        and made.teacher == "weights/wan-1.3b"
        and made.critic == "weights/wan-1.3b"
    )
    assert (
        made.distillation == PRESETS["stream-r1"].distillation
        and made.weighting.saliency == "published"
    )


def test_processes_of_a_machine_load_one_after_the_other(tmp_path):
    script = tmp_path / "turns.py"
    script.write_text("""
import sys, time
import torch.distributed as dist
from streamr1_ref.training.distributed import in_turn, start_processes
mesh = start_processes()
with in_turn(mesh):
    began = time.time()
    time.sleep(0.5)
    ended = time.time()
open(f"{sys.argv[1]}/turn-{mesh.get_rank()}", "w").write(f"{began} {ended}")
dist.destroy_process_group()
""")
    done = run([*TORCHRUN, str(script), str(tmp_path)])
    assert done.returncode == 0, done.stderr[-2000:]
    (_, first), (second, _) = (
        map(float, (tmp_path / f"turn-{rank}").read_text().split()) for rank in range(2)
    )
    assert first <= second


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"ema_roles": ("pupil",)}, "keeps an EMA of pupil, .* a network: student, critic"),
        ({"updates": lambda self, step: ("judge",)}, "step 0 of Wrong updates judge, expected"),
        ({"roles": property(lambda self: {}, lambda self, value: None)}, "no network to train"),
    ],
)
def test_a_method_whose_names_do_not_match_is_refused(wrong, message):
    method = type("Wrong", (DistillationMethod,), wrong)(tiny_models(), PROMPTS)
    with pytest.raises(ValueError, match=message):
        Trainer(method)
