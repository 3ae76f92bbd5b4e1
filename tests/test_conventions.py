"""What a reader of the conventions notebook need not see."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from streamr1_ref.utils import widgets
from streamr1_ref.utils.files import load_tensors, save_tensors
from streamr1_ref.utils.runtime import progress
from streamr1_ref.utils.widgets import explore


def test_explore_shows_a_widget_in_a_live_session(monkeypatch):
    import ipywidgets

    shown, drawn = [], []
    monkeypatch.delenv("STREAMR1_STATIC", raising=False)
    monkeypatch.setattr(widgets, "display", shown.append)
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


DIES_HALFWAY = """
import os, signal, sys, torch
from safetensors.torch import save
from streamr1_ref.utils import files, widgets
def save_file(tensors, path, metadata=None):
    whole = save(tensors, metadata)
    with open(path, "wb") as file:
        file.write(whole[:len(whole) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
files.save_file = save_file
files.save_tensors(sys.argv[1], {"w": torch.ones(200_000)})
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"w": torch.zeros(200_000)})
    done = subprocess.run([sys.executable, "-c", DIES_HALFWAY, str(path)])
    assert done.returncode == -signal.SIGKILL
    values = load_tensors(path)[0]["w"]
    assert len(values) == 200_000 and (values == 0).all()
    save_tensors(path, {"w": torch.ones(3)})  # what it left behind is in nobody's way
    assert (load_tensors(path)[0]["w"] == 1).all()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError):
        save_tensors(tmp_path / "w.safetensors", {"w": torch.zeros(1)})
