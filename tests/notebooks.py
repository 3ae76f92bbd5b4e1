"""Run, check and publish notebooks: `python tests/notebooks.py run|check|readme [notebook ...]`.

`run` executes notebooks in fresh kernels and saves them with their outputs, `check` lists what is
wrong with the committed ones and with the code's form (ruff), `readme` writes README.md from
nbs/index.ipynb.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
STATIC = {
    "STREAMR1_STATIC": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYTHONWARNINGS": "ignore",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}  # on a busy machine spinning threads slow a notebook down tenfold
NOISE = {
    "absolute path": r"(?<![\w.:/])/(?:home|root|tmp|usr|work|mnt|Users|var)/|[A-Z]:\\\\",
    "timing": r"\b\d+(?:\.\d+)?\s?(?:ms|µs|us|seconds|it/s|s/it)\b|Wall time|CPU times",
    "warning": r"Warning\b|\bDeprecat",
    "progress bar": r"\d+%\|",
    "widget without a kernel": r"application/vnd\.jupyter\.widget-view",
}

WIDTH = 100  # columns, as in pyproject.toml
MAX_PATCHES = 5  # of the whole package: only a later chapter adds to an earlier class
MAX_CELL = 40  # lines; a class stays whole

# the order of the course; a module imports only modules of notebooks before its own
ORDER = """
conventions files runtime video widgets ports
health method distributed checkpoint tracking 13_training
00_moving_digits 00b_oracle 01_latents 02_flow_matching 03_transformer text
03b_tiny_teacher 03c_exact_teacher 03d_better_teacher 04_causal_attention 05_sink_cache
06_self_forcing 06b_tiny_student 07_dmd_gradient 07b_plane 08_reward_model 08b_tiny_reward
09_reward_weighting 10_saliency 11_adaptive_balancing 12_stream_r1 models presets 14_streaming
pipeline player vae 15_wan umt5 15a_video_reward download 15b_full_scale score published_runs
15c_budget 16_ablation published errata interface public
processes demo wan_run train prepare generate rebuild timing bench_wan bench cli index
""".split()


def notebooks(names: list[str] = ()) -> list[Path]:
    """The notebooks called `names` (stems), or all, in the order of the course."""
    found = {p.stem: p for p in NBS.rglob("*.ipynb") if not p.name.startswith(("_", "."))}
    if unknown := (set(names) | set(ORDER)) - set(found):
        have = ", ".join(found)
        raise SystemExit(f"no such notebook: {', '.join(sorted(unknown))}; there are {have}")
    if left_out := set(found) - set(ORDER):
        raise SystemExit(f"not in ORDER of tests/notebooks.py: {', '.join(sorted(left_out))}")
    return [found[stem] for stem in ORDER if not names or stem in names]


def room(path: Path) -> str:
    """The folder of a notebook below nbs/, such as "tiny"; "" for the chapters at the top."""
    folder = path.parent
    return "" if not folder.is_relative_to(NBS) or folder == NBS else str(folder.relative_to(NBS))


def module_of(path: Path) -> str | None:
    """The module that a notebook exports, such as "tiny.world"; None if it exports none."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and (m := re.search(r"^#\|\s*default_exp (\S+)", cell.source)):
            return m[1]
    return None


def fingerprint(nb: nbformat.NotebookNode) -> str:
    """Hash of all code cells in their order. `run` stores it: outputs belong to this code."""
    return hashlib.sha256(
        json.dumps([c.source for c in nb.cells if c.cell_type == "code"]).encode()
    ).hexdigest()[:16]


def execute(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in a fresh kernel, in its own folder, and return it with its outputs."""
    nb = nbformat.read(path, as_version=4)
    env = {**os.environ, **STATIC}
    client = NotebookClient(
        nb,
        timeout=600,
        kernel_name="python3",
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
        coalesce_streams=True,
    )  # else one cell's prints come in two parts where the machine pauses
    client.execute(env=env)
    nb.metadata = {
        "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
        "executed": fingerprint(nb),
    }
    return nb


def output_kinds(nb: nbformat.NotebookNode) -> list[list[str]]:
    """What each code cell put out: stream names and MIME types, in order."""

    def kind(o: nbformat.NotebookNode) -> str:
        return (
            o.name if o.output_type == "stream" else "+".join(sorted(o.get("data", {"error": 0})))
        )

    return [[kind(o) for o in c.outputs] for c in nb.cells if c.cell_type == "code"]


def problems(path: Path) -> list[str]:
    """What is wrong with a committed notebook, one sentence each; empty if nothing is."""
    nb, found = nbformat.read(path, as_version=4), []
    if nb.metadata.get("executed") != fingerprint(nb):
        found.append("its outputs are not those of its code, run in order (make notebooks)")
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            found += [
                f"cell {i} links to {link}, which is not there"
                for link in dead_links(cell.source, path.parent)
            ]
        for output in cell.get("outputs", []):
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"cell {i} holds an error or wrote to stderr")
            data = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
            text = json.dumps([output.get("text", ""), data], ensure_ascii=False)
            found += [
                f"cell {i} holds a {name}: {hit[0]!r}"
                for name, pattern in NOISE.items()
                if (hit := re.search(pattern, text))
            ]
    if len(json.dumps(nb)) > 1_500_000:
        found.append(f"it is larger than 1.5 MB ({len(json.dumps(nb)) / 1e6:.1f} MB)")
    return found


LINK = re.compile(r"(?P<before>\]\(|src=\")(?P<to>[\w./-]+\.(?:ipynb|md|py|png|gif|mp4|txt|toml))")


def dead_links(text: str, folder: Path) -> list[str]:
    """Relative links of a text in `folder` to files that do not exist."""
    return [m["to"] for m in LINK.finditer(text) if not (folder / m["to"]).exists()]


def links_from(text: str, folder: str) -> str:
    """A text that stood in `folder`, with its relative links as seen from the top folder."""

    def seen(m: re.Match) -> str:
        return m["before"] + os.path.normpath(os.path.join(folder, m["to"])).replace(os.sep, "/")

    return LINK.sub(seen, text)


def parsed(source: str) -> ast.Module:
    """A cell's code as a tree; lines for the notebook (%magic, !command) count as nothing."""
    return ast.parse(re.sub(r"^[%!].*$", "pass", source, flags=re.M))


def defined(source: str) -> list[str]:
    """What a cell defines.

    A patched special method, or forward, stands under its class's name: it is used without its own.
    """
    found = []
    for node in parsed(source).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        hidden = node.name.startswith("__") or node.name == "forward"
        owner = node.args.args[0].annotation if hidden and node.args.args else None
        found.append(owner.id if isinstance(owner, ast.Name) else node.name)
    return found


def mentioned(tree: ast.AST) -> set[str]:
    """All names and attributes in a piece of code."""
    nodes = list(ast.walk(tree))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {
        n.attr for n in nodes if isinstance(n, ast.Attribute)
    }


def checks(tree: ast.AST) -> list[ast.AST]:
    """What a cell asserts: conditions, and calls of fastcore's test_eq, test_close, test_fail."""
    calls = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.Call)
        and isinstance(n.func, ast.Name)
        and n.func.id.startswith("test_")
    ]
    return [n.test for n in ast.walk(tree) if isinstance(n, ast.Assert)] + calls


def can_fail(check: ast.AST) -> bool:
    """False for a comparison of something with itself, and for a tuple, which is always true."""
    sides = [check]
    if isinstance(check, ast.Compare):
        sides = [check.left, *check.comparators]
    elif isinstance(check, ast.Call) and getattr(check.func, "id", "") in ("test_eq", "test_close"):
        sides = check.args[:2]
    same = len(sides) > 1 and ast.dump(sides[0]) == ast.dump(sides[1])
    return not same and not isinstance(check, ast.Tuple)


def follows(tree: ast.Module, names: set[str]) -> set[str]:
    """`names` and all variables of a cell whose values are made from them, or changed by a call."""
    known, size = set(names), -1
    while len(known) > size:
        size = len(known)
        for node in ast.walk(tree):
            target, value = None, None
            if isinstance(node, ast.Assign):
                target, value = ast.Tuple(node.targets), node.value
            elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.NamedExpr)):
                target, value = node.target, node.value
            elif isinstance(node, (ast.For, ast.comprehension)):
                target, value = node.target, node.iter
            elif isinstance(node, ast.withitem):
                target, value = node.optional_vars, node.context_expr
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                target, value = node.value, node.value.func  # it may change what it is given
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                target, value = ast.Name(node.name), ast.Module(node.body, [])
            if target is not None and value is not None and mentioned(value) & known:
                known |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
    return known


def is_test_of(source: str, names: list[str]) -> bool:
    """Whether a cell that exports nothing asserts something that depends on one of `names`."""
    if "#| export" in source:
        return False
    tree = parsed(source)
    named = set(names) & mentioned(tree)
    known = follows(tree, named)
    return bool(named) and any(mentioned(c) & known and can_fail(c) for c in checks(tree))


def lines_of(source: str) -> int:
    """Lines of a cell that a reader reads: without empty ones and nbdev's directives."""
    return sum(bool(x.strip()) and not x.startswith("#|") for x in source.splitlines())


def holds_one_class(source: str) -> bool:
    """Whether a cell exports a class and little else: it may be longer than other cells."""
    body = [n for n in parsed(source).body if not isinstance(n, (ast.Import, ast.ImportFrom))]
    classes = [n for n in body if isinstance(n, ast.ClassDef)]
    rest = sum(n.end_lineno - n.lineno + 1 for n in body if not isinstance(n, ast.ClassDef))
    return "#| export" in source and len(classes) == 1 and rest <= MAX_CELL


def teaching(path: Path) -> dict:
    """Measures of a notebook: words of prose, longest cell, definitions, and untested ones.

    `longest_cell` counts lines of cells that do not hold one exported class. `untested` are the
    definitions of those cells of which no test in the next three cells depends on any.
    """
    cells = nbformat.read(path, as_version=4).cells
    code = [c.source for c in cells if c.cell_type == "code" and c.source.strip()]
    exported, untested = [], []
    for i, source in enumerate(code):
        if "#| export" in source and (names := defined(source)):
            exported += names
            if not any(is_test_of(behind, names) for behind in code[i + 1 : i + 4]):
                untested += names
    short = [lines_of(source) for source in code if not holds_one_class(source)]
    return {
        "notebook": path.stem,
        "room": room(path),
        "longest_cell": max(short, default=0),
        "words": sum(len(c.source.split()) for c in cells if c.cell_type == "markdown"),
        "exported": len(exported),
        "untested": untested,
    }


def package_files() -> list[Path]:
    """The package's modules without nbdev's index and the empty files that mark sub-packages."""
    found = sorted((ROOT / "streamr1_ref").rglob("*.py"))
    return [p for p in found if p.name != "_modidx.py" and p.stat().st_size]


def written(source: str) -> list[str]:
    """Lines of a module that people write: without nbdev's list of names and its comments.

    The module's docstring is left out too: it is a notebook's description, which is one line.
    """
    tree = ast.parse(source)
    skip = set()
    for node in tree.body:
        is_names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        if is_names or node is tree.body[0] and isinstance(node, ast.Expr):
            skip |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(source.splitlines(), start=1)
    return [x for n, x in lines if n not in skip and not x.startswith(("# %%", "# AUTOGENERATED"))]


def wide_lines(path: Path) -> list[str]:
    """Lines of a module's or a notebook's code over WIDTH columns, as "file: number of columns"."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        lines = [x for c in cells if c.cell_type == "code" for x in c.source.splitlines()]
    else:
        lines = written(path.read_text(encoding="utf-8"))
    return [f"{path.relative_to(ROOT)}: {len(x)} columns" for x in lines if len(x) > WIDTH]


def patches(source: str) -> list[str]:
    """Methods that code adds to a class from outside, with fastcore's @patch."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(d).split("(")[0].startswith("patch") for d in node.decorator_list)
    ]


def packed(source: str) -> list[str]:
    """Statements that say too much at once: lambdas with a name, tuples assigned to four names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign):
            left, right = node.targets[0], node.value
            wide = isinstance(left, ast.Tuple) and isinstance(right, ast.Tuple)
            if isinstance(right, ast.Lambda) or wide and len(left.elts) > 3:
                found.append(ast.unparse(node).splitlines()[0][:60])
    return found


def functions(source: str, name: str) -> list[tuple[int, str]]:
    """(lines, "module.function") of each function and method of a module."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, kinds)]
    return [(n.end_lineno - n.lineno + 1, f"{name}.{n.name}") for n in nodes]


def form() -> dict:
    """Measures of the code's form, over the package, the notebooks and the tests."""
    files = {p: p.read_text(encoding="utf-8") for p in package_files()}
    modules = {p: ".".join(p.relative_to(ROOT).with_suffix("").parts[1:]) for p in files}
    books = notebooks()
    everything = [*files, *books, *sorted((ROOT / "tests").rglob("*.py"))]
    cells = [
        (lines_of(c.source), p.stem)
        for p in books
        for c in nbformat.read(p, as_version=4).cells
        if c.cell_type == "code" and not holds_one_class(c.source)
    ]
    return {
        "wide": [line for p in everything for line in wide_lines(p)],
        "patches": [f"{modules[p]}.{name}" for p, s in files.items() for name in patches(s)],
        "packed": [f"{modules[p]}: {line}" for p, s in files.items() for line in packed(s)],
        "longest function": max(f for p, s in files.items() for f in functions(s, modules[p])),
        "longest module": max((len(s.splitlines()), modules[p]) for p, s in files.items()),
        "longest cell": max(cells),
    }


def ruff() -> list[str]:
    """What ruff finds: pyproject.toml's rules in notebooks and tests, wrong names in the package.

    The package's layout is the notebooks', but for nbdev's own lines.
    """
    sources = ["nbs", "tests", "setup.py"]
    commands = (
        ["check", "--output-format", "concise", *sources],
        ["check", "--output-format", "concise", "--select", "F", "streamr1_ref"],
        ["format", "--check", *sources],
    )
    found = []
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = (done.stdout + done.stderr).splitlines()
            found += [f"ruff {command[0]}: {line}" for line in lines]
    return found


def readme() -> str:
    """README.md as it follows from nbs/index.ipynb: its prose and outputs as Markdown.

    Links are those of the notebook, as they are seen from the top folder.
    """
    from nbconvert import MarkdownExporter

    nb = nbformat.read(NBS / "index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if not c.source.startswith("#|")]
    body, _ = MarkdownExporter().from_notebook_node(nb)
    return re.sub(r"\n{3,}", "\n\n", links_from(body, NBS.name)).strip() + "\n"


def check(paths: list[Path], everything: bool) -> list[str]:
    """Print a table of notebooks and return what is wrong; `everything`: the code's form too."""
    wrong = [f"{path.name}: {problem}" for path in paths for problem in problems(path)]
    print(f"{'room':10} {'notebook':24}{'words':>7}{'longest':>9}{'exported':>10}  untested")
    for row in map(teaching, paths):
        numbers = f"{row['words']:7}{row['longest_cell']:9}{row['exported']:10}"
        print(f"{row['room']:10} {row['notebook']:24}{numbers}  {', '.join(row['untested']) or 0}")
    if everything:
        measures = form()
        wrong += ruff()
        print(f"lines over {WIDTH} columns: {len(measures.pop('wide'))}")
        print(f"@patch in the package: {len(measures.pop('patches'))} (at most {MAX_PATCHES})")
        packed_lines = measures.pop("packed")
        print(f"named lambdas and wide tuple assignments in the package: {len(packed_lines)}")
        for name, (lines, where) in measures.items():
            print(f"{name}: {lines} lines, {where}")
    else:
        wrong += [line for path in paths for line in wide_lines(path)]
    return wrong


def main(command: str = "check", *names: str) -> None:
    """Run one of the commands on the notebooks called `names`, or on all."""
    paths = notebooks(list(names))
    if command == "run":
        for path in paths:
            print("running", path.name, flush=True)
            nbformat.write(execute(path), path)
    elif command == "readme":
        (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    elif command == "check":
        raise SystemExit("\n".join(check(paths, everything=not names)) or 0)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
