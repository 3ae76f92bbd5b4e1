"""Notebooks are the source: exported, clean, executed, quiet, taught; and README.md is the index notebook."""

import ast
import filecmp
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from notebooks import (
    NBS,
    ROOT,
    execute,
    fingerprint,
    is_test_of,
    notebooks,
    output_kinds,
    parsed,
    problems,
    readme,
    teaching,
)

ALL = notebooks()
REFERENCE = "A reference page"  # how a notebook says that it is no chapter
CHAPTERS = [p for p in ALL if p.name[:1].isdigit()]
by_name = pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)


def nbdev_copy(tmp_path, command, corrupt_by_levels):
    """Run an nbdev command on a copy of what it reads and writes, which `corrupt_by_levels` damages first.

    Else a command that does nothing would leave what it should have written.
    """
    for name in ("nbs", "streamr1_ref"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    for name in ("settings.ini", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    corrupt_by_levels(tmp_path)
    subprocess.run(
        [str(Path(sys.executable).parent / command)],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    return tmp_path


def differences(a: Path, b: Path, pattern: str) -> list[str]:
    names = {p.name for p in a.glob(pattern)} | {p.name for p in b.glob(pattern)}
    return sorted(
        n
        for n in names
        if not ((a / n).exists() and (b / n).exists() and filecmp.cmp(a / n, b / n, shallow=False))
    )


def test_package_is_what_the_notebooks_export(tmp_path):
    def remove_the_package(copy):
        for path in copy.glob("streamr1_ref/[!_]*.py"):
            path.unlink()

    copy = nbdev_copy(tmp_path, "nbdev_export", remove_the_package)
    assert differences(copy / "streamr1_ref", ROOT / "streamr1_ref", "*.py") == [], (
        "run: make export"
    )


def test_notebooks_are_clean(tmp_path):
    def count_executions(copy):
        for path in copy.glob("nbs/*.ipynb"):
            nb = nbformat.read(path, as_version=4)
            for cell in nb.cells:
                if cell.cell_type == "code":
                    cell.execution_count = 7
            nbformat.write(nb, path)

    copy = nbdev_copy(tmp_path, "nbdev_clean", count_executions)
    assert differences(copy / "nbs", NBS, "*.ipynb") == [], "run: make notebooks"


@by_name
def test_outputs_are_in_order_and_quiet(path):
    assert problems(path) == []


@by_name
def test_runs_from_top_to_bottom_in_a_fresh_kernel(path):
    committed = nbformat.read(path, as_version=4)
    assert output_kinds(execute(path)) == output_kinds(committed), (
        "other kinds of output than the committed ones: make notebooks"
    )


def test_make_check_succeeds_and_lists_every_notebook():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "notebooks.py"), "check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert all(path.stem in done.stdout for path in ALL)


def test_readme_is_the_index():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run: make readme"


@by_name
def test_every_exported_definition_has_a_test_behind_it(path):
    assert teaching(path)["untested"] == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapters_teach(path):
    measures = teaching(path)
    assert measures["words"] >= 800 and measures["longest_cell"] <= 40, measures
    cells = nbformat.read(path, as_version=4).cells
    prose = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    if REFERENCE in cells[0].source:
        return  # it is looked up, not read in order
    for part in (
        "The question of this chapter",
        "## What it looks like",
        "## Exercises",
        "<details><summary>Solution</summary>",
        "## What comes next",
    ):
        assert part in prose, part
    assert re.search(r"^## A trap", prose, re.M)


def twice(exported: dict[str, list[str]]) -> dict[str, list[str]]:
    """Functions and classes that are defined in more than one place, of {notebook: its exported cells}.

    What is patched into a class is not counted: two classes may have methods of one name.
    """
    places = {}
    for notebook, cells in exported.items():
        for node in (node for cell in cells for node in parsed(cell).body):
            patched = "patch" in " ".join(map(ast.unparse, getattr(node, "decorator_list", [])))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not patched:
                places.setdefault(node.name, []).append(notebook)
    return {name: found for name, found in places.items() if len(found) > 1}


def test_no_definition_twice():
    exported = {
        p.stem: [
            c.source
            for c in nbformat.read(p, as_version=4).cells
            if c.cell_type == "code" and "#| export" in c.source
        ]
        for p in ALL
    }
    assert sum(map(len, exported.values())) > 100 and twice(exported) == {}


def test_a_second_definition_is_seen():
    again = "x = f()\n@dataclass(frozen=True)\nclass Settings:\n    a: int = 1"
    method = "@patch(as_prop=True)\ndef size(self: {}): return 1"
    assert twice({"a": ["class Settings: pass"], "b": [again]}) == {"Settings": ["a", "b"]}
    assert twice({"a": [method.format("A")], "b": [method.format("B")]}) == {}


@pytest.mark.parametrize(
    "source",
    [
        "test_eq(thing(2), 4)",
        "assert thing(2) == 4",
        "made = thing(2)\nassert made > 3",
        "test_fail(lambda: thing(None), contains='expected')",
        "assert all(x > 0 for x in map(thing, data))",
        "half = lambda x: thing(x) / 2\ntest_eq(half(4), 2)",
        "thing(target)\ntest_eq(len(target), 1)",
        "object.thing()\ntest_eq(object.state, 1)",
        "for x in thing(3):\n    test_eq(x, 1)",
        "%matplotlib inline\nwith thing() as opened:\n    assert opened.ready",
    ],
)
def test_a_test_of_a_thing_is_seen(source):
    assert is_test_of(source, ["thing"])


@pytest.mark.parametrize(
    "source",
    [
        "thing(2)",
        "thing(2)\nassert True",
        "other = 4\nthing(other)\nassert 2 + 2 == 4",
        "test_eq(unrelated(2), 4)",
        "thing(2)\ntest_eq(unrelated(2), 4)",
        "assert thing(2) == thing(2)",
        "test_eq(thing, thing)",
        "assert (thing(2) == 4, 'the message makes it a tuple')",
        "print(thing(2)); text = 'a'\nassert text == 'a'",
        "#| export\nassert thing(2)",
        "# test_eq(thing(2), 4)\nthing(2)",
        "test_thing = 1\nthing(2)",
        "print(f'test_ {thing(2)} assert')",
    ],
)
def test_no_test_of_a_thing_is_not_taken_for_one(source):
    assert not is_test_of(source, ["thing"])


def test_the_checks_see_what_they_should(tmp_path):
    """The checker itself: each kind of noise, a changed cell, a missing test."""
    nb = nbformat.read(CHAPTERS[0], as_version=4)
    path = tmp_path / "bad.ipynb"

    def found_with(change):
        bad = nbformat.reads(nbformat.writes(nb), as_version=4)
        change(bad)
        nbformat.write(bad, path)
        return " ".join(problems(path))

    stream = lambda text, name="stdout": (
        lambda bad: bad.cells[-1].update(
            cell_type="code",
            outputs=[nbformat.v4.new_output("stream", text=text, name=name)],
            execution_count=None,
        )
    )
    code = lambda bad: next(c for c in bad.cells if c.cell_type == "code")
    assert found_with(lambda bad: None) == ""
    assert "absolute path" in found_with(stream("saved /home/me/x.png"))
    assert "timing" in found_with(stream("took 3.2 ms"))
    assert "warning" in found_with(stream("UserWarning: beware"))
    assert "stderr" in found_with(stream("x", "stderr"))
    assert "progress bar" in found_with(stream(" 45%|####    |"))
    assert "not those of its code" in found_with(
        lambda bad: code(bad).update(source=code(bad).source + "\n1 + 1")
    )

    def untested(*behind):
        sources = ["#| export\ndef naked(): pass", *behind]
        code = list(map(nbformat.v4.new_code_cell, sources))
        found_with(lambda bad: bad.update(cells=bad.cells[:1] + code))
        return teaching(path)["untested"]

    assert untested("naked()") == ["naked"] == untested("naked()", "assert 1 + 1 == 2")
    assert untested("1", "assert naked() is None") == []
    assert untested("1", "2", "3", "assert naked() is None") == ["naked"]  # too far behind
    assert fingerprint(nb) != fingerprint(nbformat.read(path, as_version=4))
