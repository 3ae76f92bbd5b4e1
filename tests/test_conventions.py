"""What a reader of the reference pages need not see: settings, ports, files, widgets."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal, Optional

import pytest
import torch

from streamr1_ref.ports import Denoiser, LatentCodec, RewardModel
from streamr1_ref.tiny.codec import PCACodec, load_codec
from streamr1_ref.tiny.reward import load_reward
from streamr1_ref.transformer import WanConfig, WanTransformer
from streamr1_ref.utils import widgets
from streamr1_ref.utils.checks import check_choices
from streamr1_ref.utils.files import (
    data_path,
    load_tensors,
    read_config,
    save_tensors,
    writable_folder,
    write_config,
)
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


Fruit = Literal["apple", "pear"]


@dataclass(frozen=True)
class BowlConfig:
    fruit: Fruit = "apple"
    extra: Optional[Fruit] = None
    either: Literal["a"] | Literal["b"] | None = "b"
    many: tuple[Fruit, ...] = ()
    maybe: tuple[Fruit, ...] | None = None
    count: Literal[1, 2] = 1
    free: tuple[int, str] = (1, "x")
    notes: dict[str, Literal["kept", "out"]] = field(default_factory=dict)  # not looked into

    def __post_init__(self):
        check_choices(self)


@pytest.mark.parametrize(
    "good",
    [
        {},
        {"fruit": "pear", "extra": "pear", "either": None, "count": 2},
        {"many": ("pear", "apple", "pear"), "maybe": ()},
        {"free": (7, "anything")},
    ],
)
def test_choices_that_fit_pass(good):
    assert all(getattr(BowlConfig(**good), name) == value for name, value in good.items())


@pytest.mark.parametrize(
    "name,value,known",
    [
        ("fruit", "Apple", "one of 'apple', 'pear'"),
        ("fruit", None, "one of 'apple', 'pear'"),
        ("fruit", ["apple"], "one of 'apple', 'pear'"),
        ("extra", "plum", "one of 'apple', 'pear', None"),
        ("either", "c", "one of 'a', 'b', None"),
        ("many", ("apple", "plum"), "some of 'apple', 'pear'"),
        ("many", "apple", "some of 'apple', 'pear'"),
        ("maybe", ("plum",), "of 'apple', 'pear', None"),
        ("count", True, "one of 1, 2"),
        ("count", 1.0, "one of 1, 2"),
    ],
)
def test_other_choices_are_refused_by_name(name, value, known):
    with pytest.raises(ValueError) as error:
        BowlConfig(**{name: value})
    message = str(error.value)
    assert message.startswith(f"{name}: expected ") and message.endswith(f", got {value!r}")
    assert known in message


def test_the_shipped_networks_fit_their_ports():
    codec = load_codec(data_path("tiny_codec.safetensors"))
    net = WanTransformer(WanConfig())
    ports = {LatentCodec: codec, Denoiser: net, RewardModel: load_reward()}
    for port in ports:
        assert [type(x) for x in ports.values() if isinstance(x, port)] == [type(ports[port])]
    assert isinstance(codec, PCACodec)


def test_settings_files_are_whole_and_keep_tuples(tmp_path):
    path = write_config(tmp_path / "a" / "config.json", {"steps": (4, 2), "name": None})
    assert read_config(path) == {"steps": (4, 2), "name": None}
    with pytest.raises(TypeError):
        write_config(path, {"net": object()})
    assert read_config(path)["steps"] == (4, 2)
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]


def test_processes_try_a_folder_without_touching_each_others_files(tmp_path):
    """All wrote and deleted one file; a process then failed to delete what another had deleted."""
    (tmp_path / ".write-test").write_text("another process is trying this folder")
    assert writable_folder(tmp_path) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == [".write-test"]
    assert (tmp_path / ".write-test").read_text() == "another process is trying this folder"
