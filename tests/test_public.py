"""`from streamr1_ref import ...`: which names there are, and what an import brings in and costs."""

import importlib
import subprocess
import sys

import pytest

import streamr1_ref

# what the method does not need: video, widgets, figures, other packages' models, command lines
HEAVY = {"av", "IPython", "ipywidgets", "matplotlib", "sklearn", "diffusers", "transformers", "PIL"}
HEAVY |= {"tyro"}


def fresh(code: str) -> str:
    """What `code` prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(statement: str) -> set[str]:
    """Modules that are loaded after `statement`, in a process of its own."""
    return set(fresh(f"{statement}\nimport sys; print(*sys.modules)").split())


def test_public_names_are_about_ten_and_resolve():
    assert len(streamr1_ref.__all__) <= 16 and set(streamr1_ref.__all__) <= set(dir(streamr1_ref))
    for name in streamr1_ref.__all__:
        found = getattr(streamr1_ref, name)
        assert found is getattr(importlib.import_module(found.__module__), name)


def test_api_names_are_where_scripts_expect_them():
    expected = {
        "flow": ["FlowSchedule"],
        "transformer": ["WanConfig", "WanTransformer", "load_wan_weights"],
        "cache": ["CacheConfig"],
        "rollout": ["StreamSampler", "self_forcing_rollout"],
        "dmd": ["dmd_gradient", "critic_loss"],
        "reliability": ["rollout_weight"],
        "saliency": ["pixel_saliency", "pool_to_latent", "fuse_axes", "factor_weights"],
        "balance": ["AdaptiveBalance"],
        "objective": ["stream_r1_loss"],
    }
    missing = [
        f"{module}.{name}"
        for module, wanted in expected.items()
        for name in wanted
        if not hasattr(importlib.import_module(f"streamr1_ref.{module}"), name)
    ]
    assert missing == []


def test_unknown_name_is_refused_with_a_hint():
    with pytest.raises(AttributeError, match="did you mean FlowSchedule"):
        streamr1_ref.FlowSchedul
    with pytest.raises(AttributeError, match="StreamR1Pipeline.*streamr1_ref.cache"):
        streamr1_ref.zebra
    with pytest.raises(ImportError):
        from streamr1_ref import zebra  # noqa: F401


@pytest.mark.slow
def test_importing_the_package_is_quick_and_loads_no_torch():
    code = """
import sys, time
begin = time.perf_counter()
import streamr1_ref
print(time.perf_counter() - begin, *sys.modules)
"""
    seconds, *modules = fresh(code).split()
    assert "torch" not in modules and "numpy" not in modules
    assert float(seconds) < 1.0  # measured 2 ms; the bound leaves room for a busy machine


@pytest.mark.slow
def test_a_name_loads_no_more_than_its_module():
    modules = loaded_by("from streamr1_ref import FlowSchedule")
    assert "torch" in modules and "streamr1_ref.flow" in modules
    assert "streamr1_ref.transformer" not in modules


@pytest.mark.slow
@pytest.mark.parametrize("module", ["transformer", "cache", "rollout", "dmd", "objective"])
def test_a_core_module_brings_in_nothing_heavy(module):
    modules = loaded_by(f"import streamr1_ref.{module}")
    assert not HEAVY & modules
    assert not [m for m in modules if m.startswith(("streamr1_ref.tiny", "streamr1_ref.wan"))]


@pytest.mark.slow
def test_heavy_modules_would_be_seen():
    assert {"PIL", "streamr1_ref"} <= loaded_by("import streamr1_ref, PIL") & (
        HEAVY | {"streamr1_ref"}
    )
