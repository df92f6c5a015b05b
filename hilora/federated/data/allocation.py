"""Whole numbers of images for clients: dealt evenly, drawn from Dirichlet proportions, rounded without going over."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_FIT_STEPS = 500
_SMALL = 0.01  # a concentration below which most proportions are nothing, and the order of the rest is what counts


def deal(clients: int, pools: int, each: int, rng: np.random.Generator) -> Bools:
    """Deals `each` of the pools to every client, `[N, K]`; how often two pools are dealt differs by one at most."""
    dealt = np.zeros((clients, pools), bool)
    times = np.zeros(pools, np.int64)
    for row in dealt:
        row[np.lexsort((rng.random(pools), times))[:each]] = True
        times += row
    return dealt


def allocate(support: Bools, capacities: Ints, size: int | None, alpha: float, rng: np.random.Generator) -> Ints:
    """Draws each client's proportions over its classes, and fits numbers of images to them.

    Args:
        support: `[N, C]`, the classes that a client has.
        capacities: `[C]`, the images of each class.
        size: images of a client; None divides all images, a client having as many as if each class were shared equally
            by those that have it.
        alpha: the Dirichlet's concentration; infinity gives equal shares.
        rng: draws the proportions, and breaks ties.

    Returns:
        int64 `[N, C]`. Columns stay within `capacities`, and rows reach their size unless the client's classes run out.
    """
    shares = support / support.sum(1, keepdims=True)
    if alpha < _SMALL:
        shares, order = _near_vertices(support, alpha, rng)
    elif np.isfinite(alpha):
        for row, has in zip(shares, support, strict=True):
            row[has] = np.maximum(rng.dirichlet(np.full(has.sum(), alpha)), 1e-12)  # no class is quite out of reach
    if size is None:
        equal = (capacities * support / np.maximum(support.sum(0), 1)).sum(1)  # [N]
        sizes = apportion(equal, capacities[support.any(0)].sum(), rng)
    else:
        sizes = np.full(len(support), size)
    if alpha < _SMALL:
        counts = _fill(shares, order, support, sizes, capacities, rng)
    else:
        counts = _round(_fit(shares, sizes, capacities), support, sizes, capacities, rng)
    if size is None:  # the few images that no client could have without going over its size
        rest = np.where(support.any(0), capacities, 0)
        counts = _round(counts.T, support.T, rest, np.full(len(support), capacities.sum()), rng).T
    return counts


def apportion(shares: Floats, total: int, rng: np.random.Generator) -> Ints:
    """Rounds `shares [C]`, which sum to `total` (or are all 0), by largest remainder to integers that do."""
    counts: Ints = _round(shares[None], shares[None] > 0, np.array([total]), np.ceil(shares).astype(np.int64), rng)[0]
    return counts


def hold_out(groups: Ints, number: int, rng: np.random.Generator) -> list[int]:
    """Chooses clients from the groups in turn; the last one of a group only once every group is down to its last.

    Args:
        groups: `[N]`, the group of each client.
        number: how many to choose.
        rng: draws the order of the groups and of the clients in each.

    Returns:
        Their ids.
    """
    turn, last = np.zeros(len(groups)), np.zeros(len(groups), bool)
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        turn[members] = np.arange(len(members))
        last[members[-1]] = True
    order: list[int] = np.lexsort((rng.permutation(groups.max() + 1)[groups], turn, last)).tolist()
    return order[:number]


def _fit(shares: Floats, sizes: Ints, capacities: Ints) -> Floats:
    """Images of rows of `sizes`, in the proportions of `shares [N, C]` as nearly as there are images of the classes."""
    fitted = shares * sizes[:, None]
    for _ in range(_FIT_STEPS):  # iterative proportional fitting; it ends with the columns, so that none is exceeded
        fitted *= np.minimum(1, capacities / np.maximum(fitted.sum(0), 1e-300))
        growth = sizes / np.maximum(fitted.sum(1), 1e-300)
        if growth.max() < 1 + 1e-6:
            break
        fitted *= growth[:, None]
    else:
        fitted *= np.minimum(1, capacities / np.maximum(fitted.sum(0), 1e-300))
    return fitted


def _near_vertices(support: Bools, alpha: float, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Draws proportions from Dirichlet(alpha) for an alpha so small that most of them are too small for a float.

    Returns:
        The proportions `[N, C]`, and the logarithms of what was drawn, times alpha: they tell which of two that are
        nothing is less.
    """
    # A variate of Gamma(a) is one of Gamma(a + 1) times u^(1 / a), u uniform; its logarithm times a stays finite.
    drawn = alpha * np.log(rng.standard_gamma(1 + alpha, support.shape)) - rng.standard_exponential(support.shape)
    order = np.where(support, drawn, -np.inf)
    with np.errstate(over="ignore"):
        shares = np.exp((order - order.max(1, keepdims=True)) / alpha)
    return shares / shares.sum(1, keepdims=True), order


def _fill(
    shares: Floats, order: Floats, support: Bools, sizes: Ints, capacities: Ints, rng: np.random.Generator
) -> Ints:
    """Numbers of images in these proportions. Where a class runs out, those come first that are most set on it, and the
    others go on with the next of their own; so rows have few classes, and as different ones as the order has them.
    """
    plenty = np.full(len(capacities), sizes.sum())
    wanted = _round(shares * sizes[:, None], support, sizes, plenty, rng)
    cells = np.argwhere(support)[np.argsort(-order[support], kind="stable")]
    counts, missing, room = np.zeros_like(wanted), sizes.copy(), capacities.copy()
    for most in (wanted, np.broadcast_to(plenty, wanted.shape)):
        _add(counts, cells, missing, room, most)
    return counts


def _round(shares: Floats | Ints, support: Bools, rows: Ints, columns: Ints, rng: np.random.Generator) -> Ints:
    """Rounds `shares [R, C]` by largest remainder so that rows come to `rows`, and columns to no more than `columns`.

    What a row misses because columns are full goes to others that it has by `support [R, C]`, as far as there is room.
    """
    counts = np.floor(shares + 1e-9).astype(np.int64)
    missing, room = rows - counts.sum(1), columns - counts.sum(0)
    remainders = np.round(shares - counts, 9)[support]
    cells = np.argwhere(support)[np.lexsort((rng.random(len(remainders)), -remainders))]
    for most in (1, columns.max()):
        _add(counts, cells, missing, room, np.full_like(counts, most))
    return counts


def _add(counts: Ints, cells: Ints, missing: Ints, room: Ints, most: Ints) -> None:
    """Adds to the cells, one after the other, what their rows are `missing` and their columns have `room` for, so far
    as it is not more than `most [R, C]`.
    """
    for row, column in cells.tolist():
        extra = min(missing[row], room[column], most[row, column])
        counts[row, column] += extra
        missing[row] -= extra
        room[column] -= extra
