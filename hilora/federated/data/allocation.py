"""Whole numbers of images for clients: dealt evenly, drawn from Dirichlet proportions, rounded without going over."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_FIT_STEPS = 500


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
    if np.isfinite(alpha):
        for row, has in zip(shares, support, strict=True):
            row[has] = np.maximum(rng.dirichlet(np.full(has.sum(), alpha)), 1e-12)  # no class is quite out of reach
    if size is None:
        equal = (capacities * support / np.maximum(support.sum(0), 1)).sum(1)  # [N]
        sizes = apportion(equal, capacities[support.any(0)].sum(), rng)
    else:
        sizes = np.full(len(support), size)
    fitted = shares * sizes[:, None]
    for _ in range(_FIT_STEPS):  # iterative proportional fitting; it ends with the columns, so that none is exceeded
        fitted *= np.minimum(1, capacities / np.maximum(fitted.sum(0), 1e-300))
        growth = sizes / np.maximum(fitted.sum(1), 1e-300)
        if growth.max() < 1 + 1e-6:
            break
        fitted *= growth[:, None]
    else:
        fitted *= np.minimum(1, capacities / np.maximum(fitted.sum(0), 1e-300))
    counts = _round(fitted, support, sizes, capacities, rng)
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


def _round(shares: Floats | Ints, support: Bools, rows: Ints, columns: Ints, rng: np.random.Generator) -> Ints:
    """Rounds `shares [R, C]` by largest remainder so that rows come to `rows`, and columns to no more than `columns`.

    What a row misses because columns are full goes to others that it has by `support [R, C]`, as far as there is room.
    """
    counts = np.floor(shares + 1e-9).astype(np.int64)
    missing, room = rows - counts.sum(1), columns - counts.sum(0)
    remainders = np.round(shares - counts, 9)[support]
    cells = np.argwhere(support)[np.lexsort((rng.random(len(remainders)), -remainders))].tolist()
    for most in (1, columns.max()):
        for row, column in cells:
            extra = min(missing[row], room[column], most)
            counts[row, column] += extra
            missing[row] -= extra
            room[column] -= extra
    return counts
