"""The shipped reward model on held-out pairs; batches, lengths, and refusals."""

import pytest
import torch

from streamr1_ref.reward import AXES, pair_logits
from streamr1_ref.tiny.codec import load_codec
from streamr1_ref.tiny.reward import load_reward, pair_accuracy
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
