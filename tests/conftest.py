"""Shared by all tests: golden files and seeded generators."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from streamr1_ref.transformer import WanConfig
from streamr1_ref.utils.files import load_tensors

GOLDEN = Path(__file__).parent / "golden"
SMALL_NET = WanConfig(
    dim=48,
    ffn_dim=96,
    num_heads=2,
    num_layers=2,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=32,
    latent_size=(4, 6),
)

# What `make quick` leaves out: tests that start processes, train, or take over two seconds on an
# idle core. A whole file is an empty list. Marks at a test (`@pytest.mark.slow`) add to these.
SLOW = {
    "test_budget.py": [],  # measures whole steps on the meta device
    "test_cli.py": [],
    "test_download.py": [],
    "test_exact.py": [],
    "test_reward.py": ["test_held_out_accuracy"],
    "test_teacher.py": [],
    "test_train.py": [],
    "test_attention.py": ["test_kernels_agree"],
    "test_cache.py": [
        "test_memory_is_allocated_once",
        "test_no_host_synchronisation_and_no_data_dependent_python",
    ],
    "test_codec.py": ["test_shipped_codec_is_what_the_command_makes"],
    "test_conventions.py": ["test_a_killed_writer_leaves_a_whole_file"],
    "test_dmd.py": ["test_student_that_equals_the_target_has_no_gradient"],
    "test_objective.py": ["test_every_method_takes_a_step"],
    "test_video_reward.py": ["test_videoreward_saved_bytes_at_true_size"],
    "test_wan.py": [
        "test_compiled_layers_stream_the_same_video",
        "test_processes_mixed_precision_recomputing_and_offloading",
        "test_processes_share_the_prompts",
        "test_the_command_generates_from_a_checkpoint",
        "test_the_command_trains_with_every_real_component",
        "test_the_critic_has_a_size_of_its_own",
        "test_too_little_gpu_memory_is_refused_with_the_plans_figures",
    ],
    "test_rollout.py": [
        "test_a_training_rollout_keeps_no_copy_of_the_past",
        "test_an_endless_stream_keeps_no_history",
    ],
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what SLOW names, and tests that are skipped without a GPU."""
    for item in items:
        names = SLOW.get(item.path.name)
        if names is not None and (not names or item.originalname in names):
            item.add_marker("slow")
        if any("GPU" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif")):
            item.add_marker("gpu")


@pytest.fixture
def golden():
    """golden("name") -> (tensors, settings) of tests/golden/name.*"""
    return lambda name: (
        load_tensors(GOLDEN / f"{name}.safetensors")[0],
        json.loads((GOLDEN / f"{name}.json").read_text()),
    )


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|. NaN is a failure at once: Python's max and min would pass over it."""
    error = ((a - b).norm() / b.norm()).item()
    assert error == error, "the relative error is not a number"
    return error
