"""The shipped reward model on held-out pairs; batches, lengths, and refusals."""

import pytest
import torch

from streamr1_ref.reward import AXES, pair_logits
from streamr1_ref.tiny.codec import load_codec
from streamr1_ref.tiny.reward import (
    RewardConfig,
    RewardTrainer,
    TinyReward,
    load_reward,
    pair_accuracy,
)
from streamr1_ref.tiny.teacher import run_training
from streamr1_ref.utils.files import data_path


@pytest.fixture(scope="module")
def codec():
    return load_codec(data_path("tiny_codec.safetensors"))


def test_held_out_accuracy(codec):
    accuracy = pair_accuracy(load_reward(), codec, seed=5)
    assert accuracy["VQ"] > 0.95 and accuracy["MQ"] > 0.95 and accuracy["TA"] > 0.90, accuracy


def test_the_shipped_file_is_small_and_holds_its_normalisation():
    path, model = data_path("tiny_reward.safetensors"), load_reward()
    assert path.stat().st_size < 2 * 2**20
    assert (model.std > 0.5).all() and model.mean.abs().max() > 0.1  # not the identity


@pytest.mark.parametrize("frames", [1, 5, 33, 41])
def test_any_number_of_frames_and_clips(frames):
    model, prompts = (
        load_reward(),
        ["a red 3 moving up", "a cyan 0 moving left slowly", "a blue 7 moving down"],
    )
    pixels = torch.rand(3, frames, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    together = model(pixels, prompts)
    for i in range(3):
        alone = model(pixels[i : i + 1], prompts[i : i + 1])
        assert all(torch.allclose(alone[a], together[a][i : i + 1], atol=1e-4) for a in AXES)


def test_ties_are_no_comparisons():
    assert pair_logits(torch.tensor([1.0, 2.0]), torch.tensor([1, 1])).numel() == 0


def test_training_resumes_bit_for_bit(codec, tmp_path):
    cfg = RewardConfig(steps=4, batch=4, save_every=2)
    whole, part, resumed = (RewardTrainer(cfg, codec) for _ in range(3))
    run_training(whole, tmp_path / "a", "s", "reward", progress=False)
    stop = iter([None, None, KeyboardInterrupt()])
    step = part.step

    def interrupted():
        if isinstance(error := next(stop), KeyboardInterrupt):
            raise error
        return step()

    part.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        run_training(part, tmp_path / "b", "s", "reward", progress=False)
    run_training(resumed, tmp_path / "b", "s", "reward", progress=False)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values())
    )
    assert (tmp_path / "a" / "log.jsonl").read_text() == (tmp_path / "b" / "log.jsonl").read_text()


def test_initial_weights_do_not_touch_the_global_random_state(codec):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    RewardTrainer(RewardConfig(), codec)
    assert torch.equal(before, torch.random.get_rng_state())
    assert isinstance(load_reward(), TinyReward)
