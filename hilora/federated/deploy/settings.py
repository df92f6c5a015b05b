"""What a deployment is told: one flat table of names and values for the run, and one for each client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic import Field

from hilora.errors import InvalidValueError
from hilora.federated.data.partitions import PARTITIONS, Partition
from hilora.federated.settings import Number, Settings, TrainingSettings, Whole
from hilora.federated.strategies import STRATEGIES, Strategy, own_fields, resolve

FEWEST = 3
"""Clients in a secure sum. Of two each knows the other's part."""


class DeploymentSettings(Settings):
    """A training whose clients are machines of their own, beside what all trainings and the strategy have."""

    strategy: str = Field("hilora", description="the method's name")
    clients: Whole = Field(ge=1, description="how many there can be: their ids are 0 to this − 1")
    min_clients: Whole | None = Field(None, ge=1, description="how many must be there at the start; none: all")
    classes: int | str = Field(description="how many there are, or their names, with commas between")
    backbone: str = Field(description="a model of timm, or glyph_vit")
    weights: Path | None = Field(None, description="the server's file of the backbone's weights")
    img_size: Whole | None = Field(None, ge=1, description="height and width; none: what the backbone was trained for")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the backbone, at all clients")
    device: str = Field("cpu", description="where the server computes")
    out: Path = Field(Path("runs/flower"), description="the server's folder for the results")
    resume: bool = Field(False, description="go on from the checkpoint in the folder")
    deadline: Number = Field(600.0, gt=0, description="seconds that a round waits for answers")
    patience: Whole = Field(3, ge=1, description="attempts at a round that nobody answers before the run ends")
    wait: Number = Field(600.0, gt=0, description="seconds that the server waits for the clients at the start")
    secure_aggregation: bool = Field(False, description="let the server see sums of updates, and none of them alone")
    partition: str | None = Field(
        None, description="how clients divide a set of images that all of them have; none: they have their own"
    )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; numbers, where the settings do not name them."""
        if isinstance(self.classes, str) and not self.classes.strip().isdecimal():
            names = tuple(name.strip() for name in self.classes.split(","))
            if len(set(names)) < len(names) or not all(names):
                raise InvalidValueError(f"classes={self.classes!r}: expected names that differ, with commas between")
            return names
        return tuple(map(str, range(int(self.classes))))

    @property
    def names_classes(self) -> bool:
        """Whether the settings name the classes."""
        return isinstance(self.classes, str) and not self.classes.strip().isdecimal()


@dataclass(frozen=True)
class Asked:
    """What a run was asked for: its settings, those of all trainings, the strategy with its own, and the partition of
    a set of images that clients share."""

    run: DeploymentSettings
    training: TrainingSettings
    strategy: Strategy
    partition: Partition | None

    @property
    def sizes_are_secret(self) -> bool:
        """Whether clients do not say how many images they have."""
        return self.run.secure_aggregation or self.training.dp_clip is not None


def asked(config: Mapping[str, Any]) -> Asked:
    """The settings in a flat table: names with dashes, values that are texts, numbers or booleans; an empty text is as
    good as none. Several values stand in one text, with commas between.

    Raises:
        InvalidValueError: for an unknown name or a value that does not fit; names all of them.
    """
    given = {name.replace("-", "_"): value for name, value in config.items() if value != ""}
    method = given.get("strategy", DeploymentSettings.model_fields["strategy"].default)
    kind = type(resolve(method))
    partition = PARTITIONS.get(given.get("partition", ""))
    if "partition" in given and partition is None:
        raise InvalidValueError(f"partition={given['partition']!r}: expected one of {', '.join(PARTITIONS)}")
    groups: dict[Any, Mapping[str, Any]] = {
        DeploymentSettings: DeploymentSettings.model_fields,
        TrainingSettings: TrainingSettings.model_fields,
        kind: own_fields(kind),
        **({partition: partition.model_fields} if partition else {}),
    }
    known = {name for fields in groups.values() for name in fields}
    if unknown := sorted(set(given) - known):
        shown = ", ".join(name.replace("_", "-") for name in sorted(known))
        raise InvalidValueError(f"there is no setting {', '.join(unknown).replace('_', '-')}: expected some of {shown}")
    made = {
        group: {name: _value(fields[name], given[name]) for name in fields if name in given}
        for group, fields in groups.items()
    }
    run, training = DeploymentSettings(**made[DeploymentSettings]), TrainingSettings(**made[TrainingSettings])
    if run.min_clients is not None and run.min_clients > run.clients:
        raise InvalidValueError(f"min-clients={run.min_clients}: there are {run.clients} clients at most")
    if any(one is not None for one in (training.rank_budgets, training.layer_budgets, training.byte_budgets)):
        raise InvalidValueError("budgets of clients are of the simulation: in a deployment all hold the same ranks")
    strategy = STRATEGIES[method](**made[kind])
    if not strategy.travels:
        raise InvalidValueError(f"strategy={method!r} has all images in one place: it cannot be deployed")
    if run.secure_aggregation:
        _require_sums(run, training, strategy, method)
    divided = None
    if partition is not None:
        divided = partition(**{**({"unseen": 0.0} if "unseen" in partition.model_fields else {}), **made[partition]})
    return Asked(run, training, strategy, divided)


def _require_sums(run: DeploymentSettings, training: TrainingSettings, strategy: Strategy, method: str) -> None:
    """Raises InvalidValueError where sums of updates are not enough, or would be of too few clients."""
    if not strategy.sums:
        raise InvalidValueError(
            f"secure-aggregation with strategy={method!r}: its server needs more of what clients send than a mean"
        )
    single = {"robust": training.robust != "none", "update-bound": training.update_bound is not None}
    if named := [name for name, given in single.items() if given]:
        raise InvalidValueError(f"secure-aggregation with {', '.join(named)}: nobody can look at single updates")
    fewest = max(1, round(training.participation * (run.min_clients or run.clients)))
    if fewest < FEWEST:
        raise InvalidValueError(
            f"secure-aggregation with {fewest} clients in a round: a sum over fewer than {FEWEST} keeps no secret"
        )


def _value(field: Any, value: Any) -> Any:
    """A value as its field has it: a text with commas as several, for a field that has several."""
    return value.split(",") if get_origin(field.annotation) is tuple and isinstance(value, str) else value
