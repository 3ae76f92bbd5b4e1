"""The four trainings of one network: the first steps, and what is left of an interruption."""

from dataclasses import replace

import pytest
import torch

from streamr1_ref.tiny.better_teacher import ScoreConfig, ScoreMethod, go_on_from_weights, save_next
from streamr1_ref.tiny.codec import load_codec
from streamr1_ref.tiny.exact import GridWorld
from streamr1_ref.tiny.reward import RewardConfig, RewardMethod
from streamr1_ref.tiny.student import StudentConfig, StudentMethod
from streamr1_ref.tiny.teacher import (
    TeacherConfig,
    TeacherMethod,
    TinyTeacher,
    ema_model,
    fit,
    tiny_trainer,
)
from streamr1_ref.tiny.world import caption_split
from streamr1_ref.transformer import WanConfig
from streamr1_ref.utils.files import data_path, load_tensors
from streamr1_ref.utils.runtime import seeded

NET = WanConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=1)
CODEC = load_codec(data_path("tiny_codec.safetensors"))
NEXT_CODEC = load_codec(data_path("tiny_codec_next.safetensors"))
STEPS = 6


def teacher(**changes):
    cfg = TeacherConfig(steps=STEPS, batch=2, save_every=2)
    return TeacherMethod(replace(cfg, **changes), CODEC, NET)


def student(**changes):
    untrained = TinyTeacher(teacher().roles["model"].requires_grad_(False), CODEC)
    paths = torch.randn(4, 5, 9, 16, 8, 8, generator=seeded(3))
    prompts = [str(caption) for caption in caption_split()[0][:4]]
    cfg = StudentConfig(steps=STEPS, batch=2, save_every=2)
    return StudentMethod(replace(cfg, **changes), untrained, paths, prompts)


def reward(**changes):
    cfg = RewardConfig(steps=STEPS, batch=4, save_every=2)
    return RewardMethod(replace(cfg, **changes), CODEC)


def score(**changes):
    cfg = ScoreConfig(batch=4, short_steps=2, short_latents=1, save_every=2, warm_up=2)
    return ScoreMethod(replace(cfg, **changes), NEXT_CODEC, NET, GridWorld(num_frames=5))


METHODS = [teacher, student, reward, score]

# losses of three steps, then sums of the absolute weights and of their EMA after them: numbers of
# the loops that made the shipped weights, before all trainings had one trainer
FIRST_STEPS = {
    teacher: ([2.190876007, 1.843147039, 1.961415648], 2874.664212069, 2874.064027180),
    student: ([1.991014004, 1.969075918, 1.981768131], 2869.051976852, 2868.808124183),
    reward: ([2.066906214, 1.829259872, 2.133411884], 6248.406037587, 6245.971153511),
    score: ([2.183683634, 1.967754126, 1.948077679], 2960.861265252, 2960.443809040),
}


def total(net):
    return sum(p.detach().double().abs().sum().item() for p in net.parameters())


@pytest.mark.parametrize("make", METHODS)
def test_first_steps_are_those_of_the_first_edition(make, tmp_path):
    losses, weights, ema = FIRST_STEPS[make]
    trainer = tiny_trainer(make(), tmp_path, 3)
    rows = trainer.train(progress=False)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert total(trainer.method.roles["model"]) == pytest.approx(weights, rel=1e-7)
    assert total(ema_model(trainer)) == pytest.approx(ema, rel=1e-7)


def all_tensors(trainer):
    "Weights, EMA and the state of the optimizer, by name."
    net, optimizer = trainer.method.roles["model"], trainer.optimizers["model"]
    tensors = {f"model.{k}": v for k, v in net.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema_model(trainer).state_dict().items()}
    for name, p in net.named_parameters():
        state = optimizer.state.get(p, {})
        tensors |= {f"{k}.{name}": torch.as_tensor(v) for k, v in state.items()}
    return tensors


@pytest.mark.parametrize("make", METHODS)
def test_a_stopped_training_ends_with_the_same_bits(make, tmp_path):
    """Stopped after a checkpoint, and two times before the next one."""
    whole = tiny_trainer(make(), tmp_path / "whole", STEPS)
    whole.train(progress=False)
    stopped = tiny_trainer(make(), tmp_path / "parts", 2)
    stopped.train(progress=False)
    for steps in (1, 0):
        resumed = tiny_trainer(make(), tmp_path / "parts", STEPS)
        assert resumed.step_count == 2
        for _ in range(steps):
            resumed.advance()  # lost: there is no checkpoint behind it
    resumed.train(progress=False)
    ours, theirs = all_tensors(resumed), all_tensors(whole)
    assert set(ours) == set(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    logs = [(tmp_path / run / "log.jsonl").read_text() for run in ("whole", "parts")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == STEPS


@pytest.mark.parametrize("make", METHODS)
def test_other_settings_are_refused_before_work(make, tmp_path):
    trainer = tiny_trainer(make(), tmp_path, 2)
    trainer.train(progress=False)
    before = (tmp_path / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="lr"):
        tiny_trainer(make(lr=1.0), tmp_path, 4)
    assert (tmp_path / "log.jsonl").read_text() == before


@pytest.mark.parametrize("make", METHODS)
def test_initial_weights_do_not_touch_the_global_random_state(make):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    make()
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_loss_that_is_not_finite_changes_no_weight(tmp_path):
    method = teacher()
    method.roles["model"].transformer.head.head.bias.data[0] = torch.nan
    before = [p.clone() for p in method.roles["model"].parameters()]
    with pytest.raises(FloatingPointError):
        fit(method, tmp_path, progress=False)
    after = method.roles["model"].parameters()
    assert all(torch.equal(p, q) or p.isnan().any() for p, q in zip(before, after))


def test_the_student_keeps_its_text_encoder():
    method = student()
    trained = {p for group in method.optimizer("model").param_groups for p in group["params"]}
    model = method.roles["model"]
    assert trained == set(model.transformer.parameters())
    assert not any(p.requires_grad for p in model.text.parameters())


def test_a_training_from_weights_goes_on_with_the_batch_of_their_step(tmp_path):
    """It used to count its steps on and to draw the batches from the first one again."""
    first = tiny_trainer(score(), tmp_path / "first", 4)
    first.train(progress=False)
    shipped = save_next(tmp_path / "weights.safetensors", tmp_path / "first")
    method, drawn = score(), []
    batch = method.batch
    method.batch = lambda step: drawn.append(step) or batch(step)
    again = tiny_trainer(method, tmp_path / "again", 6)
    go_on_from_weights(again, shipped)
    assert (again.step_count, again.update_count) == (4, 4)
    again.train(progress=False)
    assert drawn == [4, 5]


@pytest.mark.parametrize("part", ["ema", "model"])
def test_weights_to_ship_are_those_of_the_network_alone(part, tmp_path):
    """The last weights used to come with the state of their optimizer."""
    trainer = tiny_trainer(score(), tmp_path, 2)
    trainer.train(progress=False)
    saved = load_tensors(save_next(tmp_path / "weights.safetensors", tmp_path, part))[0]
    assert saved.keys() == dict(trainer.method.roles["model"].named_parameters()).keys()


@pytest.mark.parametrize(
    "settings, wrong",
    [
        (TeacherConfig, {"clip_norm": 0.0}),
        (TeacherConfig, {"ema": 1.0}),
        (TeacherConfig, {"lr": -1e-3}),
        (ScoreConfig, {"clip_norm": 0.0}),
        (ScoreConfig, {"clip_norm": float("nan")}),
        (ScoreConfig, {"ema": 1.0}),
        (ScoreConfig, {"ema": -0.1}),
        (ScoreConfig, {"lr": float("nan")}),
        (ScoreConfig, {"weight_decay": -0.1}),
        (ScoreConfig, {"short_steps": -1}),
        (ScoreConfig, {"shift": 0.0}),
    ],
)
def test_settings_that_make_no_training_are_refused_by_name(settings, wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected "):
        settings(**wrong)
