"""The command line as a process: exit codes, one line for a person's mistakes, the demo's files."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from streamr1_ref.cli.main import COMMANDS, about, load_command, main
from streamr1_ref.utils.files import load_tensors
from streamr1_ref.utils.video import read_mp4

PROGRAM = [sys.executable, "-m", "streamr1_ref.cli.main"]


def streamr1(*args):
    return subprocess.run([*PROGRAM, *map(str, args)], capture_output=True, text=True)


def same_files(a, b):
    """Whether two files say the same; the order of a safetensors file's metadata is not fixed."""
    if a.suffix != ".safetensors":
        return a.read_bytes() == b.read_bytes()
    (ours, about_ours), (theirs, about_theirs) = load_tensors(a), load_tensors(b)
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    return same and about_ours == about_theirs


def test_demo_writes_the_same_files_twice(tmp_path):
    small = ("--steps", 1, "--seconds", 1, "--count", 2, "--captions", 8)
    for name in ("a", "b"):
        done = streamr1("demo", "--out", tmp_path / name, *small)
        assert done.returncode == 0, done.stderr
    assert "motion_error" in done.stdout and "stream-r1.mp4" in done.stdout
    clip, fps = read_mp4(tmp_path / "a" / "stream-r1.mp4")
    assert clip.shape[0] == 16 and fps == 16
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert len(files) >= 10
    for file in files:
        assert same_files(tmp_path / "a" / file, tmp_path / "b" / file), file
    rows = json.loads((tmp_path / "a" / "metrics.json").read_text())["rows"]
    assert rows["DMD"] != rows["before"] != rows["Stream-R1"] != rows["DMD"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_readable(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stop.value.code == 0 and "usage: streamr1" in out
    assert about(command)[:40] in out
    assert about(command) == load_command(command).__doc__.splitlines()[0]


def test_presets_have_their_own_help(capsys):
    with pytest.raises(SystemExit):
        main(["train", "tiny", "--help"])
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())  # without frames
    for text in ("--resume", "--distillation.student-lr", "--weighting.beta", "(default: 40)"):
        assert text in out


def test_the_list_of_commands_loads_no_large_library():
    script = """
import sys
from streamr1_ref.cli.main import main
try:
    main(["--help"])
except SystemExit:
    large = {"torch", "matplotlib", "av", "diffusers", "transformers"}
    print("loaded:", sorted(large & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "loaded: []", done.stderr
    assert all(f"• {command} " in done.stdout for command in COMMANDS)


def test_mistakes_end_with_one_line_and_code_2(tmp_path):
    (tmp_path / "file").write_text("")
    for args in (
        ("demo", "--out", tmp_path / "file"),
        ("demo", "--out", tmp_path / "d", "--steps", 0),
        ("evaluate-teacher", "--teacher", tmp_path / "absent", "--out", tmp_path),
    ):
        done = streamr1(*args)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("streamr1: ") and "Traceback" not in done.stderr
    assert streamr1("nonsense").returncode == 2


@pytest.mark.parametrize(
    "args",
    [
        ("bench", "rollout", "--blocks", "0"),
        ("bench", "wan", "--attention", "slow"),
        ("generate", "wan-1.3b", "--prompt", "a fox", "--resolution", "500", "832"),
        ("train", "tiny", "--method", "GAN"),
        ("plan", "--teacher", "7B"),
    ],
)
def test_settings_are_refused_before_anything_runs(args, capsys):
    try:
        code = main(list(args))
    except SystemExit as stop:  # by the parser
        code = stop.code
    told = capsys.readouterr()
    assert code == 2 and told.err + told.out and "Traceback" not in told.err + told.out


def test_interruption_ends_with_130(tmp_path):
    folders = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*PROGRAM, "train-teacher", *folders, "--training.batch", "1"],
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts us in the background ignores SIGINT, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log, deadline = tmp_path / "run" / "log.jsonl", time.time() + 120

    def training():
        return log.exists() and len(log.read_text().splitlines()) >= 2

    while not training() and process.poll() is None and time.time() < deadline:
        time.sleep(0.1)  # until it trains: nothing is being imported any more
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "streamr1: interrupted" in err and "Traceback" not in err
