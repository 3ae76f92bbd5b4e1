"""The command line as a process: exit codes, no tracebacks for a person's mistakes, the demo's files."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from streamr1_ref.cli.main import COMMANDS, main
from streamr1_ref.utils.files import load_tensors
from streamr1_ref.utils.video import read_mp4


def streamr1(*args, **options):
    return subprocess.run(
        [sys.executable, "-m", "streamr1_ref.cli.main", *map(str, args)],
        capture_output=True,
        text=True,
        **options,
    )


def test_demo_writes_the_same_files_twice(tmp_path):
    for name in ("a", "b"):
        done = streamr1(
            "demo",
            "--out",
            tmp_path / name,
            "--steps",
            1,
            "--seconds",
            1,
            "--count",
            2,
            "--captions",
            8,
        )
        assert done.returncode == 0, done.stderr
    assert "motion_error" in done.stdout and "stream-r1.mp4" in done.stdout
    clip, fps = read_mp4(tmp_path / "a" / "stream-r1.mp4")
    assert clip.shape[0] == 16 and fps == 16
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert len(files) >= 10
    for file in files:
        a, b = tmp_path / "a" / file, tmp_path / "b" / file
        if file.suffix == ".safetensors":  # the order of its metadata is not fixed
            (a, about), (b, also) = load_tensors(a), load_tensors(b)
            assert (
                about == also
                and a.keys() == b.keys()
                and all(torch.equal(a[name], b[name]) for name in a)
            ), file
        else:
            assert a.read_bytes() == b.read_bytes(), file
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    rows = metrics["rows"]
    assert rows["DMD"] != rows["before"] != rows["Stream-R1"] != rows["DMD"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_readable(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert (
        stop.value.code == 0
        and "usage: streamr1" in out
        and COMMANDS[command].__doc__.split("\n")[0].split(".")[0][:30] in out
    )


def test_presets_have_their_own_help(capsys):
    with pytest.raises(SystemExit):
        main(["train", "tiny", "--help"])
    out = capsys.readouterr().out
    assert all(
        text in out
        for text in ("--resume", "--distillation.student-lr", "--weighting.beta", "(default: 40)")
    )


def test_mistakes_end_with_one_line_and_code_2(tmp_path):
    (tmp_path / "file").write_text("")
    for args in (
        ("demo", "--out", tmp_path / "file"),
        ("demo", "--out", tmp_path / "d", "--steps", 0),
        ("evaluate-teacher", "--teacher", tmp_path / "absent", "--out", tmp_path),
    ):
        done = streamr1(*args)
        assert (
            done.returncode == 2
            and done.stderr.startswith("streamr1: ")
            and "Traceback" not in done.stderr
        ), done.stderr
    assert streamr1("nonsense").returncode == 2


def test_interruption_ends_with_130(tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "streamr1_ref.cli.main",
            "train-teacher",
            "--run",
            str(tmp_path / "run"),
            "--out",
            str(tmp_path / "out"),
            "--training.batch",
            "1",
        ],
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts us in the background ignores SIGINT, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.time() + 120
    log = tmp_path / "run" / "log.jsonl"
    while (
        not (log.exists() and len(log.read_text().splitlines()) >= 2)
        and process.poll() is None
        and time.time() < deadline
    ):
        time.sleep(0.1)  # until it trains: nothing is being imported any more
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "streamr1: interrupted" in err and "Traceback" not in err
