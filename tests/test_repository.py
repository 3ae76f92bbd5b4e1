"""The repository as a stranger finds it: top level, pins, sizes, imports that run downhill, nothing hard-coded."""
import ast
import re
import subprocess
from configparser import ConfigParser

import pytest
from notebooks import ROOT, notebooks

tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.skipif(not tracked, reason="not a git checkout")
def test_top_level_is_the_agreed_one():
    folders = {name.split("/")[0] for name in tracked if "/" in name}
    assert {f for f in folders if not f.startswith(".")} == {"nbs", "streamr1_ref", "tests", "data_samples"}
    files = {name for name in tracked if "/" not in name and not name.startswith(".")}
    assert files == {"settings.ini", "setup.py", "README.md", "Makefile", "LICENSE", "requirements.lock"}


def test_lock_pins_everything():
    lines = [x for x in (ROOT / "requirements.lock").read_text().splitlines() if x and not x.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[0-9][A-Za-z0-9.!+]*", line) for line in lines)
    pins = dict(line.lower().split("==") for line in lines)
    assert pins["torch"] == "2.13.0" and pins["nbdev"] == "2.4.14" and int(pins["fastcore"].split(".")[0]) < 2
    ini = ConfigParser(delimiters=["="], interpolation=None)
    ini.read(ROOT / "settings.ini")
    wanted = " ".join(ini["DEFAULT"][f"{extra}requirements"] for extra in ("", "wan_", "dev_")).split()
    normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    missing = {normal(re.split(r"[<>=]", w)[0]) for w in wanted} - {normal(p) for p in pins}
    assert not missing
    assert not re.search(r"torch==", ini["DEFAULT"]["requirements"])          # a range for users, a pin for us


def test_imports_run_downhill():
    """A module imports only modules of notebooks before its own."""
    order = [re.search(r"default_exp (\w+)", p.read_text())[1] for p in notebooks() if "default_exp" in p.read_text()]
    for place, module in enumerate(order):
        tree = ast.parse((ROOT / "streamr1_ref" / f"{module}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("streamr1_ref."):
                assert order.index(node.module.split(".")[1]) < place, f"{module} imports {node.module}"


def test_nothing_is_hard_coded():
    for path in (ROOT / "streamr1_ref").glob("*.py"):
        assert not re.search(r"\.cuda\(\)|\b1560\b|\b32760\b|range\(30\)|\bpickle\b|torch\.load\((?![^\n]*weights_only=True)", path.read_text()), path.name


def test_public_functions_have_docstrings():
    bare = []
    for path in (ROOT / "streamr1_ref").glob("[!_]*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node):
                bare.append(f"{path.stem}.{node.name}")
    assert bare == []


@pytest.mark.skipif(not tracked, reason="not a git checkout")
def test_files_are_small_and_attributed():
    sizes = {name: (ROOT / name).stat().st_size for name in tracked}
    assert sizes["data_samples/big_buck_bunny.mp4"] < 300_000
    assert max(sizes.values()) < 8 * 2**20 and sum(sizes.values()) < 20 * 2**20
    notes = (ROOT / "data_samples" / "README.md").read_text()
    assert "Blender Foundation" in notes and "creativecommons.org/licenses/by/3.0" in notes
    assert all(name.split("/")[1] in notes for name in tracked if name.startswith("data_samples/") and not name.endswith("README.md"))
