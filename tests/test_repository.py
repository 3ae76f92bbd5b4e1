"""The repository as a stranger finds it: top level, pins, sizes, imports that run downhill."""

import ast
import re
import subprocess
from collections.abc import Collection
from configparser import ConfigParser
from graphlib import TopologicalSorter

import pytest
from conftest import SLOW
from notebooks import ROOT, module_of, notebooks, package_files
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
        "CONTRIBUTING.md",
        "Makefile",
        "LICENSE",
        "pyproject.toml",
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


PACKAGE = "streamr1_ref"
METHOD = """flow transformer attention cache rollout dmd reward reliability saliency balance
objective pipeline""".split()  # the components and their composition: they know no room


def sources() -> dict[str, str]:
    """{module below the package, such as "cache" or "tiny.world": its code}."""
    paths = [p.relative_to(ROOT / PACKAGE) for p in package_files()]
    return {
        ".".join(p.with_suffix("").parts): (ROOT / PACKAGE / p).read_text(encoding="utf-8")
        for p in paths
    }


def order() -> list[str]:
    """Modules in the order of the course, from ORDER of tests/notebooks.py."""
    return [module for path in notebooks() if (module := module_of(path))]


def imports(source: str, module: str, known: Collection[str]) -> list[str]:
    """Modules, of `known`, that the code of `module` imports: anywhere in it and in any form.

    Relative imports of any depth, names of a package that are modules, imports in functions, and
    under TYPE_CHECKING. A name of the package itself, as in `from streamr1_ref import WanConfig`,
    counts as an import of "__init__". Strings, as in a registry of lazy imports, do not count.
    """

    def owner(path: str) -> str | None:  # the module in which a dotted path ends
        while path and path not in known:
            path = path.rpartition(".")[0]
        return path or None

    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths = [a.name for a in node.names if a.name.split(".")[0] == PACKAGE]
            inside = [path.partition(".")[2] for path in paths]
            found += [owner(path) or "__init__" for path in inside]
        elif isinstance(node, ast.ImportFrom):
            whole = (node.module or "").split(".")
            if node.level:
                above = f"{PACKAGE}.{module}".split(".")[: -node.level]
                whole = [*above, *filter(None, whole)]
            if whole[0] == PACKAGE:
                paths = [".".join([*whole[1:], alias.name]) for alias in node.names]
                found += [owner(path) or "__init__" for path in paths]
    return list(dict.fromkeys(found))


def uphill(code: dict[str, str], order: list[str]) -> list[str]:
    """Imports of a module by one that does not come after it in `order`, as "a imports b"."""
    return [
        f"{module} imports {other}"
        for module in order
        for other in imports(code[module], module, order)
        if other not in order or order.index(other) >= order.index(module)
    ]


def reached(code: dict[str, str], module: str) -> set[str]:
    """All modules that importing `module` may import, over any number of steps."""
    found, new = set(), {module}
    while new:
        found |= new
        new = {other for m in new for other in imports(code[m], m, code)} - found
    return found - {module}


def test_imports_run_downhill():
    """A module imports only modules of notebooks before its own, so that there is no cycle."""
    code = sources()
    assert code.keys() == set(order())
    graph = {module: imports(text, module, code) for module, text in code.items()}
    assert sum(map(len, graph.values())) > 100
    assert uphill(code, order()) == []
    TopologicalSorter(graph).prepare()  # CycleError names a cycle


@pytest.mark.parametrize("module", METHOD)
def test_the_method_knows_neither_tiny_nor_wan(module):
    rooms = {other.split(".")[0] for other in reached(sources(), module) if "." in other}
    assert not rooms & {"tiny", "wan", "cli"}


def test_utils_stand_at_the_bottom():
    code = sources()
    utils = [module for module in code if module.startswith("utils.")]
    outside = [o for m in utils for o in imports(code[m], m, code) if not o.startswith("utils.")]
    assert len(utils) >= 3 and outside == []


FORMS = [
    "from .b import x",
    "from . import b",
    "import streamr1_ref.b",
    "import streamr1_ref.b as short",
    "from streamr1_ref import b",
    "from streamr1_ref.b import (\n    x,\n)",
    "from .a import x, y",
    "from .room import c",
    "from .room.c import x",
    "from . import first\nfrom .room import c as d",
    "import streamr1_ref.room.c",
    "from streamr1_ref.room import c",
    "from streamr1_ref import WanConfig",
    "import streamr1_ref",
    "def f():\n    from .b import x",
    "class C:\n    def f(self):\n        from . import b as z",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import x",
    "try:\n    from .b import x\nexcept ImportError:\n    x = None",
]
FORMS_IN_A_ROOM = [
    "from ..b import x",
    "from .. import b",
    "from .c import x",
    "from . import c",
    "from ..room.c import x",
    "from ..room import c",
    "from streamr1_ref.room.c import x",
    "def f():\n    from ..b import x",
]


@pytest.mark.parametrize(
    "module, line", [("a", f) for f in FORMS] + [("room.a", f) for f in FORMS_IN_A_ROOM]
)
def test_an_import_uphill_is_seen_in_any_form(module, line):
    names = ["first", module, "b", "room.c", "__init__"]
    code = dict.fromkeys(names, "") | {module: line}
    assert len(uphill(code, names)) == 1


@pytest.mark.parametrize("module", ["objective", "utils.files", "tiny.world"])
def test_an_import_uphill_is_seen_in_the_package(module):
    """The test above could fail: a line is added to a real module."""
    dots = "." * (module.count(".") + 1)
    code = sources()
    code[module] += f"\n\ndef late():\n    from {dots}cli import main\n"
    assert uphill(code, order()) == [f"{module} imports cli.main"]


@pytest.mark.parametrize(
    "line",
    [
        "from .first import x",
        "import torch.b",
        "from torch import b",
        "REGISTRY = {'b': 'streamr1_ref.b:make'}",
        "from importlib import import_module\nimport_module('streamr1_ref.b')",
        '"from .b import x"',
    ],
)
def test_what_is_not_uphill_is_not_taken_for_it(line):
    assert uphill({"first": "", "a": line, "b": ""}, ["first", "a", "b"]) == []


def test_what_is_reached_over_steps_is_found():
    code = {"a": "", "tiny.b": "from ..a import x", "c": "from .tiny.b import y", "d": "import c"}
    assert reached(code, "c") == {"tiny.b", "a"} and reached(code, "d") == set()


HARD_CODED = {
    "a device": r"\.cuda\(\)",
    "tokens of a frame or a clip": r"\b1560\b|\b32760\b",
    "layers of one network": r"range\(30\)",
    "a format that runs code": r"\bpickle\b|torch\.load\((?![^\n]*weights_only=True)",
}


def test_nothing_is_hard_coded():
    found = [
        f"{module}: {what}"
        for module, code in sources().items()
        for what, pattern in HARD_CODED.items()
        if re.search(pattern, code)
    ]
    assert found == []


def test_slow_tests_exist():
    """Else a renamed test would come back into `make quick` unseen."""
    texts = {name: (ROOT / "tests" / name).read_text(encoding="utf-8") for name in SLOW}
    assert [n for f, names in SLOW.items() for n in names if f"def {n}(" not in texts[f]] == []


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
