"""What a folder's files hold is found by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from hilora.discovery import classes_in
from hilora.federated.strategies import STRATEGIES, Strategy

MODULES = {
    "first.py": """
from hilora.federated.strategies.fedit import FedIT


class Second(FedIT):
    name = "second"


class NameOfAnother(FedIT):
    pass
""",
    "zero.py": """
from hilora.federated.strategies.base import Strategy
from {package}.first import Second


class First(Second):
    name = "first"


class Unfinished(Strategy):
    name = "unfinished"
""",
    "helper.py": "NUMBER = 1\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package on the path with classes in it."""
    name = "somebodys_methods"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    for file, text in MODULES.items():
        (tmp_path / name / file).write_text(text.replace("{package}", name))
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_the_named_classes_of_a_package_in_the_order_of_its_modules(package: str) -> None:
    found = list(classes_in(package, Strategy))  # type: ignore[type-abstract]
    assert [kind.name for kind in found] == ["second", "first"]  # neither what is imported, nor what is abstract
    assert all(kind.__module__.startswith(package) for kind in found)


def test_every_method_of_the_library_is_found_under_its_name() -> None:
    assert all(kind.name == name for name, kind in STRATEGIES.items())
    assert len(STRATEGIES) == len(set(STRATEGIES.values())) >= 14
