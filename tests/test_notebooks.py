"""Notebooks are the source: exported, clean, executed, quiet, taught; and README.md is the index notebook."""
import filecmp
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from notebooks import NBS, ROOT, execute, fingerprint, notebooks, output_kinds, problems, readme, teaching

ALL = notebooks()
CHAPTERS = [p for p in ALL if p.name[:1].isdigit()]
by_name = pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)


def nbdev_copy(tmp_path, command):
    """Run an nbdev command on a copy of what it reads and writes."""
    for name in ("nbs", "streamr1_ref"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([str(Path(sys.executable).parent / command)], cwd=tmp_path, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    return tmp_path


def differences(a: Path, b: Path, pattern: str) -> list[str]:
    names = {p.name for p in a.glob(pattern)} | {p.name for p in b.glob(pattern)}
    return sorted(n for n in names if not ((a / n).exists() and (b / n).exists() and filecmp.cmp(a / n, b / n, shallow=False)))


def test_package_is_what_the_notebooks_export(tmp_path):
    copy = nbdev_copy(tmp_path, "nbdev_export")
    assert differences(copy / "streamr1_ref", ROOT / "streamr1_ref", "*.py") == [], "run: make export"


def test_notebooks_are_clean(tmp_path):
    copy = nbdev_copy(tmp_path, "nbdev_clean")
    assert differences(copy / "nbs", NBS, "*.ipynb") == [], "run: make notebooks"


@by_name
def test_outputs_are_in_order_and_quiet(path):
    assert problems(path) == []


@by_name
def test_runs_from_top_to_bottom_in_a_fresh_kernel(path):
    committed = nbformat.read(path, as_version=4)
    assert output_kinds(execute(path)) == output_kinds(committed), "other kinds of output than the committed ones: make notebooks"


def test_make_check_succeeds_and_lists_every_notebook():
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "notebooks.py"), "check"], capture_output=True, text=True)
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
    assert measures["words"] >= 800 and measures["median_cell"] <= 8 and measures["longest_cell"] <= 25, measures
    prose = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
    for part in ("The question of this chapter", "## What it looks like", "## Exercises", "<details><summary>Solution</summary>", "## What comes next"):
        assert part in prose, part
    assert re.search(r"^## A trap", prose, re.M)


def test_no_definition_twice():
    places = {}
    for path in ALL:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code" and "#| export" in cell.source:
                # two cells may patch methods of one name into different classes
                for name in re.findall(r"(?<!\n@patch)(?<!\))\n(?:def|class) ([A-Za-z]\w*)", "\n" + re.sub(r"@patch[^\n]*\n", "@patch\n", cell.source)):
                    places.setdefault(name, []).append(path.stem)
    assert {n: p for n, p in places.items() if len(p) > 1} == {}


def test_the_checks_see_what_they_should(tmp_path):
    """The checker itself: each kind of noise, a changed cell, a missing test."""
    nb = nbformat.read(CHAPTERS[0], as_version=4)
    path = tmp_path / "bad.ipynb"

    def found_with(change):
        bad = nbformat.reads(nbformat.writes(nb), as_version=4)
        change(bad)
        nbformat.write(bad, path)
        return " ".join(problems(path))

    stream = lambda text, name="stdout": lambda bad: bad.cells[-1].update(cell_type="code", outputs=[nbformat.v4.new_output("stream", text=text, name=name)],
                                                                          execution_count=None)
    code = lambda bad: next(c for c in bad.cells if c.cell_type == "code")
    assert found_with(lambda bad: None) == ""
    assert "absolute path" in found_with(stream("saved /home/me/x.png"))
    assert "timing" in found_with(stream("took 3.2 ms"))
    assert "warning" in found_with(stream("UserWarning: beware"))
    assert "stderr" in found_with(stream("x", "stderr"))
    assert "progress bar" in found_with(stream(" 45%|####    |"))
    assert "not those of its code" in found_with(lambda bad: code(bad).update(source=code(bad).source + "\n1 + 1"))

    def untested(bad):
        bad.cells = bad.cells[:1] + [nbformat.v4.new_code_cell("#| export\ndef naked(): pass"), nbformat.v4.new_code_cell("naked()")]
    found_with(untested)
    assert teaching(path)["untested"] == ["naked"]
    assert fingerprint(nb) != fingerprint(nbformat.read(path, as_version=4))
