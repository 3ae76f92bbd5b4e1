"""A GAN term is one subclass of the distillation: a third role, its updates, a term of the loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from streamr1_ref.objective import METHODS, DistillationConfig, DistillationMethod
from streamr1_ref.tiny.models import tiny_models
from streamr1_ref.training.method import OptimizerConfig
from streamr1_ref.training.trainer import TrainConfig, Trainer
from streamr1_ref.utils.runtime import seeded

PROMPTS = [f"a red {digit} moving up" for digit in range(4)]
CFG = DistillationConfig(micro_batch_size=2, frames=3, critic_steps=1)


class GanMethod(DistillationMethod):
    """DMD2's second term: a discriminator tells the student's latents from the teacher's."""

    def __init__(self, models, weight):
        super().__init__(models, PROMPTS, METHODS["DMD"], CFG)
        self.weight, width = weight, models.student.cfg.in_channels
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.discriminator = nn.Sequential(nn.Linear(width, 8), nn.SiLU(), nn.Linear(8, 1))
        self.roles = {**self.roles, "discriminator": self.discriminator}
        self.optimizers = {**self.optimizers, "discriminator": OptimizerConfig(lr=1e-2)}

    def updates(self, step):
        return (*super().updates(step), "discriminator")

    def draw(self, batch):
        """Micro-batches of critic and student draw as if there were no third update."""
        each = len(super().updates(0))
        step, place = divmod(batch, each + 1)
        return super().draw(step * each + place if place < each else 1_000_000 + step)

    def realness(self, latents):
        """One value [B] a clip of latents [B,F,C,h,w]."""
        return self.discriminator(latents.movedim(2, -1)).mean((1, 2, 3, 4))

    def student_loss(self, clips):
        loss, record = super().student_loss(clips)
        term = F.softplus(-self.realness(clips.latents)).mean()
        return loss + self.weight * term, record | {"gan": term.detach()[None]}

    def loss(self, role, batch):
        if role != "discriminator":
            return super().loss(role, batch)
        with torch.no_grad():
            made = self.roll_out(batch).latents
        real = torch.randn(made.shape, generator=seeded(1, batch))  # stands for encoded clips
        loss = F.softplus(self.realness(made)).mean() + F.softplus(-self.realness(real)).mean()
        return loss, {"discriminator": loss.detach()[None]}


def trainer_of(weight, folder):
    cfg = TrainConfig(max_steps=3, save_every=2, max_skipped=1)
    return Trainer(GanMethod(tiny_models(), weight), cfg, folder)


def test_it_trains_and_resumes_bit_for_bit(tmp_path):
    trainer = trainer_of(0.1, tmp_path)
    before = [p.clone() for p in trainer.method.discriminator.parameters()]
    rows = trainer.train(progress=False)
    assert all(math.isfinite(row[n]) for row in rows for n in ("loss", "gan", "discriminator"))
    assert not any(map(torch.equal, before, trainer.method.discriminator.parameters()))
    (tmp_path / "checkpoints" / "step-000003" / "state.json").unlink()
    again = trainer_of(0.1, tmp_path)
    assert len(again.resume()) == 1 and again.step_count == 2
    assert again.train(progress=False) == rows
    assert all(torch.equal(t, trainer.tensors()[name]) for name, t in again.tensors().items())


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_a_weight_of_zero_is_the_plain_run(weight, tmp_path):
    gan = trainer_of(weight, tmp_path)
    plain = Trainer(DistillationMethod(tiny_models(), PROMPTS, METHODS["DMD"], CFG), gan.cfg)
    for _ in range(2):
        gan.advance(), plain.advance()
    pairs = zip(gan.ema["student"].values(), plain.ema["student"].values())
    assert all(torch.equal(a, b) for a, b in pairs) == (weight == 0.0)
