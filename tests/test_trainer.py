"""The trainer with methods of a few numbers: what it draws, keeps, refuses and writes down."""

import os
import sys

import pytest
import torch
from torch import nn

from streamr1_ref.cli.main import main
from streamr1_ref.training import tracking
from streamr1_ref.training.checkpoint import checkpoints, newest
from streamr1_ref.training.method import BaseMethod, OptimizerConfig
from streamr1_ref.training.tracking import trim_log
from streamr1_ref.training.trainer import TrainConfig, Trainer


class LineMethod(BaseMethod):
    """A line that learns to be zero; `asked` are the roles and micro-batches it was asked for."""

    def __init__(self, *roles):
        self.roles = {role: nn.Linear(2, 1) for role in roles or ("model",)}
        self.ema_roles, self.asked = tuple(self.roles), []

    def loss(self, role, batch):
        self.asked.append((role, batch))
        loss = self.roles[role](torch.ones(1, 2)).square().mean()
        return loss, {"loss": loss.detach()[None], role: torch.tensor([float(batch)])}


def line(folder, steps=3, *roles, **settings):
    settings = {"max_steps": steps, "save_every": 1, "max_skipped": 1} | settings
    return Trainer(LineMethod(*roles), TrainConfig(**settings), folder)


def test_a_training_that_starts_late_draws_the_batches_of_its_step(tmp_path):
    method = LineMethod("a", "b")
    method.updates, method.micro_batches = lambda step: ("a",) * (1 + step % 2) + ("b",), 2
    trainer = Trainer(method, TrainConfig(max_steps=5), tmp_path)
    trainer.start_at(4)  # steps of 2, 3, 2 and 3 updates
    assert (trainer.step_count, trainer.update_count) == (4, 10)
    trainer.train(progress=False)
    assert method.asked == [("a", 20), ("a", 21), ("b", 22), ("b", 23)]
    with pytest.raises(ValueError, match="step: expected at least 0, got -1"):
        trainer.start_at(-1)


def test_names_of_tensors_tell_networks_optimizers_and_emas_apart(tmp_path):
    names = line(tmp_path).tensors().keys()
    kinds = ["model", "optimizer.model.exp_avg", "optimizer.model.exp_avg_sq", "ema.model"]
    assert names == {f"{kind}.{part}" for kind in kinds for part in ("weight", "bias")}
    with pytest.raises(ValueError, match="roles: expected other names than ema and optimizer"):
        line(tmp_path, 3, "optimizer")


@pytest.mark.parametrize("name", ["max_steps", "ema_start", "ema_warmup", "sample_every"])
def test_settings_of_a_run_are_refused_when_they_are_made(name):
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            TrainConfig(**{name: wrong})


@pytest.mark.parametrize(
    "wrong", [{"lr": float("nan")}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}]
)
def test_settings_of_an_optimizer_are_refused_when_they_are_made(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected "):
        OptimizerConfig(**wrong)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("micro_batches", 0),
        ("clip_norm", 0.0),
        ("clip_norm", float("nan")),
        ("num_pictures", -1),
        ("optimizers", {"modle": OptimizerConfig()}),
    ],
)
def test_numbers_of_a_method_are_checked_before_a_step(name, wrong):
    method = LineMethod()
    setattr(method, name, wrong)
    with pytest.raises(ValueError, match=f"^{name}: "):
        Trainer(method)


def test_a_mistake_in_the_settings_is_one_line(tmp_path, capsys):
    args = ["train", "tiny", "--weighting.saliency", "patches", "--out", str(tmp_path / "run")]
    assert main(args) == 2
    said = capsys.readouterr().err
    assert said.startswith("streamr1: saliency: expected a reward model that shows its patches")
    assert said.count("\n") == 1


def test_a_part_of_a_net_that_is_not_trained_neither_collects_gradients_nor_shrinks_others(
    tmp_path,
):
    """The bias is not the optimizer's; its gradient grew from step to step and was clipped, too."""
    method = LineMethod()
    net = method.roles["model"]
    method.clip_norm = 1e9
    method.optimizer = lambda role: torch.optim.SGD([net.weight], lr=0.0)
    trainer = Trainer(method, TrainConfig(max_steps=2), tmp_path)
    norms = [trainer.advance()["norm"] for _ in range(2)]
    assert norms[0] == norms[1] == pytest.approx(net.weight.grad.norm().item())
    bias = net.bias.grad.clone()
    trainer.advance()
    assert torch.equal(net.bias.grad, bias)


class Noted:
    """A tracker that notes what was done to it."""

    def __init__(self, folder, step):
        self.did = []
        Noted.last = self

    def log(self, step, row):
        self.did.append(step)

    def close(self):
        self.did.append("closed")


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError, OSError])
def test_trackers_are_closed_whatever_ends_the_run(error, tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.TRACKERS, "trackio", Noted)
    trainer = line(tmp_path, trackers=("trackio",))
    advance = trainer.advance

    def broken():
        if trainer.step_count == 1:
            raise error
        return advance()

    trainer.advance = broken
    with pytest.raises(error):
        trainer.train(progress=False)
    assert Noted.last.did == [1, "closed"]


def test_a_tracker_that_is_not_installed_is_refused_before_a_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match="trackio: not installed .*pip install trackio"):
        line(tmp_path, trackers=("trackio",))


def test_steps_of_seven_digits_are_kept_and_found(tmp_path):
    trainer = line(tmp_path, 1_000_002, keep=2)
    trainer.start_at(999_998)
    trainer.train(progress=False)
    kept = ["step-1000001", "step-1000002"]
    assert [path.name for path in checkpoints(tmp_path)] == kept
    assert newest(tmp_path)[0].name == kept[-1]
    again = line(tmp_path, 1_000_002)
    again.resume()
    assert again.step_count == 1_000_002


def test_the_checkpoint_just_written_stays_and_damaged_ones_do_not_count(tmp_path):
    line(tmp_path, 6, keep=9).train(progress=False)
    for step in (4, 5, 6):
        (tmp_path / "checkpoints" / f"step-{step:06d}" / "state.json").write_text("{")
    again = line(tmp_path, 5, keep=2, save_every=2)
    assert len(again.resume()) == 3 and again.step_count == 3
    assert again.advance() and again.save().is_dir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000003", "step-000004"]


def test_whole_checkpoints_of_later_steps_are_neither_deleted_nor_in_the_way(tmp_path):
    line(tmp_path, 3, keep=2).train(progress=False)
    again = line(tmp_path, 1, keep=1)
    again.train(progress=False)
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["step-000001", "step-000002", "step-000003"]


def test_a_log_is_cut_back_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)))
    before, replace_file = path.read_text(), os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        trim_log(path, 2)
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]
    monkeypatch.setattr(os, "replace", replace_file)
    assert trim_log(path, 2) == [{"step": 1}, {"step": 2}]
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_values_of_several_roles_with_one_name_are_told_apart(tmp_path):
    """The losses of two networks were averaged into one number."""
    trainer = line(tmp_path, 1, "a", "b")
    for value, net in zip((1.0, 2.0), trainer.method.roles.values()):
        nn.init.constant_(net.weight, value)
        nn.init.zeros_(net.bias)
    row = trainer.step()
    assert (row["a.loss"], row["loss"]) == (4.0, 16.0) and "b.loss" not in row
    assert (row["a"], row["b"]) == (0.0, 1.0)
