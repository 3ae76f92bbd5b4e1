"""The DMD gradient against the published code, and the laboratory's properties."""

import pytest
import torch
from conftest import relative_error

from streamr1_ref.dmd import dmd_gradient, dmd_loss, surrogate_loss
from streamr1_ref.tiny.plane import Lab, LabConfig, Mixture


@pytest.mark.parametrize("case", [0, 1, 2])
def test_published_gradient(golden, case):
    tensors, info = golden("dmd_gradient")
    t = {
        name: tensors[f"{case}.{name}"]
        for name in ("x", "fake_cond", "real_cond", "real_uncond", "fake_uncond", "grad")
    }
    c, expected = info["cases"][case], t.pop("grad")
    published = dmd_gradient(
        **t, guidance=c["real_guidance"], fake_guidance=c["fake_guidance"], min_normaliser=0.0
    )
    assert relative_error(published[0], expected[0]) < 1e-5
    if case == 1:  # the zero normaliser: reproduced by the switch ...
        assert (
            torch.equal(published[1], expected[1])
            and published[1].max() == torch.finfo(torch.float32).max
        )
        ours = dmd_gradient(**t, guidance=5.0)  # ... and bounded by default
        assert (
            ours.isfinite().all()
            and ours[1].abs().max() < 1e7
            and relative_error(ours[0], expected[0]) < 1e-5
        )
    else:
        assert relative_error(published[1], expected[1]) < 1e-5
        assert torch.equal(
            dmd_gradient(**t, guidance=c["real_guidance"], fake_guidance=c["fake_guidance"]),
            published,
        )


def test_nan_predictions_are_not_hidden():
    x = torch.zeros(1, 1, 2, 1, 1)
    assert dmd_gradient(x, x * float("nan"), x + 1, None, guidance=0.0).isnan().all()


def test_no_gradient_flows_through_the_predictions():
    x, p = (
        torch.randn(2, 1, 1, 2, 1, 1, generator=torch.Generator().manual_seed(0))
        .requires_grad_()
        .unbind(0)
    )
    loss = dmd_loss(x, dmd_gradient(x, 2 * p, p, None, guidance=0.0))
    (gx, gp) = torch.autograd.grad(loss, (x, p), allow_unused=True)
    assert gx.abs().sum() > 0 and gp is None


def test_loss_keeps_small_gradients_of_large_latents():
    x, g = torch.full((1, 1, 1, 1, 1), 1e4, requires_grad=True), torch.full((1, 1, 1, 1, 1), 1e-3)
    surrogate_loss(x, g).sum().backward()
    assert torch.equal(x.grad, g)  # x - g in float32 would be off by 2 %


def test_student_that_equals_the_target_has_no_gradient():
    target = Mixture(torch.tensor([[0.0, 1.0], [2.0, -1.0]]), 0.3)
    lab = Lab(target, LabConfig(batch=32))
    points = target.sample(500, torch.Generator().manual_seed(0))
    assert lab.gradient(points).abs().mean() > 0.1  # an untrained critic is not the target
    lab.critic = lambda x_t, sigma: (x_t - target.x0(x_t, sigma)) / sigma[:, None, None, None, None]
    assert lab.gradient(points).abs().max() < 1e-3
