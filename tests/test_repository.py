"""The repository as a stranger finds it: top level, pins, sizes, imports that run downhill, nothing hard-coded."""

import ast
import re
import subprocess
from configparser import ConfigParser

import pytest
from notebooks import ROOT, notebooks
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tracked = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
).stdout.splitlines()


@pytest.mark.skipif(not tracked, reason="not a git checkout")
def test_top_level_has_what_it_needs_and_nothing_that_was_left_behind():
    folders = {name.split("/")[0] for name in tracked if "/" in name}
    assert {"nbs", "streamr1_ref", "tests", "data_samples"} <= folders
    assert not folders & {
        "runs",
        "demo",
        "weights",
        "videos",
        "build",
        "dist",
        ".venv",
        "__pycache__",
    }
    files = {name for name in tracked if "/" not in name}
    assert {
        "settings.ini",
        "setup.py",
        "README.md",
        "Makefile",
        "LICENSE",
        "requirements.lock",
    } <= files
    stray = {
        f for f in files if re.search(r"\.(ipynb|safetensors|pth?|mp4|png|log|jsonl|csv|tmp)$", f)
    }
    assert not stray and {f for f in files if f.endswith(".py")} <= {"setup.py", "conftest.py"}


def test_lock_pins_everything():
    lines = [
        x
        for x in (ROOT / "requirements.lock").read_text().splitlines()
        if x and not x.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[0-9][A-Za-z0-9.!+]*", line) for line in lines)
    pins = {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines)}
    assert "+" not in pins["torch"]  # no build for one kind of machine only
    ini = ConfigParser(delimiters=["="], interpolation=None)
    ini.read(ROOT / "settings.ini")
    wanted = [
        Requirement(text)
        for extra in ("", "wan_", "dev_")
        for text in ini["DEFAULT"][f"{extra}requirements"].split()
    ]
    wrong = [
        f"{r}: {pins.get(canonicalize_name(r.name))}"
        for r in wanted
        if not r.specifier.contains(pins.get(canonicalize_name(r.name), "0"), prereleases=True)
    ]
    assert len(wanted) > 15 and wrong == []
    torch = next(r for r in wanted if r.name == "torch")
    assert all(s.operator != "==" for s in torch.specifier)  # a range for users, a pin for us


def imports(source: str, package: str) -> list[str]:
    """Modules of `package` that code imports, at the top or inside functions, in any form."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
        if isinstance(node, ast.Import):
            found += [n.split(".")[1] for n in names if n.startswith(f"{package}.")]
        elif isinstance(node, ast.ImportFrom):
            whole = f"{package}.{node.module or ''}".rstrip(".") if node.level else node.module
            if whole == package:
                found += names  # from . import name
            elif whole.startswith(f"{package}."):
                found.append(whole.split(".")[1])
    return found


def uphill(sources: dict[str, str], order: list[str], package: str = "streamr1_ref") -> list[str]:
    """Imports of a module by one that does not come after it in `order`, as "a imports b"."""
    return [
        f"{module} imports {other}"
        for module in order
        for other in imports(sources[module], package)
        if other in order and order.index(other) >= order.index(module)
    ]


def test_imports_run_downhill():
    """A module imports only modules of notebooks before its own."""
    texts = [p.read_text(encoding="utf-8") for p in notebooks()]
    order = [found[1] for text in texts if (found := re.search(r"default_exp (\w+)", text))]
    paths = (ROOT / "streamr1_ref").glob("*.py")
    sources = {p.stem: p.read_text(encoding="utf-8") for p in paths if not p.stem.startswith("_")}
    assert sources.keys() == set(order)
    assert sum(len(imports(s, "streamr1_ref")) for s in sources.values()) > 50
    assert uphill(sources, order) == []


@pytest.mark.parametrize(
    "line",
    [
        "from .b import x",
        "from . import b",
        "from .b.c import x",
        "import streamr1_ref.b",
        "from streamr1_ref import b",
        "from streamr1_ref.b import x",
        "from .a import x, y",
        "def f():\n    from .b import x",
        "class C:\n    def f(self):\n        from . import b as z",
    ],
)
def test_an_import_uphill_is_seen_in_any_form(line):
    assert len(uphill({"a": line, "b": "from .a import y"}, ["a", "b"])) == 1


def test_nothing_is_hard_coded():
    for path in (ROOT / "streamr1_ref").glob("*.py"):
        assert not re.search(
            r"\.cuda\(\)|\b1560\b|\b32760\b|range\(30\)|\bpickle\b|torch\.load\((?![^\n]*weights_only=True)",
            path.read_text(),
        ), path.name


def test_public_functions_have_docstrings():
    bare = []
    for path in (ROOT / "streamr1_ref").glob("[!_]*.py"):
        for node in ast.parse(path.read_text()).body:
            if (
                isinstance(node, (ast.FunctionDef, ast.ClassDef))
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                bare.append(f"{path.stem}.{node.name}")
    assert bare == []


@pytest.mark.skipif(not tracked, reason="not a git checkout")
def test_files_are_small_and_attributed():
    sizes = {name: (ROOT / name).stat().st_size for name in tracked}
    assert sizes["data_samples/big_buck_bunny.mp4"] < 300_000
    weights = sum(
        size
        for name, size in sizes.items()
        if name.startswith("data_samples/") and name.endswith(".safetensors")
    )
    assert max(sizes.values()) < 8 * 2**20
    assert weights < 16 * 2**20 and sum(sizes.values()) - weights < 16 * 2**20
    notes = (ROOT / "data_samples" / "README.md").read_text()
    assert "Blender Foundation" in notes and "creativecommons.org/licenses/by/3.0" in notes
    assert all(
        name.split("/")[1] in notes
        for name in tracked
        if name.startswith("data_samples/") and not name.endswith("README.md")
    )
