"""Who has which images: the partitions of a labelled image set among clients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hilora.federated.data.allocation import Bools, Ints, allocate, apportion, deal, hold_out
from hilora.federated.data.images import ImageSet

ALPHA = {"gl-dir": 0.3, "sc-dir": 3.0, "patho": np.inf, "domains": 0.6}
"""The schemes that there are, with the concentration that each has by default; infinite means equal shares."""


class PartitionError(ValueError):
    """The images cannot be divided as asked."""


@dataclass(frozen=True)
class Client:
    """The images of one client.

    Attributes:
        train: int64 `[n]`, indices into the training set; no other client has them.
        val: int64 `[n]`, the same, kept from training.
        test: int64 `[n]`, indices into the test set; other clients may have them too.
        group: its true group, an index into the population's `groups`, or None where the partition has none.
        seen: whether it takes part in training; the others are the unseen clients.
    """

    train: Tensor
    val: Tensor
    test: Tensor
    group: int | None
    seen: bool


@dataclass(frozen=True)
class Population:
    """All clients of a simulation, and the scheme that divided the images among them.

    Attributes:
        clients: N of them; a client's id is its place.
        scheme: sc-dir, gl-dir, patho or domains.
        groups: names of the true groups, empty where there are none.
    """

    clients: tuple[Client, ...]
    scheme: str
    groups: tuple[str, ...]

    @property
    def seen(self) -> Tensor:
        """Int64 ids of the clients that take part in training, ascending."""
        return torch.tensor([i for i, client in enumerate(self.clients) if client.seen], dtype=torch.int64)

    @property
    def unseen(self) -> Tensor:
        """Int64 ids of the clients that are held out, ascending."""
        return torch.tensor([i for i, client in enumerate(self.clients) if not client.seen], dtype=torch.int64)

    @property
    def true_groups(self) -> Tensor | None:
        """Int64 `[N]`, the true group of every client, or None where the partition has none."""
        groups = [client.group for client in self.clients if client.group is not None]
        return torch.tensor(groups, dtype=torch.int64) if groups else None

    def class_counts(self, labels: Tensor, classes: int) -> Tensor:
        """Int64 `[N, classes]`, the training images that a client has of a class, from the training set's `labels`."""
        return torch.stack([torch.bincount(labels[client.train], minlength=classes) for client in self.clients])


def partition(
    train: ImageSet,
    test: ImageSet,
    scheme: str,
    *,
    clients: int,
    unseen: float = 0.2,
    images_per_client: int | None = None,
    test_images: int = 100,
    val_share: float = 0.25,
    min_images: int = 2,
    alpha: float | None = None,
    classes_per_client: int = 10,
    superclasses_per_client: int = 1,
    superclasses: int | None = None,
    seed: int,
    max_tries: int = 100,
) -> Population:
    """Divides a training set among clients, and gives each a test set after its own class proportions.

    Every client has target proportions over the classes:

    - `gl-dir`: Dirichlet(alpha) over all classes.
    - `sc-dir`: Dirichlet(alpha) over the classes of its superclass, which is its true group; superclasses are dealt out
      evenly. With more than one superclass a client there are no true groups.
    - `patho`: equal shares of `classes_per_client` classes, dealt out evenly.
    - `domains`: Dirichlet(alpha) over the classes of its domain, which is its true group; domains are dealt out evenly.
      All its images are of that domain.

    They are fitted to the images that there are. A client whose classes run out may end short of images, and one whose
    classes have few test images short of `test_images`. The same arguments give the same population.

    Args:
        train: the training split, of which clients' training and validation images come.
        test: the test split, of the same classes.
        scheme: `sc-dir`, `gl-dir`, `patho` or `domains`.
        clients: how many there are, the unseen ones included.
        unseen: the share of them that is held out, evenly from the true groups.
        images_per_client: training images of a client; None divides all images of the classes in use.
        test_images: test images of a client.
        val_share: validation images for each training image, drawn beside these in the same proportions.
        min_images: the lowest number of training images that a client may end with.
        alpha: the Dirichlet's concentration; None is 0.3 for gl-dir, 3 for sc-dir and 0.6 for domains.
        classes_per_client: for patho.
        superclasses_per_client: for sc-dir.
        superclasses: for sc-dir, how many are in use; None is one for every five clients, as far as there are so many.
        seed: of all that is random.
        max_tries: how often to draw until every client has `min_images`.

    Raises:
        PartitionError: what is asked for is impossible, or did not come about in `max_tries` draws.
    """
    _require(scheme in ALPHA, f"scheme is {scheme!r}, expected one of {', '.join(ALPHA)}")
    _require(train.classes == test.classes, "the training and the test set differ in classes, expected the same")
    _require(len(train) > 0, f"{train.name} has no training images")
    if scheme == "domains":
        other = "read it with read_domains, or use another scheme"
        _require(train.domain_names != (), f"domains needs images with domains and {train.name} has none: {other}")
        same = train.domain_names == test.domain_names
        _require(same, "the training and the test set differ in domains, expected the same")
    _require(clients >= 1, f"clients is {clients}, expected at least 1")
    _require(0 <= unseen < 1, f"unseen is {unseen}, expected a share of the clients: at least 0, below 1")
    held_out = round(unseen * clients)
    _require(held_out < clients, f"unseen={unseen} of {clients} clients leaves none for training: lower it")
    _require(test_images >= 1, f"test_images is {test_images}, expected at least 1")
    _require(0 <= val_share < np.inf, f"val_share is {val_share}, expected 0 or a positive number")
    _require(min_images >= 0, f"min_images is {min_images}, expected at least 0")
    _require(max_tries >= 1, f"max_tries is {max_tries}, expected at least 1")
    _require(alpha is None or 0 < alpha < np.inf, f"alpha is {alpha}, expected a positive number")
    if images_per_client is not None:
        least = max(min_images, 1)
        _require(images_per_client >= least, f"images_per_client is {images_per_client}, expected at least {least}")

    rng = np.random.default_rng(seed)
    cells, test_cells = _cells(train, scheme), _cells(test, scheme)  # images of a cell are alike to the scheme
    kinds = len(train.classes) * (len(train.domain_names) if scheme == "domains" else 1)
    capacities = np.bincount(cells, minlength=kinds)  # [C]
    groups: tuple[str, ...] = ()
    per_client, what = 1, "classes"
    if scheme == "gl-dir":
        pools = (capacities > 0)[None]
    elif scheme == "patho":
        pools, per_client = np.eye(len(capacities), dtype=bool)[capacities > 0], classes_per_client
    elif scheme == "domains":
        pools, groups = _domains(train, capacities > 0, clients)
    else:
        per_client, what = superclasses_per_client, "superclasses"
        pools, groups = _superclasses(train, capacities > 0, clients, per_client, superclasses, rng)
    _require(
        1 <= per_client <= len(pools),
        f"{what}_per_client is {per_client}, expected 1 to {len(pools)}, as many {what} as are in use",
    )
    size = None if images_per_client is None else images_per_client + round(images_per_client * val_share)
    _check_room(pools @ capacities, clients, per_client, min_images if size is None else size)

    concentration = ALPHA[scheme] if alpha is None or scheme == "patho" else alpha
    for _ in range(max_tries):
        dealt = deal(clients, len(pools), per_client, rng)
        counts = allocate(dealt @ pools, capacities, size, concentration, rng)  # [N, C], training and validation
        val_sizes = np.rint(counts.sum(1) * val_share / (1 + val_share)).astype(np.int64)
        fewest = (counts.sum(1) - val_sizes).min()
        if fewest >= min_images:
            break
    else:
        raise PartitionError(
            f"{scheme}: in each of {max_tries} draws (max_tries) a client ended with too few training images, in the "
            f"last one with {fewest} where min_images is {min_images}: lower min_images or clients, or raise alpha"
        )

    val = np.stack([_divide(row, total, rng) for row, total in zip(counts, val_sizes, strict=True)])
    kept = counts - val
    part = np.full(len(cells), -1)  # i: training images of client i, N + i: its validation images
    for c in range(kinds):
        owners = np.repeat(np.arange(2 * clients), np.concatenate([kept[:, c], val[:, c]]))
        part[rng.permutation(np.flatnonzero(cells == c))[: len(owners)]] = owners
    test_pools = [np.flatnonzero(test_cells == c) for c in range(kinds)]
    group = dealt.argmax(1) if groups and per_client == 1 else None
    held_out_ids = hold_out(np.zeros(clients, np.int64) if group is None else group, held_out, rng)
    return Population(
        clients=tuple(
            Client(
                train=torch.from_numpy(np.flatnonzero(part == i)),
                val=torch.from_numpy(np.flatnonzero(part == clients + i)),
                test=torch.from_numpy(_draw(test_pools, _divide(kept[i], test_images, rng), rng)),
                group=None if group is None else int(group[i]),
                seen=i not in held_out_ids,
            )
            for i in range(clients)
        ),
        scheme=scheme,
        groups=() if group is None else groups,
    )


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise PartitionError(otherwise)


def _cells(images: ImageSet, scheme: str) -> Ints:
    """The cell of each image, `[n]`: its class, or in domains its class in its domain, `domain * classes + class`."""
    cells = images.labels
    if scheme == "domains" and images.domains is not None:
        cells = images.domains * len(images.classes) + cells
    return cells.cpu().numpy()


def _domains(train: ImageSet, present: Bools, clients: int) -> tuple[Bools, tuple[str, ...]]:
    """The domains in use: which cells each has, `[K, C]`, and their names."""
    domains = np.arange(len(present)) // len(train.classes)  # [C], of each cell
    used = np.unique(domains[present])
    _require(len(used) <= clients, f"clients is {clients}, expected one for each of {len(used)} domains at least")
    return (domains == used[:, None]) & present, tuple(train.domain_names[domain] for domain in used)


def _superclasses(
    train: ImageSet, present: Bools, clients: int, per_client: int, wanted: int | None, rng: np.random.Generator
) -> tuple[Bools, tuple[str, ...]]:
    """Draws the superclasses in use: which classes each has, `[K, C]`, and their names."""
    groups = np.full(len(present), -1) if train.groups is None else train.groups.cpu().numpy()
    known = np.unique(groups[present & (groups >= 0)])
    _require(len(known) > 0, f"sc-dir needs superclasses and {train.name} has none: use gl-dir or patho")
    count = min(max(per_client, clients // 5), len(known)) if wanted is None else wanted
    _require(
        1 <= count <= len(known), f"superclasses is {count}, expected 1 to {len(known)}, as many as {train.name} has"
    )
    _require(count <= clients * max(per_client, 1), f"superclasses={count} are more than {clients} clients can have")
    used = np.sort(rng.choice(known, count, replace=False))
    return (groups == used[:, None]) & present, tuple(train.group_names[group] for group in used)


def _check_room(rooms: Ints, clients: int, per_client: int, size: int) -> None:
    """Sees whether clients of `size` images can have them from `per_client` of the pools with `rooms [K]` images."""
    rooms = np.sort(rooms)[::-1]
    crowd = -(-clients // len(rooms)) if per_client == 1 else 1  # clients that are sure to have the same pools
    for many, pools in ((clients, clients * per_client), (crowd, per_client)):
        need, room = many * size, rooms[:pools].sum()
        _require(
            need <= room,
            f"{many} clients of {size} images each, validation included, need {need}, and their classes hold {room}: "
            "lower clients, images_per_client, min_images or val_share, or let them have more classes",
        )


def _divide(counts: Ints, total: int, rng: np.random.Generator) -> Ints:
    """Divides `total` in the proportions of `counts [C]`; nothing where these are all 0."""
    return apportion(counts * (total / max(counts.sum(), 1)), total, rng)


def _draw(pools: list[Ints], counts: Ints, rng: np.random.Generator) -> Ints:
    """Draws `counts[c]` of the indices in `pools[c]`, or as many as there are."""
    return np.concatenate([rng.permutation(pool)[:count] for pool, count in zip(pools, counts, strict=True)])
