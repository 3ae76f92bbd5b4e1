"""Shared by all tests: golden files and seeded generators."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from streamr1_ref.utils.files import load_tensors

GOLDEN = Path(__file__).parent / "golden"


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
