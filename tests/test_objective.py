"""Balance and loss against the published code; skipped steps; every method trains."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import relative_error

import streamr1_ref.training.trainer as training
from streamr1_ref.balance import AdaptiveBalance
from streamr1_ref.objective import (
    METHODS,
    DistillationConfig,
    DistillationMethod,
    WeightingConfig,
    saliency_maps,
    stream_r1_loss,
)
from streamr1_ref.rollout import SamplerConfig
from streamr1_ref.tiny.models import tiny_models
from streamr1_ref.tiny.world import caption_split
from streamr1_ref.training.trainer import Trainer


@pytest.mark.parametrize("case", [0, 1])
def test_published_balance(golden, case):
    tensors, info = golden("balance")
    c = info["cases"][case]
    balance = AdaptiveBalance(c["lam"], c["window"], c["warmup"])
    for step in range(c["steps"]):
        final, penalty = balance.update(
            {a: tensors[f"{case}.{a}"][step].item() for a in ("VQ", "MQ", "TA")}
        )
        assert penalty == pytest.approx(tensors[f"{case}.penalty"][step].item(), abs=1e-5)
        assert final.item() == pytest.approx(tensors[f"{case}.final"][step].item(), abs=1e-5)


@pytest.mark.parametrize("case", range(8))
def test_published_loss(golden, case):
    tensors, info = golden("loss")
    c = info["cases"][case]
    x = tensors[f"{case}.x"].requires_grad_()
    reward = c["rewards"]["MQ"] if c["mode"] == "MQ" else sum(c["rewards"].values()) / 3
    loss = stream_r1_loss(
        x,
        tensors[f"{case}.grad"],
        torch.tensor([reward], dtype=torch.float64),
        tensors[f"{case}.weight"][None] if c["spatial"] else None,
        tensors[f"{case}.mask"].bool() if c["mask"] else None,
        c["beta"],
    )
    loss.backward()
    assert loss.item() == pytest.approx(tensors[f"{case}.loss"].item(), rel=1e-6)
    assert relative_error(x.grad, tensors[f"{case}.dloss_dx"]) < 1e-5


PROMPTS = [str(c) for c in caption_split()[0]]


def weights(net):
    return [p.clone() for p in net.parameters()]


def same(before, net):
    return all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_step(method):
    run = DistillationMethod(
        tiny_models(),
        PROMPTS,
        METHODS[method],
        DistillationConfig(micro_batch_size=2, critic_steps=1),
    )
    before = weights(run.models.student), weights(run.models.critic), weights(run.models.teacher)
    record = Trainer(run).step()
    assert "skipped" not in record and all(map(lambda v: v == v, record.values()))
    assert (
        not same(before[0], run.models.student)
        and not same(before[1], run.models.critic)
        and same(before[2], run.models.teacher)
    )
    assert (record["weight"] == 1.0) == (METHODS[method].beta == 0)


@pytest.mark.parametrize(
    "where, critic_steps, says",
    [
        ("reward", 0, "reward: TA is not finite for clip 0"),
        ("critic", 0, "gradient: teacher or critic made values that are not finite for clip 0"),
        ("critic", 1, "loss, gradient: not finite"),
        ("saliency", 0, "saliency: the gradient of VQ is not finite for clip 1"),
    ],
)
def test_a_step_that_is_not_finite_is_skipped_and_counted(where, critic_steps, says):
    models = tiny_models()
    run, good = (
        DistillationMethod(
            models,
            PROMPTS,
            METHODS["Stream-R1"],
            DistillationConfig(micro_batch_size=2, critic_steps=critic_steps),
        ),
        models.reward,
    )
    if where == "reward":
        models.reward = lambda pixels, prompts: {
            a: r + (float("inf") if a == "TA" else 0) for a, r in good(pixels, prompts).items()
        }
    elif where == "saliency":
        bad = torch.tensor([0.0, 1.0])  # the derivative of sqrt at 0, for the second clip only
        models.reward = lambda pixels, prompts: {
            a: r + (bad * (0 * pixels).sum((1, 2, 3, 4)) + (1 - bad)).sqrt()
            for a, r in good(pixels, prompts).items()
        }
    else:
        next(models.critic.parameters()).data.fill_(float("nan"))
    models.reward.axes = good.axes
    before = weights(models.student)
    trainer = Trainer(run)
    record = trainer.step()
    assert record["skipped"].startswith(f"step 1: {says}") and trainer.skipped == 1, record
    moments = trainer.optimizers["critic"].state.values()
    assert not any(m["step"] for m in moments)  # the critic was not trained on it either
    assert same(before, models.student) and len(run.balance.history) == 0


def test_a_skipped_step_does_not_repeat_itself():
    """The next step draws other prompts and noise: one bad clip cannot break the run."""
    models = tiny_models()
    run, good = (
        DistillationMethod(
            models,
            PROMPTS,
            METHODS["DMD"],
            DistillationConfig(micro_batch_size=1, critic_steps=0, frames=3),
        ),
        models.reward,
    )
    seen = []

    def once(pixels, prompts):
        seen.append(prompts)
        return {
            a: r * (float("nan") if len(seen) == 1 else 1) for a, r in good(pixels, prompts).items()
        }

    once.axes, models.reward = good.axes, once
    trainer = Trainer(run)
    records = [trainer.step(), trainer.step()]
    assert "skipped" in records[0] and "skipped" not in records[1] and seen[0] != seen[1]


def test_penalty_scales_the_whole_gradient():
    """Balancing multiplies the gradient by exp(-beta weight penalty) of all micro-batches."""
    gradients = {}
    for balance in (0.0, 0.5):
        run = DistillationMethod(
            tiny_models(),
            PROMPTS,
            replace(METHODS["inter"], balance=balance, balance_window=4, balance_warmup=2),
            DistillationConfig(
                micro_batch_size=1, micro_batches=2, critic_steps=0, frames=3, clip_norm=1e9
            ),
        )
        trainer = Trainer(run)
        trainer.optimizers["student"].step = lambda: None
        records = [trainer.step() for _ in range(3)]
        gradients[balance] = [p.grad.clone() for p in run.models.student.parameters()], records[-1]
    (plain, _), (scaled, record) = gradients[0.0], gradients[0.5]
    assert record["penalty"] > 0
    factor = math.exp(-2.0 * 0.5 * record["penalty"])
    assert all(torch.allclose(factor * a, b, rtol=1e-4, atol=1e-9) for a, b in zip(plain, scaled))
    assert run.balance.history[-1] == pytest.approx(
        [record[a] for a in ("VQ", "MQ", "TA")], abs=1e-5
    )


def test_balance_state_survives():
    a, b = AdaptiveBalance(window=4, warmup=2), AdaptiveBalance(window=4, warmup=2)
    for i in range(3):
        a.update({"VQ": float(i), "MQ": 0.0, "TA": 1.0})
    b.load_state_dict(a.state_dict())
    assert (
        a.update({"VQ": 5.0, "MQ": 0.0, "TA": 1.0})[1]
        == b.update({"VQ": 5.0, "MQ": 0.0, "TA": 1.0})[1]
    )


def test_the_balance_window_moves_only_when_a_step_succeeded(monkeypatch):
    """A step whose gradient is not finite is skipped; its rewards do not count."""
    run = DistillationMethod(
        tiny_models(),
        ["a red 3 moving up"] * 4,
        METHODS["Stream-R1"],
        DistillationConfig(micro_batch_size=2, critic_steps=1),
    )
    trainer, whole = Trainer(run), training.clip_gradient
    critic = next(run.models.critic.parameters())
    monkeypatch.setattr(
        training,
        "clip_gradient",
        lambda parameters, *rest: whole(parameters, *rest) if parameters[0] is critic else math.nan,
    )
    assert "skipped" in trainer.step() and run.balance.count == 0 and not run.balance.history
    monkeypatch.setattr(training, "clip_gradient", whole)
    assert "skipped" not in trainer.step() and run.balance.count == 1


def test_the_negative_prompt_is_embedded_once_and_is_the_one_that_was_set():
    """Every micro-batch used to embed the empty prompt, whatever the settings."""
    models, heard = tiny_models(), []
    text = models.text
    models.text = lambda prompts: heard.append(list(prompts)) or text(prompts)
    run = DistillationMethod(
        models,
        ["a red 3 moving up"] * 4,
        METHODS["DMD"],
        DistillationConfig(
            micro_batch_size=1,
            micro_batches=2,
            critic_steps=1,
            negative_prompt="a blue 7 moving down",
        ),
    )
    first = Trainer(run).step()
    assert [p for p in heard if p == ["a blue 7 moving down"]] == [["a blue 7 moving down"]] and [
        ""
    ] not in heard
    plain = DistillationMethod(
        tiny_models(),
        ["a red 3 moving up"] * 4,
        METHODS["DMD"],
        DistillationConfig(micro_batch_size=1, micro_batches=2, critic_steps=1),
    )
    assert Trainer(plain).step()["loss"] != first["loss"]


def test_context_noise_as_published_changes_the_rollout_and_the_default_does_not():
    """The published training noises finished blocks at sigma 0.005, its sampler does not."""
    plain, noisy = (
        DistillationMethod(
            tiny_models(),
            ["a red 3 moving up"] * 4,
            METHODS["DMD"],
            DistillationConfig(micro_batch_size=1, sampler=SamplerConfig(context_lookup=lookup)),
        )
        for lookup in ("exact", "nearest")
    )
    a, b = (run.roll_out(0).latents for run in (plain, noisy))
    first = slice(0, 3)
    assert torch.equal(a[:, first], b[:, first]) and 0 < (a - b).norm() / a.norm() < 0.2


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "settings, name, wrong",
    [
        *[(DistillationConfig, name, 0) for name in ("micro_batch_size", "micro_batches")],
        *[(DistillationConfig, name, 0) for name in ("exit_group", "frames", "clip_norm")],
        (DistillationConfig, "frames", 2),  # less than a block
        *[(DistillationConfig, name, -1) for name in ("critic_steps", "student_lr", "critic_lr")],
        *[(DistillationConfig, name, NAN) for name in ("student_lr", "clip_norm")],
        *[(DistillationConfig, "weight_decay", -0.1), (DistillationConfig, "betas", (0.0, 1.0))],
        *[(DistillationConfig, "betas", (-0.1, 0.9)), (DistillationConfig, "betas", (NAN, 0.9))],
        *[(DistillationConfig, "guidance_scale", INF), (DistillationConfig, "score_shift", INF)],
        *[(DistillationConfig, "min_normaliser", -1.0)],
        *[(WeightingConfig, "temperature", 0.0), (WeightingConfig, "temperature", NAN)],
        *[(WeightingConfig, "spatial_floor", 1.5), (WeightingConfig, "temporal_floor", -0.1)],
        *[(WeightingConfig, "cap", 0.0), (WeightingConfig, "cap", NAN)],
        *[(WeightingConfig, "balance", -0.5), (WeightingConfig, "balance", NAN)],
        *[(WeightingConfig, "balance_window", 1), (WeightingConfig, "balance_warmup", 1)],
        *[(WeightingConfig, "beta", INF), (WeightingConfig, "beta", NAN)],
        *[(WeightingConfig, "axes", ()), (WeightingConfig, "axes", "MQ")],
        *[(WeightingConfig, "axes", (1,))],
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_made(settings, name, wrong):
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        settings(**{name: wrong})


def test_axes_that_the_reward_model_lacks_are_refused_before_a_step():
    wrong = WeightingConfig(axes=("MQ", "XY"), balance=0)
    with pytest.raises(ValueError, match="axes: expected some of VQ, MQ, TA, .* got XY"):
        DistillationMethod(tiny_models(), PROMPTS, wrong)


def test_a_balance_of_one_axis_is_refused_before_a_step():
    models = tiny_models()
    models.reward.axes = ("MQ",)
    with pytest.raises(ValueError, match="balance: expected a reward model of two axes or more"):
        DistillationMethod(models, PROMPTS, WeightingConfig(axes=("MQ",)))


def test_a_distillation_without_prompts_is_refused():
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        DistillationMethod(tiny_models(), [])


def test_a_patch_saliency_without_patches_is_a_mistake_in_the_settings():
    models, wrong = tiny_models(), WeightingConfig(saliency="patches")
    with pytest.raises(
        ValueError, match="saliency: expected a reward model that shows its patches"
    ):
        DistillationMethod(models, PROMPTS, wrong)
    clip = torch.rand(1, 5, 3, 64, 64)
    with pytest.raises(ValueError, match="kind: expected one of pixels, patches, published, got x"):
        saliency_maps(models.reward, clip, ["a"], (2, 8, 8), "x")


def test_the_smallest_normaliser_is_a_setting():
    """A large one divides the gradient of every clip, so the loss falls by its square."""
    losses = []
    for least in (1e3, 2e3):
        cfg = DistillationConfig(micro_batch_size=1, frames=3, min_normaliser=least)
        run = DistillationMethod(tiny_models(), PROMPTS, METHODS["DMD"], cfg)
        losses.append(run.loss("student", 0)[0].item())
    assert losses[0] == pytest.approx(4 * losses[1], rel=1e-4)
