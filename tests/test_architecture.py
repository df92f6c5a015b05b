"""The house stands as it was drawn: each floor imports the ones below it, and a method is one file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import hilora
from hilora.federated.strategies import STRATEGIES

ROOT = Path(hilora.__file__).resolve().parent.parent
FLOORS = (
    ("kernels",),
    ("version", "errors", "discovery", "files", "locks"),
    ("models",),
    ("adapters",),
    ("algorithms",),
    ("reporting",),
    ("federated",),
    ("experiments",),
    ("cli", "__main__"),
)
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}


def _files() -> list[Path]:
    """The library's files, each once: `hilora/kernels` is a link to the folder beside it."""
    inside = [path for path in (ROOT / "hilora").rglob("*.py") if "kernels" not in path.relative_to(ROOT).parts]
    return sorted(inside + list((ROOT / "kernels").rglob("*.py")))


def _module(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = ["hilora", *parts] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module(path): path for path in _files()}


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


def _statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports, those inside of functions included, but not those for the type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        yield from _statements(child)


def _imported(module: str, node: ast.AST | None = None) -> set[str]:
    """The library's modules that a module imports."""
    found: set[str] = set()
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for statement in _statements(node or _tree(module)):
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        else:
            above = package.split(".")[: len(package.split(".")) - (statement.level - 1)] if statement.level else []
            base = ".".join([*above, *([statement.module] if statement.module else [])])
            names = [f"{base}.{alias.name}" for alias in statement.names]
        for name in names:
            parts = name.split(".")
            while parts and ".".join(parts) not in FILES:
                parts.pop()
            if parts:
                found.add(".".join(parts))
    return found - {module}


def _floor(module: str) -> int | None:
    """How high a module lies; None for the face of the package and short names, which are for users alone."""
    _, *inner = module.split(".")
    return HEIGHT.get(inner[0]) if inner else None


def test_the_walk_sees_the_house() -> None:
    assert {"hilora", "hilora.kernels", "hilora.federated.simulation", "hilora.adapters.table"} <= set(FILES)
    assert "hilora.kernels" in _imported("hilora.adapters.layers")
    assert "hilora.federated.engine.trainer" in _imported("hilora.federated.strategies.base")
    assert "hilora.federated.simulation" not in _imported("hilora.federated.callbacks.base")  # for the checker alone
    assert {_module(path).split(".")[1] for path in _files() if _module(path) != "hilora"} >= set(HEIGHT)


@pytest.mark.parametrize("module", list(FILES))
def test_imports_go_down(module: str) -> None:
    floor = _floor(module)
    imported = _imported(module)
    if floor is None:  # the face, and the short names for what lies deeper
        assert module == "hilora" or all((_floor(other) or 0) < HEIGHT["federated"] for other in imported)
        return
    for other in imported:
        below = _floor(other)
        assert below is not None, f"{module} imports {other}, which is for users of the library alone"
        assert below <= floor, f"{module} imports {other}, which lies above it"


def test_there_is_no_circle() -> None:
    """Neither of modules that import each other at once, nor hidden in functions."""
    graph = {module: _imported(module) for module in FILES if module != "hilora"}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' → '.join((*path[path.index(module) :], module))}"
        if module in done:
            return
        for other in graph.get(module, ()):
            visit(other, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", list(FILES))
def test_no_file_is_long(module: str) -> None:
    assert len(FILES[module].read_text().splitlines()) <= 300


def _may_say(kind: type, module: str) -> bool:
    """Whether a module may name a method: its own, and those of methods that build on it."""
    return any(
        base.__module__ == module
        for other in STRATEGIES.values()
        for base in other.__mro__
        if issubclass(other, kind) and issubclass(base, kind)
    )


WORDS = ("hilora", "central")
"""Names of methods that are words of the library, too."""
DEMO = "hilora.cli.train"
"""Says which methods run where nothing is asked for."""


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_a_methods_name_stands_in_its_own_file_alone(name: str) -> None:
    """Neither as a value nor in a text: what is special about a method is said in its file."""
    kind = STRATEGIES[name]
    texts = () if name in WORDS else (name, kind.__name__)
    for module, path in FILES.items():
        if _may_say(kind, module) or module == DEMO:
            continue
        for node in ast.walk(_tree(module)):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            said = [getattr(node, key, None) for key in ("id", "attr", "name")]
            found = kind.__name__ in said or any(
                re.search(rf"(?<![\w-]){re.escape(one)}(?![\w-])", text) for one in texts
            )
            assert not found, f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')} names {name}"
