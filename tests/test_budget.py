"""The plan against whole networks and steps on the meta device; bad input.

Tests at the true sizes are slow.
"""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from streamr1_ref.objective import METHODS, DistillationConfig
from streamr1_ref.training.distributed import shard
from streamr1_ref.training.presets import PRESETS, RunConfig, distillation_trainer
from streamr1_ref.transformer import WanConfig
from streamr1_ref.wan.budget import (
    FIRST_EDITION,
    TYPED,
    PlanConfig,
    as_typed,
    cheapest,
    check_memory,
    codec_cost,
    gathered_bytes,
    judge_cost,
    judge_on_meta,
    largest_layer,
    measure_judge,
    measure_pass,
    measure_rollout,
    meta_network,
    metered_step,
    models_on_meta,
    pass_cost,
    plan,
    plan_table,
    preset_settings,
    resident_bytes,
    resolved,
    rollout_cost,
    step_parts,
)
from streamr1_ref.wan.build import SMALL, Sizes, random_models
from streamr1_ref.wan.checkpoints import SIZES

GIB = 2**30
PUBLISHED = PRESETS["wan-1.3b"].distillation
SHORT = {"micro_batch_size": 1, "frames": 3, "micro_batches": 2, "exit_group": 2}
ONCE = {"micro_batches": 1, "exit_group": 1, "critic_steps": 1}
SMALL_PLAN = PlanConfig(
    student=SMALL.net,
    teacher=replace(SMALL.net, num_layers=6),
    critic=SMALL.net,
    resolution=(32, 48),
    parts=SMALL,
    gpus=2,
    dtype="float32",
    distillation=DistillationConfig(**SHORT, evict=False),
)


def close(planned: float, measured: float) -> None:
    assert measured > 0 and 0.9 < planned / measured < 1.1, (planned / GIB, measured / GIB)


def true_size(name: str) -> WanConfig:
    return resolved(PlanConfig(teacher=name))["teacher"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("training", [False, True])
def test_passes_at_true_size(name, training):
    whole = measure_pass(meta_network(true_size(name), checkpointing=True), 21, training=training)
    planned = pass_cost(true_size(name), 21, training=training)
    close(planned.peak, whole.peak)
    close(planned.work, whole.work)
    close(planned.flops, whole.flops)
    if training:
        close(planned.kept, whole.kept)


@pytest.mark.slow
def test_a_pass_without_checkpointing_at_true_size():
    whole = measure_pass(meta_network(true_size("1.3B")), 21, training=True)
    planned = pass_cost(true_size("1.3B"), 21, training=True, checkpointing=False)
    close(planned.kept, whole.kept)
    close(planned.peak, whole.peak)
    assert planned.kept > 15 * pass_cost(true_size("1.3B"), 21, training=True).kept


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_rollout_at_true_size(training):
    net = meta_network(true_size("1.3B"), checkpointing=True)
    whole = measure_rollout(net, PUBLISHED, training)
    planned = rollout_cost(true_size("1.3B"), PUBLISHED, training=training)
    for part, value in vars(whole).items():
        if value > 2**20:
            close(vars(planned)[part], value)
    assert whole.left == (whole.store if training else 0)


@pytest.mark.slow
def test_reward_model_at_true_size():
    whole = measure_judge(judge_on_meta(Sizes(), torch.bfloat16), 81, (480, 832))
    planned = judge_cost(Sizes(), 81, (480, 832))
    close(planned.kept, whole.kept)
    close(planned.work, whole.work)
    close(planned.flops, whole.flops)


@pytest.mark.slow
def test_a_whole_step_at_true_size():
    """Chapter 12's step: 1.3 B student and critic, 14 B teacher, VAE, VideoReward, 21 frames."""
    run = replace(PUBLISHED, **ONCE, sampler=replace(PUBLISHED.sampler, denoising_steps=(1000,)))
    s = PlanConfig(teacher="14B", critic="1.3B", distillation=run, gpus=1, sharded=False)
    measured = metered_step(models_on_meta(s), run)
    measured["critic: update"] = measured["critic: backward"]
    phases = plan(s).phases
    for phase in phases.keys() - {"optimizer", "prompts"}:
        close(sum(phases[phase].values()), measured[phase]["peak"])
    peaks = {phase: measured[phase]["peak"] for phase in phases if phase in measured}
    assert max(peaks, key=peaks.get) == plan(s).peak_phase == "student: reward"
    total = sum(row["flops"] for phase, row in measured.items() if phase != "critic: update")
    no_prompts = replace(s, text_ready=True)
    close(plan(no_prompts).work, total)


def nbytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.slow
def test_resident_parts_are_those_of_a_trainer(tmp_path):
    """Weights, gradients, moments and EMA of the real trainer, at the true sizes."""
    s = replace(preset_settings("stream-r1"), gpus=1)
    models = models_on_meta(replace(s, dtype="float32"))
    run = RunConfig(distillation=replace(s.distillation, guidance_scale=1.0))
    trainer = distillation_trainer(models, ["a"], run, tmp_path)
    planned = resident_bytes(s, plan(s).parameters)
    for role, net in (("student", models.student), ("critic", models.critic)):
        begins = (f"{role}.", f"optimizer.{role}.")
        state = [t for name, t in trainer.tensors().items() if name.startswith(begins)]
        gradients = sum(4 * p.numel() for p in net.parameters())
        kept = planned[f"{role}: weights"] + planned[f"{role}: gradients, moments"]
        close(kept, nbytes(state) + gradients)
    close(planned["student: EMA"], nbytes(trainer.ema["student"].values()))
    frozen = {"teacher": models.teacher, "reward model": models.reward, "VAE": models.codec.vae}
    for part, module in frozen.items():
        close(planned[part], sum(2 * p.numel() for p in module.parameters()))


def sharded_peak(cfg: WanConfig) -> tuple[float, int]:
    """Most bytes of whole weights that FSDP holds in a forward pass, and how often we looked."""
    net = shard(meta_network(cfg, torch.float32), init_device_mesh("cpu", (1,)), torch.bfloat16)
    net.to_empty(device="cpu")
    groups = [group._get_fsdp_state()._fsdp_param_group for group in (net, *net.blocks)]
    parts = [p for group in groups for p in group.fsdp_params]
    seen = []

    def whole(*_):
        held = [p._unsharded_param for p in parts if hasattr(p, "_unsharded_param")]
        seen.append(sum(t.untyped_storage().nbytes() for t in held))

    for block in net.blocks:
        block.ffn.register_forward_pre_hook(whole)
    x = torch.zeros(1, 1, cfg.in_channels, *cfg.latent_size, dtype=torch.bfloat16)
    embeds = torch.zeros(1, cfg.text_len, cfg.text_dim, dtype=torch.bfloat16)
    with torch.no_grad():
        net(x, torch.tensor([500.0]), embeds)
    return max(seen), len(seen)


def test_gathered_layers_are_those_of_fsdp():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        cfg = replace(WanConfig(), dim=192, ffn_dim=768, num_layers=3)
        measured, calls = sharded_peak(cfg)
    finally:
        dist.destroy_process_group()
    assert calls == 3
    close(gathered_bytes(cfg, ahead=0), measured)  # a CPU fetches no layer ahead
    at_least = gathered_bytes(cfg, ahead=0)
    assert gathered_bytes(cfg) > at_least < gathered_bytes(cfg, ahead=0, backward=True)


@pytest.mark.slow
def test_published_configurations():
    figures = {("14B", "1.3B"): (35, 50), ("14B", None): (65, 80), ("1.3B", None): (32, 46)}
    for (teacher, critic), (low, high) in figures.items():
        budget = plan(PlanConfig(teacher=teacher, critic=critic))
        assert low < budget.peak / GIB < high
        assert budget.peak < plan(replace(budget.settings, **FIRST_EDITION)).peak - 60 * GIB
        assert budget.work > 0.7e18 and f"{budget.work / 1e15:7.0f}" in plan_table(budget)
    large, published = (plan(PlanConfig(teacher="14B", critic=critic)) for critic in (None, "1.3B"))
    assert 3 < large.work / published.work < 3.3


@pytest.mark.slow
def test_the_first_edition_let_a_run_through_that_dies():
    """One GPU of 80 GB, teacher and text encoder offloaded: the old plan said 63 GiB."""
    s = replace(PlanConfig(), gpus=1, offload=("teacher", "text encoder"))
    assert plan(replace(s, **FIRST_EDITION)).peak > 80e9 > plan(s).peak


@pytest.mark.slow
def test_cheapest_change_first():
    s = PlanConfig(teacher="14B", gpus=8)
    single = cheapest(s, 70 * GIB)
    assert single == replace(s, text_ready=True)
    tight = cheapest(s, 40 * GIB)
    assert plan(tight).peak <= 40 * GIB and "--critic 1.3B" in as_typed(s, tight, "plan")
    slow = replace(s, dtype="float32")
    assert cheapest(slow, plan(replace(slow, text_ready=True)).peak - 1).dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"it fits with --text-cache FOLDER .*\(6\d\.\d GiB\)"):
        check_memory(plan(s), 70 * GIB)
    with pytest.raises(ValueError, match="it fits with --text-ready"):
        check_memory(plan(s), 70 * GIB, "plan")


@pytest.mark.parametrize("command", TYPED)
def test_typed_words_are_complete(command):
    before = PlanConfig(teacher="14B", gpus=8, dtype="float32", fused=False, checkpointing=False)
    after = replace(
        before,
        critic="1.3B",
        gpus=16,
        dtype="bfloat16",
        fused=True,
        checkpointing=True,
        text_ready=True,
        offload=("teacher",),
        distillation=replace(before.distillation, frames=9),
    )
    typed = as_typed(before, after, command)
    assert "{" not in typed
    for word in ("1.3B", "16", "bfloat16", "offload teacher", "frames 9"):
        assert word in typed


def test_a_gpu_that_cannot_hold_one_layer():
    budget = plan(SMALL_PLAN)
    phase, alone = largest_layer(budget)
    with pytest.raises(ValueError, match="one layer at work in phase .* more GPUs do not help"):
        check_memory(budget, alone - 1)
    with pytest.raises(ValueError, match="it fits with --text-cache|no setting"):
        check_memory(budget, budget.peak - 1)


def test_a_small_step_is_as_planned():
    run = replace(SMALL_PLAN.distillation, **ONCE)
    s = replace(SMALL_PLAN, distillation=run, gpus=1, sharded=False)
    measured = metered_step(models_on_meta(s), run)
    measured["critic: update"] = measured["critic: backward"]
    phases = plan(s).phases
    for phase in phases.keys() - {"optimizer", "prompts"}:
        close(sum(phases[phase].values()), measured[phase]["peak"])


def test_a_step_with_real_tensors_has_all_phases():
    run = replace(SMALL_PLAN.distillation, **ONCE)
    rows = metered_step(random_models(SMALL), run, device="cpu", gradients=True)
    assert {"critic: rollout", "critic: backward", "student: reward", "optimizer"} <= set(rows)
    assert all(row["kernels"] > 0 for row in rows.values())


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(gpus=0), "gpus: expected a divisor"),
        (dict(gpus=7), "gpus: expected a divisor of micro_batches=64, got 7"),
        (dict(critic="2B"), "critic: expected one of 1.3B, 14B"),
        (dict(dtype="half"), "dtype: expected one of 'bfloat16', 'float32', got 'half'"),
        (dict(offload=("critic",)), "offload: expected some of 'teacher', 'text encoder', got"),
        (dict(teacher_dtype="int8"), "teacher_dtype: expected"),
        (dict(resolution=(481, 832)), "resolution: expected height"),
    ],
)
def test_settings_that_no_run_can_have(wrong, message):
    with pytest.raises(ValueError, match=message):
        PlanConfig(**wrong)


def test_plain_dmd_needs_no_reward_model():
    s = replace(SMALL_PLAN, weighting=METHODS["DMD"])
    assert "reward model" not in plan(s).resident and "student: reward" not in plan(s).phases
    assert plan(s).peak < plan(SMALL_PLAN).peak


@pytest.mark.slow
def test_plain_dmd_needs_less_memory():
    s = replace(PlanConfig(), weighting=METHODS["DMD"])
    assert plan(s).peak < plan(PlanConfig()).peak - 8 * GIB


@pytest.mark.slow
def test_window_and_frames_change_the_plan():
    short = replace(PlanConfig(), distillation=replace(PUBLISHED, frames=9))
    assert plan(short).peak < plan(PlanConfig()).peak
    assert plan(short).work < 0.4 * plan(PlanConfig()).work
    assert codec_cost("{}", 9, (60, 104)).kept == 33 * 3 * 480 * 832 * 4


@pytest.mark.slow
def test_step_parts_with_real_tensors(tmp_path, capsys):
    made = step_parts("small", "cpu", out=tmp_path / "parts.json")
    assert json.loads((tmp_path / "parts.json").read_text()) == made
    assert made["step"]["optimizer"]["kernels"] > 0
    assert "vision attention" in capsys.readouterr().out
    on_meta = step_parts("small")
    for phase in ("student: rollout", "critic: loss"):
        in_float32, in_bfloat16 = (result["step"][phase]["peak"] for result in (made, on_meta))
        assert 0.5 < in_float32 / in_bfloat16 / 2 < 2
