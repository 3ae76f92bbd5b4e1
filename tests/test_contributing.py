"""CONTRIBUTING.md: its examples run, its commands exist, and its table of new names is right."""

import ast
import re

import pytest
from notebooks import ROOT

from streamr1_ref import attention
from streamr1_ref.cli.main import main

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = {
    heading: block
    for heading, section in re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", TEXT, re.M | re.S)
    for block in re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
}
NAMES = TEXT[TEXT.index("<!-- names") : TEXT.index("<!-- end of names")]
ROWS = re.findall(r"^\| (.+?) \| (.+?) \|$", NAMES, re.M)
FLAGS = TEXT[TEXT.index("<!-- flags") : TEXT.index("<!-- end of flags")]
FLAG_ROWS = re.findall(r"^\| (.+?) \| `(.+?)` \| `(.+?)` \|$", FLAGS, re.M)


def test_there_is_an_example_of_each_kind():
    kinds = ("cache", "sampler", "objective", "reward", "attention kernel", "training method")
    assert [heading for heading in EXAMPLES] == [
        ("An " if kind[0] in "ao" else "A ") + kind for kind in kinds
    ]
    assert TEXT.count("```python") == len(EXAMPLES)
    assert all("assert" in block or "testing" in block for block in EXAMPLES.values())


@pytest.mark.parametrize("heading", EXAMPLES)
def test_example_runs(heading, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attention, "BACKENDS", attention.BACKENDS | {})  # an example adds to it
    code = compile(EXAMPLES[heading], f"CONTRIBUTING.md: {heading}", "exec")
    exec(code, {"__name__": "example"})


@pytest.mark.parametrize("heading", EXAMPLES)
def test_examples_are_narrow(heading):
    assert max(map(len, EXAMPLES[heading].splitlines())) <= 100


def test_commands_and_files_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"make (quick|check|test|format|notebooks|export|\w+(?=`))", TEXT))
    assert {"quick", "check", "test"} <= named <= targets
    files = re.findall(r"`((?:tests/|nbs/)?[\w/]+\.(?:py|toml|lock))`", TEXT)
    made = {"streamr1_ref/tiny/codec.py"}
    assert made <= set(files) and [f for f in files if not (ROOT / f).exists()] == []


def names_in(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What the statements of a module or class define or assign, by name."""
    found = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id: node for n in targets if isinstance(n, ast.Name)}
    return found


def exists(name: str) -> bool:
    """Whether "module", "module.name" or "module.Class.name" is there; nothing is imported."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        path = (ROOT / "streamr1_ref").joinpath(*parts[:n])
        if path.is_dir() and n == len(parts):
            return True
        if path.with_suffix(".py").exists():
            node = ast.parse(path.with_suffix(".py").read_text(encoding="utf-8"))
            for part in parts[n:]:
                node = names_in(getattr(node, "body", [])).get(part)
            return node is not None
    return False


@pytest.mark.parametrize("old, new", ROWS, ids=lambda text: text.replace("`", ""))
def test_new_name_exists(old, new):
    names = re.findall(r"`([\w.]+)`", new)
    assert names and re.fullmatch(r"`[\w.]+`", old)
    assert [name for name in names if not exists(name)] == []


def test_a_name_that_does_not_exist_is_seen():
    assert exists("flow.FlowSchedule.shift") and exists("tiny.world") and exists("flow")
    assert not exists("flow.FlowScheduler") and not exists("nowhere.at_all")
    assert not exists("cache.CacheConfig.nothing") and len(ROWS) > 10


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train tiny", "train wan-1.3b", "plan", "train-teacher"])
def test_new_flags_are_there_and_old_ones_are_not(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    shown = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
    rows = [row for row in FLAG_ROWS if f"`{command.split()[0]}`" in row[0]]
    assert rows and all(new.split()[0] in shown for _, _, new in rows)
    assert [old for _, old, _ in rows if old.split()[0] in shown] == []
