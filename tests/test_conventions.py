"""What a reader of the conventions notebook need not see."""
import os
import subprocess
import sys
import time

import pytest
import torch

from streamr1_ref import conventions
from streamr1_ref.conventions import explore, load_tensors, progress, save_tensors


def test_explore_shows_a_widget_in_a_live_session(monkeypatch):
    import ipywidgets
    shown, drawn = [], []
    monkeypatch.delenv("STREAMR1_STATIC", raising=False)
    monkeypatch.setattr(conventions, "display", shown.append)
    explore(lambda value: drawn.append(value), value=ipywidgets.IntSlider(value=3))
    assert len(shown) == 1 and isinstance(shown[0], ipywidgets.Widget)
    slider = shown[0].children[0]
    slider.value = 5
    assert drawn[-1:] == [5]


def test_progress_is_silent_when_static(monkeypatch):
    monkeypatch.setenv("STREAMR1_STATIC", "1")
    assert progress(range(2), "x").disable
    monkeypatch.delenv("STREAMR1_STATIC")
    assert not progress(range(2), "x").disable


WRITE_FOREVER = """
import itertools, sys, torch
from streamr1_ref.conventions import save_tensors
for value in itertools.count(1):
    save_tensors(sys.argv[1], {"w": torch.full((2_000_000,), float(value))})
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"w": torch.zeros(2_000_000)})
    for delay in (0.003, 0.007, 0.013):                   # a write takes about this long
        before = path.stat().st_mtime_ns
        process = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(path)])
        deadline = time.monotonic() + 60
        while path.stat().st_mtime_ns == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.wait()
        values = load_tensors(path)[0]["w"]
        assert values[0] > 0, "nothing was written before the kill"
        assert len(values) == 2_000_000 and (values == values[0]).all()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError):
        save_tensors(tmp_path / "w.safetensors", {"w": torch.zeros(1)})
