"""A group-relative policy step is one method: groups of rollouts, rewards compared within them."""

import torch

from streamr1_ref.objective import DistillationConfig, draw_micro_batch
from streamr1_ref.rollout import self_forcing_rollout
from streamr1_ref.tiny.models import tiny_models
from streamr1_ref.training.method import BaseMethod, OptimizerConfig
from streamr1_ref.training.trainer import TrainConfig, Trainer

PROMPTS = [f"a red {digit} moving up" for digit in range(4)]
CFG = DistillationConfig(micro_batch_size=1, frames=3)  # one prompt, one block
GROUP = 4


def advantages(rewards):
    """Rewards [G] of one group, compared with its mean in units of its spread."""
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


class GroupPolicyMethod(BaseMethod):
    """The student's last re-noising is a Gaussian policy: its mean is what the network predicts."""

    optimizers = {"student": OptimizerConfig(lr=1e-5)}
    ema_roles, clip_norm = ("student",), 10.0

    def __init__(self, models, reward=None):
        self.models, self.roles = models, {"student": models.student}
        self.reward = reward or (lambda pixels, words: models.reward(pixels, words)["MQ"])
        self.t = models.schedule.warp(CFG.sampler.denoising_steps)[3].expand(GROUP)

    def predict(self, group, exit_step):
        """The prediction x0 [G,F,C,h,w] of `exit_step`, with the group's noise in between."""
        m, exits = self.models, [exit_step]
        noise, *renoise = group["noise"]
        text = m.text(group["prompts"])
        kwargs = {"exit_steps": exits, "renoise": [renoise], "config": CFG.sampler}
        return self_forcing_rollout(m.student, noise, text, m.schedule, **kwargs).latents

    @torch.no_grad()
    def sample(self, batch):
        """A group of rollouts of one prompt: noise, actions x' of the last re-noising, rewards."""
        generator, words, _ = draw_micro_batch(CFG, PROMPTS, batch)
        net, schedule = self.models.student, self.models.schedule
        shape = (4, GROUP, CFG.frames, net.cfg.in_channels, *net.cfg.latent_size)
        group = {"noise": torch.randn(shape, generator=generator), "prompts": words * GROUP}
        group["action"] = schedule.add_noise(self.predict(group, 2), group["noise"][3], self.t)
        pixels = self.models.codec.decode(self.predict(group, 3)).clamp(0, 1)
        return group | {"reward": self.reward(pixels, group["prompts"])}

    def log_probability(self, group):
        """Of each rollout's action [G] under the student as it is now, up to a constant."""
        x0 = self.predict(group, 2)
        mean = self.models.schedule.add_noise(x0, torch.zeros_like(x0), self.t)
        sigma = self.models.schedule.add_noise(torch.zeros_like(x0), torch.ones_like(x0), self.t)
        return -(((group["action"] - mean) / sigma) ** 2).mean((1, 2, 3, 4)) / 2

    def loss(self, role, batch):
        group = self.sample(batch)
        loss = -(advantages(group["reward"]) * self.log_probability(group)).mean()
        return loss, {"loss": loss.detach()[None], "reward": group["reward"]}


def test_a_step_makes_the_better_rollouts_of_the_group_more_likely(tmp_path):
    trainer = Trainer(GroupPolicyMethod(tiny_models()), TrainConfig(max_steps=3), tmp_path)
    group = trainer.method.sample(0)
    before = trainer.method.log_probability(group).detach()
    row = trainer.advance()
    after = trainer.method.log_probability(group).detach()
    assert (advantages(group["reward"]) * (after - before)).sum() > 0 and row["norm"] > 0
    rows = trainer.train(progress=False)
    assert len(rows) == 2 and not any("skipped" in row for row in rows)


def test_a_group_of_equals_teaches_nothing():
    method = GroupPolicyMethod(tiny_models(), lambda pixels, words: torch.ones(GROUP))
    method.loss("student", 0)[0].backward()
    assert not any(p.grad.any() for p in method.models.student.parameters())
