"""Balance and loss against the published code; skipped steps; every method trains."""
import pytest
import torch
from conftest import relative_error

from streamr1_ref.balance import AdaptiveBalance
from streamr1_ref.objective import METHODS, Distillation, Distiller, stream_r1_loss
from streamr1_ref.reward import load_reward
from streamr1_ref.rollout import load_student
from streamr1_ref.teacher import load_teacher
from streamr1_ref.world import caption_split


@pytest.mark.parametrize("case", [0, 1])
def test_published_balance(golden, case):
    tensors, info = golden("balance")
    c = info["cases"][case]
    balance = AdaptiveBalance(c["lam"], c["window"], c["warmup"])
    for step in range(c["steps"]):
        final, penalty = balance.update({a: tensors[f"{case}.{a}"][step].item() for a in ("VQ", "MQ", "TA")})
        assert penalty == pytest.approx(tensors[f"{case}.penalty"][step].item(), abs=1e-5)
        assert final.item() == pytest.approx(tensors[f"{case}.final"][step].item(), abs=1e-5)


@pytest.mark.parametrize("case", range(8))
def test_published_loss(golden, case):
    tensors, info = golden("loss")
    c = info["cases"][case]
    x = tensors[f"{case}.x"].requires_grad_()
    reward = c["rewards"]["MQ"] if c["mode"] == "MQ" else sum(c["rewards"].values()) / 3
    loss = stream_r1_loss(x, tensors[f"{case}.grad"], torch.tensor([reward], dtype=torch.float64), tensors[f"{case}.weight"][None] if c["spatial"] else None,
                          tensors[f"{case}.mask"].bool() if c["mask"] else None, c["beta"])
    loss.backward()
    assert loss.item() == pytest.approx(tensors[f"{case}.loss"].item(), rel=1e-6)
    assert relative_error(x.grad, tensors[f"{case}.dloss_dx"]) < 1e-5


@pytest.fixture(scope="module")
def world():
    return load_teacher(), load_student(), load_reward(), [str(c) for c in caption_split()[0]]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_step(world, method):
    run = Distiller(*world, METHODS[method], Distillation(batch=2, critic_steps=1))
    before = [p.clone() for p in run.student.parameters()]
    record = run.step()
    assert "skipped" not in record and all(map(lambda v: v == v, record.values()))
    assert any(not torch.equal(a, b) for a, b in zip(before, run.student.parameters()))
    assert (record["weight"] == 1.0) == (METHODS[method].beta == 0)


@pytest.mark.parametrize("where, critic_steps", [("reward", 0), ("critic", 0), ("critic", 1)])
def test_a_step_that_is_not_finite_is_skipped_and_counted(world, where, critic_steps):
    run = Distiller(*world, METHODS["Stream-R1"], Distillation(batch=2, critic_steps=critic_steps))
    if where == "reward":
        good = run.reward
        run.reward = lambda pixels, prompts: {a: r * (float("inf") if a == "TA" else 1) for a, r in good(pixels, prompts).items()}
    else:
        next(run.critic.parameters()).data.fill_(float("nan"))
    before = [p.clone() for p in run.student.parameters()]
    record = run.step()
    assert record["skipped"].startswith("step 1: ") and "not finite" in record["skipped"] and run.skipped == 1
    assert run.critic_optimizer.state == {}                      # the critic was not trained on it either
    assert all(torch.equal(a, b) for a, b in zip(before, run.student.parameters()))


def test_balance_state_survives():
    a, b = AdaptiveBalance(window=4, warmup=2), AdaptiveBalance(window=4, warmup=2)
    for i in range(3):
        a.update({"VQ": float(i), "MQ": 0.0, "TA": 1.0})
    b.load_state_dict(a.state_dict())
    assert a.update({"VQ": 5.0, "MQ": 0.0, "TA": 1.0})[1] == b.update({"VQ": 5.0, "MQ": 0.0, "TA": 1.0})[1]
