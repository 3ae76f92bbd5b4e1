"""What the docstrings must say; `python tests/test_docstrings.py [module ...]` lists flaws.

The docstrings are prose with shapes in square brackets. Checkers of docstrings (pydocstyle's rules
in ruff, numpydoc, darglint, docstring_parser) compare sections such as "Args:" or "Parameters" with
the signature; none of them reads a sentence, and none knows shapes. Hence this one, on the syntax
tree: nothing is imported.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "streamr1_ref"
WIDTH = 100
IN_BRACKETS = r"\[(?=[^\]]*[A-Za-z0-9])[^\[\]`'\"]*\]"
IN_WORDS = r"\b(?:scalars?|any shape|same shape|shape of|shaped like)\b"
SHAPE = re.compile(f"{IN_BRACKETS}|{IN_WORDS}")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def package_modules() -> dict[str, Path]:
    """Name below the package ("cache", "tiny.world") and file of every module."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts): p
        for p in paths
        if not p.name.startswith("_")
    }


def decorators(node: ast.AST) -> set[str]:
    """Last words of decorators: "dataclass" for @dataclasses.dataclass(frozen=True)."""
    calls = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return {d.attr if isinstance(d, ast.Attribute) else getattr(d, "id", "") for d in calls}


def bases(node: ast.ClassDef) -> list[str]:
    """Last words of a class's bases."""
    found = [b.value if isinstance(b, ast.Subscript) else b for b in node.bases]
    return [b.attr if isinstance(b, ast.Attribute) else getattr(b, "id", "") for b in found]


def has_fields(node: ast.ClassDef) -> bool:
    """Whether annotated names in the class's body are what its users give or read."""
    records = {"NamedTuple", "TypedDict", "Protocol"}
    return "dataclass" in decorators(node) or bool(records & set(bases(node)))


def is_tensor(annotation: ast.AST | None) -> bool:
    """Whether values are a tensor, None or a tensor, or a tuple or list of tensors.

    Dictionaries do not count, and functions of tensors do not.
    """
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, (ast.Name, ast.Attribute)):
        return ast.unparse(annotation).split(".")[-1] == "Tensor"
    if isinstance(annotation, ast.BinOp):
        return is_tensor(annotation.left) or is_tensor(annotation.right)
    if isinstance(annotation, ast.Subscript):
        known = {"tuple", "list", "Sequence", "Optional", "Union", "Iterator", "Iterable"}
        parts = annotation.slice
        inner = parts.elts if isinstance(parts, ast.Tuple) else [parts]
        outer = ast.unparse(annotation.value).split(".")[-1]
        return outer in known and any(map(is_tensor, inner))
    return False


def sentences(text: str) -> list[str]:
    """A docstring in pieces that end with a full stop, a semicolon or an empty line."""
    return re.split(r"(?<=[.;])\s+(?=\S)|\n\s*\n", text)


def names(text: str, name: str) -> bool:
    """Whether a text mentions a parameter; the words "a" and "i" count in backticks only."""
    marked = rf"`[^`]*\b{re.escape(name)}\b[^`]*`"
    plain = rf"(?<![\w.]){re.escape(name)}\b"
    return bool(re.search(marked if name in ("a", "i") else plain, text)) or bool(
        re.search(marked, text)
    )


def raised(node: ast.AST) -> list[str]:
    """Public exception types that a body raises by name, in order of appearance."""
    found = []
    for part in ast.walk(node):
        if isinstance(part, ast.Raise) and part.exc is not None:
            kind = part.exc.func if isinstance(part.exc, ast.Call) else part.exc
            name = kind.attr if isinstance(kind, ast.Attribute) else getattr(kind, "id", "")
            if re.match(r"[A-Z]", name):
                found.append(name)
    return list(dict.fromkeys(found))


def first_line(doc: str) -> list[str]:
    """What is wrong with a docstring's first line."""
    line, found = doc.strip().splitlines()[0].strip() if doc.strip() else "", []
    if not line.endswith("."):
        found.append("the first line does not end a sentence with a full stop")
    if len(line.split()) < 3 or re.match(r"(a|[a-z]{2,})\b(?![._(\d])", line):
        found.append("the first line is no sentence (capital letter, at least three words)")
    return found


class Module:
    """A module's definitions with their docstrings, and the lines that hold their comments."""

    def __init__(self, name: str, source: str, documented: dict[str, set[str]] | None = None):
        self.name, self.lines, self.tree = name, source.splitlines(), ast.parse(source)
        self.documented = documented or {}  # class -> methods that it or its bases describe

    def comment(self, node: ast.AST) -> str:
        """Comments on the lines of a field or parameter, and lines of them right before it."""
        near = self.lines[node.lineno - 1 : node.end_lineno]
        for line in reversed(self.lines[: node.lineno - 1]):
            if not line.strip().startswith("#"):
                break
            near.append(line)
        return " ".join(line.split("#", 1)[1] for line in near if "#" in line)

    def parameters(self, node: Function) -> list[ast.arg]:
        """Parameters that a docstring must name: no self, cls, *args, **kwargs, no private ones."""
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        return [a for a in arguments if a.arg not in ("self", "cls") and a.arg[0] != "_"]

    def missing(self, name: str, parts: list, text: str) -> Iterator[str]:
        """Findings on parameters or fields (name, annotation, node) that nothing describes."""
        for part, annotation, node in parts:
            comment = self.comment(node)
            if not (names(text, part) or comment):
                yield f"{name}: `{part}` is not named"
            elif is_tensor(annotation) and not (
                SHAPE.search(comment)
                or any(names(s, part) and SHAPE.search(s) for s in sentences(text))
            ):
                yield f"{name}: no shape, such as [B,F,C,H,W], or scalar, beside `{part}`"

    def of_function(self, node: Function, name: str, around: str = "") -> Iterator[str]:
        """Findings on a function; `around` is its class's docstring where that may describe it."""
        doc = ast.get_docstring(node)
        if doc is None and not around:
            yield f"{name}: no docstring"
            return
        if doc:
            yield from (f"{name}: {problem}" for problem in self.width(node) + first_line(doc))
        text = f"{doc or ''}\n\n{around}"
        if decorators(node) & {"setter", "overload"}:
            return
        parameters = [(a.arg, a.annotation, a) for a in self.parameters(node)]
        yield from self.missing(name, parameters, text)
        if is_tensor(node.returns) and not SHAPE.search(text):
            yield f"{name}: no shape, such as [B,F,C,H,W], or scalar, of what is returned"
        empty = "NotImplementedError" if "abstractmethod" in decorators(node) else None
        for error in raised(node):
            if error != empty and not re.search(rf"\b{error}\b", text):
                yield f"{name}: raises {error}, which is not named"

    def width(self, node: ast.AST) -> list[str]:
        """What is too wide in the docstring, with its indentation and quotes."""
        first = node.body[0]
        lines = self.lines[first.lineno - 1 : first.end_lineno]
        wide = [line for line in lines if len(line) > WIDTH]
        return [f"a docstring line of {len(wide[0])} columns"] if wide else []

    def of_class(self, node: ast.ClassDef) -> Iterator[str]:
        """Findings on a class, its fields and its public methods."""
        doc, name = ast.get_docstring(node), f"{self.name}.{node.name}"
        if doc is None:
            yield f"{name}: no docstring"
            doc = ""
        else:
            yield from (f"{name}: {problem}" for problem in self.width(node) + first_line(doc))
        if has_fields(node):
            fields = [
                (n.target.id, n.annotation, n)
                for n in node.body
                if isinstance(n, ast.AnnAssign)
                and isinstance(n.target, ast.Name)
                and n.target.id[0] != "_"
                and "ClassVar" not in ast.unparse(n.annotation)
            ]
            yield from self.missing(name, fields, doc)
        described = self.documented.get(node.name, set())
        for method in node.body:
            if not isinstance(method, Function):
                continue
            own = f"{name}.{method.name}"
            if "Function" in bases(node) and method.name in ("forward", "backward"):
                continue  # torch.autograd.Function calls them; users call apply
            if method.name in ("__init__", "__post_init__", "__new__"):
                yield from self.of_function(method, own, doc or "-")
            elif method.name in ("__call__", "forward"):
                yield from self.of_function(method, own, doc or "-")
            elif method.name[0] != "_" and not (
                ast.get_docstring(method) is None and method.name in described
            ):
                yield from self.of_function(method, own)

    def findings(self) -> list[str]:
        """All that is missing in the module, as "module.name: what is missing"."""
        found = [] if ast.get_docstring(self.tree) else [f"{self.name}: no docstring"]
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name[0] != "_":
                found += self.of_class(node)
            elif isinstance(node, Function) and node.name[0] != "_":
                found += self.of_function(node, f"{self.name}.{node.name}")
        return found


def described_methods(trees: list[ast.Module]) -> dict[str, set[str]]:
    """{class: names of methods that a base class describes}, over all modules."""
    classes = {n.name: n for tree in trees for n in tree.body if isinstance(n, ast.ClassDef)}

    def of(name: str, seen: tuple[str, ...] = ()) -> set[str]:
        if name not in classes or name in seen:
            return set()
        own = {
            n.name for n in classes[name].body if isinstance(n, Function) and ast.get_docstring(n)
        }
        return own.union(*(of(base, (*seen, name)) for base in bases(classes[name])))

    return {name: set().union(*map(of, bases(node))) for name, node in classes.items()}


@functools.cache
def package_sources() -> tuple[dict[str, str], dict[str, set[str]]]:
    """The code of all modules by name, and the methods that base classes describe."""
    paths = package_modules()
    sources = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    return sources, described_methods([ast.parse(s) for s in sources.values()])


def findings(module: str) -> list[str]:
    """What docstrings of a module ("cache", "tiny.world") lack; SystemExit for an unknown one."""
    sources, described = package_sources()
    if module not in sources:
        raise SystemExit(f"no such module: {module}; there are {', '.join(sources)}")
    return Module(module, sources[module], described).findings()


@pytest.mark.parametrize("module", package_modules())
def test_docstrings_say_what_they_must(module):
    assert findings(module) == []


GOOD = '''"""What is in the module."""
import torch
from dataclasses import dataclass

def scale(x: torch.Tensor, by: float, *args, _cache=None, **kwargs) -> torch.Tensor:
    """Return `x` [B,C] times `by`. Raises ValueError for a `by` below zero."""
    if by < 0:
        raise ValueError("by")
    return x * by

@dataclass(frozen=True)
class SizeConfig:
    """Height and width of a frame; ValueError below 1."""
    height: int = 3  # in pixels
    # in pixels, too
    width: int = 3
    mean: torch.Tensor | None = None  # [C]

    def __post_init__(self):
        if self.height < 1:
            raise ValueError("height")

class Base:
    """A network for `size` pixels."""
    def __init__(self, size: int):
        self.size = size
    def forward(self, size):
        return size
    def run(self, steps: int) -> None:
        """Run the network for `steps` steps."""

class Child(Base):
    """Does the same as its base."""
    def run(self, steps):
        return steps
    def _private(self, nothing): return nothing

def _helper(nothing): return nothing
'''


def found_in(source: str) -> list[str]:
    """Findings on a module of its own, called "m"."""
    return Module("m", source, described_methods([ast.parse(source)])).findings()


def test_good_docstrings_pass():
    assert found_in(GOOD) == []


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ('"""What is in the module."""\n', "", "m: no docstring"),
        ('    """Return `x` [B,C] times', '    # """', "m.scale: no docstring"),
        ("times `by`. Raises", "times `by`, raises", None),
        ('"""Return `x` [B,C] times `by`.', '"""x times `by`, `x` is [B,C].', None),
        ('"""Return `x`', '"""return `x`', "m.scale: the first line is no sentence"),
        ("below zero.", "below zero", "m.scale: the first line does not end a sentence"),
        ("times `by`. Raises", "times `by`,\n    raises", "m.scale: the first line does not end"),
        ("times `by`.", "by the other.", None),
        ("times `by`. Raises ValueError for a `by`", "twice. Raises ValueError", "m.scale: `by`"),
        ("`x` [B,C]", "`x`", "m.scale: no shape, such as [B,F,C,H,W], or scalar, beside `x`"),
        ("`x` [B,C]", "`x`, a scalar,", None),
        ("Raises ValueError", "Refuses that", "m.scale: raises ValueError"),
        ("times `by`.", f"times `by`.{' ' * 60}", "m.scale: a docstring line of"),
        ('    """Height', '    # """', "m.SizeConfig: no docstring"),
        ("ValueError below 1", "at least 1", "m.SizeConfig.__post_init__: raises ValueError"),
        ("height: int = 3  # in pixels", "deep: int = 3", "m.SizeConfig: `deep` is not named"),
        ('"""Height and', '"""The height and', None),
        ("    # in pixels, too\n    width", "    breadth", "m.SizeConfig: `breadth` is not named"),
        ("  # [C]", "  # of a channel", "m.SizeConfig: no shape"),
        ("A network for `size` pixels", "A network for images", "m.Base.__init__: `size`"),
        ("for `steps` steps", "for some time", "m.Base.run: `steps` is not named"),
        ('        """Run the', '        return """Run the', "m.Child.run: no docstring"),
        ("def _helper", "def helper", "m.helper: no docstring"),
        ("def _private", "def private", "m.Child.private: no docstring"),
    ],
)
def test_each_kind_of_flaw_is_found(old, new, expected):
    assert GOOD.count(old) == 1, "the example has changed"
    found = found_in(GOOD.replace(old, new))
    assert any(f.startswith(expected) for f in found) if expected else found == [], found


@pytest.mark.parametrize(
    "annotation, tensor",
    [
        ("torch.Tensor", True),
        ("Tensor | None", True),
        ("'torch.Tensor'", True),
        ("tuple[torch.Tensor, int]", True),
        ("list[Tensor]", True),
        ("Callable[[Tensor], Tensor]", False),
        ("dict[str, Tensor]", False),
        ("int", False),
    ],
)
def test_tensors_are_told_by_their_annotation(annotation, tensor):
    assert is_tensor(ast.parse(annotation, mode="eval").body) == tensor


def test_words_are_not_taken_for_parameters():
    assert not names("The average of a clip.", "a") and names("Adds `a` and b.", "a")
    assert not names("The frames", "frame") and names("`frames` of (x, y)", "x")
    assert not names("see cfg.batch", "batch")


if __name__ == "__main__":
    modules = sys.argv[1:] or list(package_modules())
    lists = {module: findings(module) for module in modules}
    for module, found in lists.items():
        print(*found, sep="\n", end="\n" if found else "")
    print(", ".join(f"{module} {len(found)}" for module, found in lists.items()))
    raise SystemExit(any(lists.values()))
