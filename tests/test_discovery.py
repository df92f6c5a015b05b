"""What a folder's files hold is found by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hilora.discovery import enter, find_classes
from hilora.errors import InvalidTypeError, InvalidValueError
from hilora.federated.strategies import STRATEGIES, Strategy

MODULES = {
    "first.py": """
from hilora.federated.strategies.fedit import FedIT


class Second(FedIT):
    name = "second"


NUMBER = 2
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


Methods = dict[str, type[Strategy]]


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Methods:
    """What a package on the path with these modules brings."""
    name = "somebodys_methods"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    for file, text in MODULES.items():
        (tmp_path / name / file).write_text(text.replace("{package}", name))
    monkeypatch.syspath_prepend(tmp_path)
    return find_classes(name, [str(tmp_path / name)], Strategy)  # type: ignore[type-abstract]


def test_the_classes_of_a_package_in_the_order_of_its_modules(found: Methods) -> None:
    assert list(found) == ["second", "first"]  # neither what is imported, nor what is abstract
    assert [kind.__qualname__ for kind in found.values()] == ["Second", "First"]


def test_what_cannot_be_entered_is_told_what_it_lacks(found: Methods) -> None:
    second = found["second"]
    enter(found, second, Strategy)  # type: ignore[type-abstract]  # twice is no matter

    class Same(second):  # type: ignore[misc, valid-type]
        pass

    class Nameless(second):  # type: ignore[misc, valid-type]
        name = ""

    class Unfinished(Strategy):
        name = "unfinished"

    base: Any = Strategy
    with pytest.raises(InvalidValueError, match=r"Same is called 'second', as somebodys_methods\.first\.Second is"):
        enter(found, Same, base)
    with pytest.raises(InvalidValueError, match=r"Nameless\.name is ''"):
        enter(found, Nameless, base)
    with pytest.raises(InvalidTypeError, match="Unfinished lacks aggregate, configure, stages, start"):
        enter(found, Unfinished, base)
    with pytest.raises(InvalidTypeError, match="is not a class derived from Strategy"):
        enter(found, int, base)
    assert list(found) == ["second", "first"]


def test_every_method_of_the_library_is_found_under_its_name() -> None:
    assert all(kind.name == name for name, kind in STRATEGIES.items())
    assert len(STRATEGIES) == len(set(STRATEGIES.values())) >= 14
