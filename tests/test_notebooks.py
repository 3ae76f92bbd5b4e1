"""Notebooks are the source: exported, clean, executed, quiet, taught; README.md is the index."""

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
    MAX_CELL,
    MAX_PATCHES,
    NBS,
    ROOT,
    dead_links,
    execute,
    fingerprint,
    form,
    holds_one_class,
    is_test_of,
    links_from,
    module_of,
    notebooks,
    output_kinds,
    packed,
    parsed,
    patches,
    problems,
    readme,
    room,
    teaching,
    wide_lines,
    written,
)

ALL = notebooks()
REFERENCE = "A reference page"  # how a notebook says that it is no chapter
CHAPTERS = [p for p in ALL if p.name[:1].isdigit()]
FURTHER_PARTS = {  # of chapters in several notebooks: one module each
    "00_moving_digits": ("00b_oracle",),
    "06_self_forcing": ("06b_tiny_student",),
    "07_dmd_gradient": ("07b_plane",),
    "08_reward_model": ("08b_tiny_reward",),
    "15_wan": ("vae", "umt5", "published_runs"),
    "15b_full_scale": ("download", "score"),
}
PARTS = [stem for stems in FURTHER_PARTS.values() for stem in stems]
by_name = pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)


def nbdev_copy(tmp_path, command, damage):
    """Run an nbdev command on a copy of what it reads and writes, which `damage` changes first.

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
    damage(tmp_path)
    subprocess.run(
        [str(Path(sys.executable).parent / command)],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    return tmp_path


def differences(a: Path, b: Path, pattern: str) -> list[str]:
    """Paths below two folders that only one of them has, or that differ."""
    names = {p.relative_to(top) for top in (a, b) for p in top.rglob(pattern)}
    names = {n for n in names if ".ipynb_checkpoints" not in n.parts}

    def same(name: Path) -> bool:
        both = (a / name).exists() and (b / name).exists()
        return both and filecmp.cmp(a / name, b / name, shallow=False)

    return sorted(str(n) for n in names if not same(n))


def test_differences_are_seen_in_sub_folders(tmp_path):
    for side, text in (("a", "1"), ("b", "2")):
        (tmp_path / side / "room").mkdir(parents=True)
        (tmp_path / side / "room" / "x.py").write_text(text)
        (tmp_path / side / "same.py").write_text("0")
    assert differences(tmp_path / "a", tmp_path / "b", "*.py") == [os.path.join("room", "x.py")]


@pytest.mark.slow
def test_package_is_what_the_notebooks_export(tmp_path):
    def remove_the_package(copy):
        for path in copy.glob("streamr1_ref/**/*.py"):
            path.unlink()

    copy = nbdev_copy(tmp_path, "nbdev_export", remove_the_package)
    found = differences(copy / "streamr1_ref", ROOT / "streamr1_ref", "*.py")
    assert found == [], "run: make export"


@pytest.mark.slow
def test_exporting_twice_changes_nothing_and_keeps_the_version(tmp_path):
    """__init__.py comes from a notebook and nbdev writes the version into it."""

    def raise_version(copy):
        ini = copy / "settings.ini"
        ini.write_text(re.sub(r"(?m)^version = .*$", "version = 9.8.7", ini.read_text()))

    once = nbdev_copy(tmp_path / "once", "nbdev_export", raise_version)
    text = (once / "streamr1_ref" / "__init__.py").read_text()
    assert text.count("__version__ = ") == 1 and '__version__ = "9.8.7"' in text
    first = {p: p.read_text() for p in once.rglob("streamr1_ref/**/*.py")}
    nbdev_export = [str(Path(sys.executable).parent / "nbdev_export")]
    subprocess.run(nbdev_export, cwd=once, check=True, env={**os.environ, "PYTHONPATH": ""})
    assert {p: p.read_text() for p in once.rglob("streamr1_ref/**/*.py")} == first


@pytest.mark.slow
def test_notebooks_are_clean(tmp_path):
    def count_executions(copy):
        for path in copy.glob("nbs/**/*.ipynb"):
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


@pytest.mark.slow
@by_name
def test_runs_from_top_to_bottom_in_a_fresh_kernel(path):
    committed = nbformat.read(path, as_version=4)
    assert output_kinds(execute(path)) == output_kinds(committed), (
        "other kinds of output than the committed ones: make notebooks"
    )


@pytest.mark.slow
def test_make_check_succeeds_and_lists_every_notebook():
    check = [sys.executable, str(ROOT / "tests" / "notebooks.py"), "check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(path.stem in done.stdout for path in ALL)


def test_code_is_narrow_and_classes_are_whole():
    measures = form()
    assert measures["wide"] == []
    assert len(measures["patches"]) <= MAX_PATCHES, measures["patches"]
    assert measures["packed"] == []
    assert measures["longest cell"][0] <= MAX_CELL, measures["longest cell"]


def test_the_form_of_code_is_measured():
    patched = "@patch\ndef size(self: A): pass\n@patch(as_prop=True)\ndef area(self: A): pass"
    assert patches(patched + "\n@patched\nclass B:\n    def size(self): pass") == ["size", "area"]
    assert len(packed("f = lambda x: x\na, b, c, d = 1, 2, 3, 4")) == 2
    assert packed("a, b, c = 1, 2, 3\na, b, c, d = x.shape\nsort(key=lambda x: x)") == []
    source = f'"""{"x" * 120}"""\n# %% a.ipynb {"1" * 90}\n__all__ = ["{"n" * 100}"]\n'
    assert written(source) == [] and written(source + "y = 1") == ["y = 1"]
    long = "#| export\nclass A:\n" + "    x = 1\n" * 60
    assert holds_one_class(long) and not holds_one_class(long + "class B: pass")
    assert not holds_one_class(long.replace("#| export", "")) and not holds_one_class("x = 1")
    assert wide_lines(ROOT / "tests" / "conftest.py") == []


def test_readme_is_the_index():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run: make readme"


def test_index_lists_every_notebook_with_its_room():
    index = (NBS / "index.ipynb").read_text(encoding="utf-8")
    others = [p for p in ALL if p.stem != "index"]
    missing = [
        str(p.relative_to(NBS))
        for p in others
        if f"]({p.relative_to(NBS).as_posix()})" not in index
    ]
    assert missing == []
    modules = {p.stem: module_of(p) for p in others}
    unnamed = [m for m in modules.values() if m not in (None, "__init__") and f"`{m}`" not in index]
    assert unnamed == []


def test_links_of_documents_lead_somewhere():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        assert dead_links(path.read_text(encoding="utf-8"), ROOT) == [], path.name


def test_links_are_followed_from_the_folder_of_their_text():
    text = '[a](tiny/x.ipynb) [b](../CONTRIBUTING.md) <img src="../y.png"> [c](https://z/q.md)'
    seen = links_from(text, "nbs")
    assert "(nbs/tiny/x.ipynb)" in seen and '(CONTRIBUTING.md) <img src="y.png"' in seen
    assert "https://z/q.md" in seen
    assert dead_links(text, NBS) == ["tiny/x.ipynb", "../y.png"]
    assert dead_links("[chapter](../07_dmd_gradient.ipynb)", NBS / "tiny") == []


def test_modules_and_notebooks_stand_in_the_same_rooms():
    """nbs/tiny exports to streamr1_ref/tiny, and so on; reference pages export to several."""
    for path in ALL:
        module = module_of(path) or ""
        if room(path) not in ("", "reference") and module:
            assert module.split(".")[0] == room(path), f"{path.name} exports {module}"


@by_name
def test_every_exported_definition_has_a_test_behind_it(path):
    assert teaching(path)["untested"] == []


def prose(path: Path) -> str:
    """All Markdown of a notebook."""
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(c.source for c in cells if c.cell_type == "markdown")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_cells_are_short(path):
    assert teaching(path)["longest_cell"] <= MAX_CELL


@pytest.mark.parametrize("path", [p for p in CHAPTERS if p.stem not in PARTS], ids=lambda p: p.stem)
def test_chapters_teach(path):
    further = [p for p in ALL if p.stem in FURTHER_PARTS.get(path.stem, ())]
    text = "\n".join(map(prose, [path, *further]))
    assert len(text.split()) >= 800
    if REFERENCE in text[:1000]:
        return  # it is looked up, not read in order
    for part in (
        "The question of this chapter",
        "## What it looks like",
        "## Exercises",
        "<details><summary>Solution</summary>",
        "## What comes next",
    ):
        assert part in text, part
    assert re.search(r"^## A trap", text, re.M)


def twice(exported: dict[tuple[str, str], list[str]]) -> dict[tuple[str, str], list[str]]:
    """Functions and classes that one package defines in more than one place.

    `exported` is {(package, notebook): exported cells}; what is found is {(package, name):
    notebooks}. What is patched into a class is not counted: two classes may have methods of one
    name. Two packages may have a name each: `tiny.models` and `wan.models` are told apart.
    """
    places = {}
    for (package, notebook), cells in exported.items():
        for node in (node for cell in cells for node in parsed(cell).body):
            patched = "patch" in " ".join(map(ast.unparse, getattr(node, "decorator_list", [])))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not patched:
                places.setdefault((package, node.name), []).append(notebook)
    return {name: found for name, found in places.items() if len(found) > 1}


def test_no_definition_twice_in_a_package():
    exported = {
        ((module_of(p) or "").rpartition(".")[0], p.stem): [
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
    first = {("tiny", "a"): ["class Settings: pass"]}
    assert twice({**first, ("tiny", "b"): [again]}) == {("tiny", "Settings"): ["a", "b"]}
    assert twice({**first, ("wan", "b"): [again]}) == {}
    assert twice({("", "a"): [method.format("A")], ("", "b"): [method.format("B")]}) == {}


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
    nb.metadata["executed"] = fingerprint(nb)  # as if it had just been run
    path = tmp_path / "bad.ipynb"

    def found_with(change):
        bad = nbformat.reads(nbformat.writes(nb), as_version=4)
        change(bad)
        nbformat.write(bad, path)
        return " ".join(problems(path))

    def stream(text, name="stdout"):
        outputs = [nbformat.v4.new_output("stream", text=text, name=name)]
        change = dict(cell_type="code", outputs=outputs, execution_count=None)
        return lambda bad: bad.cells[-1].update(change)

    def code(bad):
        return next(c for c in bad.cells if c.cell_type == "code")

    # links are seen from the folder of the notebook, and the copy stands in another one
    nb.cells = [c for c in nb.cells if c.cell_type == "code" or not dead_links(c.source, tmp_path)]
    assert found_with(lambda bad: None) == ""
    assert "absolute path" in found_with(stream("saved /home/me/x.png"))
    assert "timing" in found_with(stream("took 3.2 ms"))
    assert "warning" in found_with(stream("UserWarning: beware"))
    assert "stderr" in found_with(stream("x", "stderr"))
    assert "progress bar" in found_with(stream(" 45%|####    |"))
    prose = nbformat.v4.new_markdown_cell("see [there](no_such.ipynb)")
    assert "no_such.ipynb, which is not there" in found_with(lambda bad: bad.cells.append(prose))
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
