"""Secure aggregation: the server learns the sum of what clients changed, and nothing of any one of them.

Flower's SecAgg+ (Bell et al., Secure Single-Server Aggregation with (Poly)Logarithmic Overhead, 2020) masks the
clients' vectors so that the masks cancel in the sum, also when some clients drop out. In Flower 1.42 its server's side
is a workflow of the older interface: here it is run round by round on the `Grid` of a `ServerApp`, with an order of
ours in the place of the parameters that it sends. Its client's side is a mod, which a `ClientApp`'s handler calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
from flwr.compat.common.recorddict_compat import fitres_to_recorddict, parameters_to_arrayrecord
from flwr.server import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import WorkflowState
from flwr.serverapp import Grid
from torch import Tensor

from hilora.algorithms.robust import clipping_scales
from hilora.errors import HiLoRAError, InvalidValueError
from hilora.federated.deploy.settings import FEWEST
from hilora.federated.protocol import Download, Upload
from hilora.federated.sums import changes, groups, norms, spread

STYPE = "hilora.safetensors"
ORDER = "fitins.parameters"


class SecureAggregationError(HiLoRAError, RuntimeError):
    """Too few clients stayed to take the masks away."""


class Messenger(Protocol):
    """What the protocol uses of Flower's `Grid`."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages, and give the replies that come in so many seconds."""


class Mean(NamedTuple):
    """What the server learns: the mean of vectors, and whose they were.

    Attributes:
        arrays: float64.
        nodes: Flower's numbers of the nodes.
    """

    arrays: list[np.ndarray[Any, Any]]
    nodes: list[int]


class _Workflow(SecAggPlusWorkflow):  # type: ignore[misc]  # Flower has no types to read
    """Flower's, for which who drops out before keys are shared is no part of the sum: as it is (1.42), it then asks the
    others for shares that they never got."""

    def share_keys_stage(self, grid: Grid, context: LegacyContext, state: WorkflowState) -> bool:
        goes_on: bool = super().share_keys_stage(grid, context, state)
        there = state.sampled_node_ids = state.active_node_ids
        state.nid_to_neighbours = {node: state.nid_to_neighbours[node] & there for node in there}
        return goes_on


def secure_mean(grid: Messenger, orders: Mapping[int, bytes], bound: float, timeout: float | None = None) -> Mean:
    """Have nodes do what an order says, and learn the mean of the vectors that they make of it.

    Args:
        grid: Flower's, or what sends messages on it.
        orders: for each node, what its `secured` handler is called with.
        bound: coordinates of vectors are cut to ±bound, and rounded at random to steps of 2^-21 of it (more for above a
            thousand clients), so that the mean is right on average.
        timeout: seconds for each of the four steps.

    Raises:
        InvalidValueError: for fewer than three nodes.
        SecureAggregationError: if fewer than three, or than half of them, stayed to the end, or one answered something
            that there is no sum of.
    """
    if len(orders) < FEWEST:
        raise InvalidValueError(f"a sum over {len(orders)} clients keeps no secret: expected at least {FEWEST}")
    found: list[Mean] = []

    def configure(*_: Any) -> list[tuple[Any, FitIns]]:
        return [(SimpleNamespace(node_id=node), FitIns(Parameters([data], STYPE), {})) for node, data in orders.items()]

    def aggregate(_: int, results: list[tuple[Any, FitRes]], failures: Any) -> tuple[None, dict[str, Any]]:
        if results:
            arrays = parameters_to_ndarrays(results[0][1].parameters)
            found.append(Mean(arrays, sorted(proxy.node_id for proxy, _ in results)))
        return None, {}

    strategy = SimpleNamespace(configure_fit=configure, aggregate_fit=aggregate)
    manager = SimpleNamespace(num_available=lambda: len(orders))
    state = RecordDict({MAIN_CONFIGS_RECORD: ConfigRecord({Key.CURRENT_ROUND: 1})})
    state[MAIN_PARAMS_RECORD] = parameters_to_arrayrecord(Parameters([], STYPE), keep_input=False)
    context = LegacyContext(
        Context(0, 0, {}, state, {}), strategy=cast(Any, strategy), client_manager=cast(Any, manager)
    )
    steps = 32 - max(10, math.ceil(math.log2(len(orders) + 1)))  # so that no sum reaches 2^32
    enough = max(FEWEST, math.ceil(len(orders) / 2))  # clients take no masks away from the sum of fewer
    workflow = _Workflow(
        num_shares=1.0,
        reconstruction_threshold=enough,
        max_weight=1.0,
        clipping_range=float(bound),
        quantization_range=2**steps,
        timeout=timeout,
    )
    try:
        workflow(cast(Grid, grid), context)
    except Exception as error:  # Flower does not look at what nodes answer before it uses it
        said = f"secure aggregation of {len(orders)} clients failed: {type(error).__name__}: {error}"
        raise SecureAggregationError(said) from error
    if not found:
        raise SecureAggregationError(
            f"secure aggregation of {len(orders)} clients failed: fewer than {enough} stayed to its end"
        )
    return found[0]


def is_secured(message: Message) -> bool:
    """Whether a message belongs to a secure aggregation."""
    return RECORD_KEY_CONFIGS in message.content.config_records


def secured(message: Message, context: Context, work: Callable[[bytes], Sequence[Tensor]]) -> Message:
    """A client's reply to a message of a secure aggregation.

    Args:
        message: from the server.
        context: of the client, in whose state Flower keeps keys between messages; `work` may replace the state.
        work: given an order, does what it says and returns a vector in some tensors. What it raises makes the client
            drop out.
    """

    def app(message: Message, _: Context) -> Message:
        (array,) = message.content.array_records[ORDER].values()
        arrays = [tensor.detach().double().cpu().numpy() for tensor in work(bytes(array.data))]
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays), 1, {})
        return Message(fitres_to_recorddict(result, keep_input=False), reply_to=message)

    return secaggplus_mod(message, context, app)


def vector(upload: Upload, download: Download, clip: float | None = None) -> list[Tensor]:
    """What one client changed, as it goes into the sum; its norm at most `clip`. A choice or a number of images is no
    part of it."""
    changed = changes(upload, download)
    scale = 1.0 if clip is None else float(clipping_scales(norms(changed, 1), clip))
    return [scale * changed[name][0] for name in sorted(changed)]


def mean_upload(
    expected: Upload, download: Download, clients: Tensor, learn: Callable[[Tensor], tuple[Sequence[Any], Tensor]]
) -> Upload:
    """The messages of n clients that say no more than the mean of each group that was sent the same.

    Args:
        expected: the layout of a message (`Strategy.expected`).
        download: what the clients are sent.
        clients: int64 `[n]`.
        learn: given places of clients in `download`, `[m]`, the arrays of their mean `vector`, and whose it is of them.

    Returns:
        Of the clients whose vectors are in the means.
    """
    template = _repeated(expected, clients)
    names = sorted(changes(template, download))
    shapes = {name: value.shape[1:] for name, value in changes(template, download).items()}
    group, places = groups(download), []
    means: dict[str, list[Tensor]] = {name: [] for name in names}
    for number in group.unique():
        arrays, among = learn((group == number).nonzero().flatten())
        if [tuple(array.shape) for array in arrays] != [tuple(shapes[name]) for name in names]:
            raise InvalidValueError("the clients' vectors have other shapes than their messages")
        places.append(among)
        for name, array in zip(names, arrays, strict=True):
            means[name].append(torch.as_tensor(array).expand(len(among), *shapes[name]))
    order = torch.cat(places).argsort()
    kept = torch.cat(places)[order]
    mean = {name: torch.cat(found)[order] for name, found in means.items()}
    like = _repeated(expected, clients[kept])
    typed = {name: mean[name].to(value) for name, value in changes(like, download.of(kept)).items()}
    return spread(like, download.of(kept), typed)


def _repeated(expected: Upload, clients: Tensor) -> Upload:
    """A message of the layout for each client."""
    rows = expected.rows(torch.zeros(len(clients), dtype=torch.long))
    return Upload(clients, torch.ones_like(clients), rows.tiers, rows.head)
