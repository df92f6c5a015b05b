"""Who has which images: the partitions of a labelled image set among clients, a file each."""

from __future__ import annotations

from typing import Any

from pydantic.fields import FieldInfo

from hilora.discovery import enter, find_classes
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions.base import Client, Partition, PartitionError, Population, require

__all__ = ["PARTITIONS", "Client", "Partition", "PartitionError", "Population", "partition", "register", "settings"]

PARTITIONS: dict[str, type[Partition]] = find_classes(__name__, __path__, Partition)  # type: ignore[type-abstract]
"""The partitions that there are, by name; the settings of one are its `model_fields`."""


def register(kind: type[Partition]) -> type[Partition]:
    """Makes a partition that lives elsewhere known by its name, to files and the command line too; returns it.

    Raises:
        InvalidTypeError, InvalidValueError: it is no partition, or its name is another's.
    """
    enter(PARTITIONS, kind, Partition)  # type: ignore[type-abstract]
    return kind


def settings() -> dict[str, list[FieldInfo]]:
    """The settings of all partitions by name, each with the fields that it is in one partition and another."""
    found: dict[str, list[FieldInfo]] = {}
    for kind in PARTITIONS.values():
        for name, field in kind.model_fields.items():
            found.setdefault(name, []).append(field)
    return found


def partition(
    train: ImageSet, test: ImageSet, scheme: str | type[Partition] | Partition, *, seed: int, **given: Any
) -> Population:
    """Divides a training set among clients, and gives each a test set after its own class proportions.

        population = partition(train, test, "gl-dir", clients=100, unseen=0.2, alpha=0.3, seed=0)

    The same arguments give the same population.

    Args:
        train: the training split, of which clients' training and validation images come.
        test: the test split, of the same classes.
        scheme: a name in `PARTITIONS`, a class of one's own, or a partition with its settings made.
        seed: of all that is random.
        given: settings of the scheme, the fields of its class; where a scheme does not have a setting that others have
            (`classes_per_client` is patho's alone), it is passed over.

    Raises:
        PartitionError: there is no such scheme or setting, or what is asked for is impossible.
        InvalidTypeError, InvalidValueError: the class is no partition, or has no name.
    """
    if isinstance(scheme, Partition):
        require(not given, f"{', '.join(given)} beside a partition that has its settings: leave them out")
        chosen = scheme
    else:
        kind = PARTITIONS.get(scheme) if isinstance(scheme, str) else scheme
        if kind is None:
            raise PartitionError(f"scheme is {scheme!r}, expected one of {', '.join(PARTITIONS)}")
        enter({}, kind, Partition)  # type: ignore[type-abstract]
        elsewhere = settings().keys() - kind.model_fields.keys()
        chosen = kind(**{name: value for name, value in given.items() if name not in elsewhere})
    population = chosen.divide(train, test, seed)
    population.check(train, test)
    return population
