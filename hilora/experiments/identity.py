"""When two runs are the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hilora.experiments.schema import completed
from hilora.federated.settings import TrainingSettings
from hilora.federated.strategies import Strategy


def decisive(strategy: Strategy, run: TrainingSettings) -> dict[str, Any]:
    """Of all settings those that decide a result, plain: what all methods share, and the method's own.

    Of ranks and scales, those of the adapters that the method has. How many clients share a forward pass decides
    nothing.
    """
    adapters = strategy.adapters(run)
    shared = {name: value for name, value in run.plain().items() if name != "clients_at_once"}
    per_tier = {
        "rank": {tier: adapters.rank(tier) for tier in adapters.tiers},
        "lora_alpha": {tier: adapters.scale(tier) * adapters.rank(tier) for tier in adapters.tiers},
    }
    return {**shared, **per_tier, **strategy.settings.plain()}


def fingerprint(decides: Mapping[str, Any]) -> str:
    """A short name of all that decides a result: equal where the result is, whichever version of the schema says so.

    What a line of the ledger does not mention stands at the default of the line's version; what did not exist in that
    version, at the default that it began with.
    """
    whole = {name: value for name, value in completed(decides).items() if name != "schema"}
    text = json.dumps(_canonical(whole), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _canonical(value: Any) -> Any:
    """The same for what is the same: 1 and 1.0, a tuple and a list."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_canonical(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
