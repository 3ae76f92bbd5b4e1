"""Run, check and publish the notebooks: `python tests/notebooks.py run|check|readme [notebook ...]`.

`run` executes notebooks in fresh kernels and saves them with their outputs, `check` lists what is wrong with the
committed ones, `readme` writes README.md from nbs/index.ipynb.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
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

# the order of the course; a module imports only modules of notebooks before its own (chapter 13's
# trainer stands early: every training of the course runs on it)
ORDER = """
conventions files runtime video widgets ports
health method distributed checkpoint tracking 13_training
00_moving_digits 00b_oracle 01_latents 02_flow_matching 03_transformer text 03b_tiny_teacher 03c_exact_teacher 03d_better_teacher
04_causal_attention 05_sink_cache 06_self_forcing 06b_tiny_student 07_dmd_gradient 07b_plane 08_reward_model 08b_tiny_reward
09_reward_weighting 10_saliency 11_adaptive_balancing 12_stream_r1 models presets 14_streaming
pipeline player vae 15_wan umt5 15a_video_reward download 15b_full_scale score published_runs 15c_budget
16_ablation errata
processes demo wan_run train prepare generate rebuild timing bench_wan bench cli index
""".split()


def notebooks(names: list[str] = ()) -> list[Path]:
    """The notebooks called `names` (stems), or all of them, in the order in which they build on each other."""
    found = {p.stem: p for p in NBS.rglob("*.ipynb") if not p.name.startswith(("_", "."))}
    if unknown := (set(names) | set(ORDER)) - set(found):
        raise SystemExit(
            f"no such notebook: {', '.join(sorted(unknown))}; there are {', '.join(found)}"
        )
    if left_out := set(found) - set(ORDER):
        raise SystemExit(f"not in ORDER of tests/notebooks.py: {', '.join(sorted(left_out))}")
    return [found[stem] for stem in ORDER if not names or stem in names]


def fingerprint(nb: nbformat.NotebookNode) -> str:
    """Hash of all code cells in their order: `run` stores it, so that outputs can be told to be those of this code."""
    return hashlib.sha256(
        json.dumps([c.source for c in nb.cells if c.cell_type == "code"]).encode()
    ).hexdigest()[:16]


def execute(path: Path) -> nbformat.NotebookNode:
    """Run a notebook from top to bottom in a fresh kernel, in its own folder, and return it with its outputs."""
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
    kind = lambda o: (
        o.name if o.output_type == "stream" else "+".join(sorted(o.get("data", {"error": 0})))
    )
    return [[kind(o) for o in c.outputs] for c in nb.cells if c.cell_type == "code"]


def problems(path: Path) -> list[str]:
    """What is wrong with a committed notebook, one sentence each; empty if nothing is."""
    nb, found = nbformat.read(path, as_version=4), []
    if nb.metadata.get("executed") != fingerprint(nb):
        found.append(
            "its outputs are not those of its code, run in order from a fresh kernel (make notebooks)"
        )
    for i, cell in enumerate(nb.cells):
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


def parsed(source: str) -> ast.Module:
    """A cell's code as a tree; lines for the notebook itself (%magic, !command) count as nothing."""
    return ast.parse(re.sub(r"^[%!].*$", "pass", source, flags=re.M))


def defined(source: str) -> list[str]:
    """What a cell defines. A patched special method, or forward, stands under its class's name:
    it is used without its own."""
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
    """False for a comparison of an expression with itself, and for a tuple, which is always true."""
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


def teaching(path: Path) -> dict:
    """Measures of a notebook: words of prose, lines of its longest cell, exported definitions, and
    those cells of definitions of which no test in the next three cells depends on any."""
    cells = nbformat.read(path, as_version=4).cells
    code = [c.source for c in cells if c.cell_type == "code" and c.source.strip()]
    exported, untested = [], []
    for i, source in enumerate(code):
        if "#| export" in source and (names := defined(source)):
            exported += names
            if not any(is_test_of(behind, names) for behind in code[i + 1 : i + 4]):
                untested += names
    filled = lambda source: [x for x in source.splitlines() if x.strip() and not x.startswith("#|")]
    return {
        "notebook": path.stem,
        "longest_cell": max(map(len, map(filled, code)), default=0),
        "words": sum(len(c.source.split()) for c in cells if c.cell_type == "markdown"),
        "exported": len(exported),
        "untested": untested,
    }


def readme() -> str:
    """README.md as it follows from nbs/index.ipynb: its prose and outputs as Markdown, links seen from the top folder."""
    from nbconvert import MarkdownExporter

    nb = nbformat.read(NBS / "index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if not c.source.startswith("#|")]
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r"\]\(\.\./", "](", re.sub(r"\]\((\w+\.ipynb)", r"](nbs/\1", body)).replace(
        'src="../', 'src="'
    )
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


def main(command: str = "check", *names: str) -> None:
    paths = notebooks(list(names))
    if command == "run":
        for path in paths:
            print("running", path.name, flush=True)
            nbformat.write(execute(path), path)
    elif command == "readme":
        (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    elif command == "check":
        wrong = [f"{path.name}: {problem}" for path in paths for problem in problems(path)]
        print(f"{'notebook':24}{'words':>7}{'longest':>9}{'exported':>10}  untested")
        for row in map(teaching, paths):
            numbers = f"{row['words']:7}{row['longest_cell']:9}{row['exported']:10}"
            print(f"{row['notebook']:24}{numbers}  {', '.join(row['untested']) or 0}")
        raise SystemExit("\n".join(wrong) or 0)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
