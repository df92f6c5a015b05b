from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hilora.federated.data.allocation import allocate
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions import PartitionError, Population, partition
from hilora.federated.data.partitions.dealt import Dealt
from hilora.federated.data.readers import read_images

MODULE = sys.modules[Dealt.__module__]
SCHEMES = ("sc-dir", "gl-dir", "patho")


def image_set(counts: list[int], seed: int = 0, supers: int | None = None) -> ImageSet:
    """Images of one pixel, `counts[c]` of class c; class c is in superclass c % supers."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    return ImageSet(
        images=torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8),
        labels=labels,
        classes=tuple(f"class {c}" for c in range(len(counts))),
        name="toy",
        groups=torch.arange(len(counts)) % supers if supers else None,
        group_names=tuple(f"super {g}" for g in range(supers or 0)),
    )


TRAIN, TEST = image_set([50] * 20, 1, supers=4), image_set([20] * 20, 2, supers=4)


def check(population: Population, train: ImageSet, test: ImageSet, test_images: int) -> None:
    """What holds of every population."""
    owned = torch.cat([torch.cat([client.train, client.val]) for client in population.clients])
    assert owned.dtype == torch.int64
    assert len(set(owned.tolist())) == len(owned), "an image has two owners"
    assert len(owned) == 0 or (owned.min() >= 0 and owned.max() < len(train))
    counts = population.class_counts(train.labels, len(train.classes))
    available = torch.bincount(test.labels, minlength=len(test.classes))
    for client, row in zip(population.clients, counts, strict=True):
        assert client.test.dtype == torch.int64
        assert len(set(client.test.tolist())) == len(client.test) <= test_images
        tests = torch.bincount(test.labels[client.test], minlength=len(test.classes))
        quota = row * test_images / max(len(client.train), 1)
        assert (tests <= available).all()
        assert ((tests - torch.minimum(quota, available)).abs() < 1).all()
        if len(client.train) and (quota.ceil() <= available).all():
            assert len(client.test) == test_images
    ids = torch.cat([population.seen, population.unseen])
    assert sorted(ids.tolist()) == list(range(len(population.clients)))
    assert all(client.seen == (i in population.seen) for i, client in enumerate(population.clients))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_clients_get_the_images_asked_for(scheme):
    population = partition(
        TRAIN,
        TEST,
        scheme,
        clients=10,
        images_per_client=40,
        test_images=15,
        classes_per_client=5,
        superclasses=4,
        seed=3,
    )
    check(population, TRAIN, TEST, 15)
    assert [(len(client.train), len(client.val)) for client in population.clients] == [(40, 10)] * 10
    assert [len(client.test) for client in population.clients] == [15] * 10
    assert len(population.unseen) == 2
    assert population.scheme == scheme


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("clients", [4, 7, 32])
def test_without_a_number_all_images_are_divided_out(scheme, clients):
    population = partition(TRAIN, TEST, scheme, clients=clients, classes_per_client=5, superclasses=4, seed=0)
    check(population, TRAIN, TEST, 100)
    assert sum(len(client.train) + len(client.val) for client in population.clients) == 1000
    for client in population.clients:
        assert abs(len(client.val) - len(client.train) / 4) <= 0.6


def test_gl_dir_draws_from_all_classes_with_its_alpha():
    def effective_classes(alpha: float | None) -> float:
        population = partition(TRAIN, TEST, "gl-dir", clients=10, images_per_client=40, alpha=alpha, seed=0)
        shares = population.class_counts(TRAIN.labels, 20) / 40
        return float((1 / shares.square().sum(1)).mean())

    assert effective_classes(0.05) < effective_classes(0.3) < effective_classes(3) < effective_classes(1e9)
    assert effective_classes(None) == effective_classes(0.3)
    assert effective_classes(1e9) == pytest.approx(20, abs=0.01)
    population = partition(TRAIN, TEST, "gl-dir", clients=10, seed=0)
    assert population.groups == ()
    assert population.true_groups is None


def test_gl_dir_follows_the_dirichlet_where_images_abound():
    train, test = image_set([4000] * 5), image_set([10] * 5)
    population = partition(train, test, "gl-dir", clients=400, images_per_client=30, val_share=0, alpha=0.5, seed=0)
    shares = population.class_counts(train.labels, 5) / 30
    assert shares.mean(0).tolist() == pytest.approx([0.2] * 5, abs=0.05)
    assert shares.var(0).mean() == pytest.approx(0.2 * 0.8 / (5 * 0.5 + 1), rel=0.15)


def test_sc_dir_puts_a_client_on_one_superclass():
    population = partition(TRAIN, TEST, "sc-dir", clients=20, images_per_client=30, seed=0)
    assert population.groups == tuple(TRAIN.group_names)
    assert population.true_groups is not None
    assert population.true_groups.dtype == torch.int64
    assert torch.bincount(population.true_groups).tolist() == [5] * 4
    assert TRAIN.groups is not None
    for client in population.clients:
        assert client.group is not None
        assert (TRAIN.groups[TRAIN.labels[client.train]] == client.group).all()
        assert (TRAIN.groups[TRAIN.labels[client.val]] == client.group).all()
        assert set(TRAIN.groups[TEST.labels[client.test]].tolist()) == {client.group}


@pytest.mark.parametrize(("clients", "superclasses", "used"), [(4, None, 1), (11, None, 2), (100, None, 4), (9, 3, 3)])
def test_sc_dir_uses_as_many_superclasses_as_suit_the_clients(clients, superclasses, used):
    population = partition(TRAIN, TEST, "sc-dir", clients=clients, superclasses=superclasses, seed=5)
    assert len(population.groups) == used
    assert population.true_groups is not None
    sizes = torch.bincount(population.true_groups, minlength=used)
    assert sizes.max() - sizes.min() <= 1
    assert TRAIN.groups is not None
    for client in population.clients:
        assert client.group is not None
        superclass = set(TRAIN.groups[TRAIN.labels[client.train]].tolist())
        assert {TRAIN.group_names[g] for g in superclass} == {population.groups[client.group]}


def test_sc_dir_on_two_superclasses_has_no_true_groups():
    population = partition(
        TRAIN,
        TEST,
        "sc-dir",
        clients=12,
        superclasses=4,
        superclasses_per_client=2,
        images_per_client=40,
        alpha=50,
        seed=0,
    )
    assert population.groups == ()
    assert population.true_groups is None
    assert TRAIN.groups is not None
    dealt = [sorted(set(TRAIN.groups[TRAIN.labels[client.train]].tolist())) for client in population.clients]
    assert all(len(own) == 2 for own in dealt)
    assert np.bincount(np.concatenate(dealt)).tolist() == [6] * 4
    one = partition(TRAIN, TEST, "sc-dir", clients=3, superclasses_per_client=2, images_per_client=40, seed=0)
    assert len(one.class_counts(TRAIN.labels, 20).any(0).nonzero()) <= 10, "two superclasses for three clients"


@pytest.mark.parametrize("clients", [3, 8, 10])
def test_patho_deals_classes_evenly_in_equal_shares(clients):
    population = partition(
        TRAIN,
        TEST,
        "patho",
        clients=clients,
        images_per_client=25,
        classes_per_client=5,
        val_share=0,
        test_images=10,
        seed=0,
    )
    counts = population.class_counts(TRAIN.labels, 20)
    assert ((counts == 5) | (counts == 0)).all()
    assert ((counts > 0).sum(1) == 5).all()
    users = (counts > 0).sum(0)
    assert users.max() - users.min() <= 1
    for client in population.clients:
        assert set(torch.bincount(TEST.labels[client.test]).tolist()) <= {0, 2}


def test_unseen_clients_come_evenly_from_the_groups():
    for seed in range(5):
        population = partition(TRAIN, TEST, "sc-dir", clients=20, unseen=0.3, seed=seed)
        assert population.true_groups is not None
        per_group = torch.bincount(population.true_groups[population.unseen], minlength=4)
        assert sorted(per_group.tolist()) == [1, 1, 2, 2]


def test_every_group_keeps_a_seen_client_as_long_as_possible():
    for unseen, kept in ((0.7, 4), (0.8, 2)):
        population = partition(TRAIN, TEST, "sc-dir", clients=10, superclasses=4, unseen=unseen, seed=1)
        assert population.true_groups is not None
        assert len(set(population.true_groups[population.seen].tolist())) == min(kept, len(population.seen))
    population = partition(TRAIN, TEST, "sc-dir", clients=6, superclasses=4, unseen=0.5, seed=1)
    assert population.true_groups is not None
    assert len(set(population.true_groups[population.seen].tolist())) == 3


def test_unseen_clients_are_random_without_groups():
    chosen = [tuple(partition(TRAIN, TEST, "gl-dir", clients=10, seed=seed).unseen.tolist()) for seed in range(8)]
    assert all(len(ids) == 2 for ids in chosen)
    assert len(set(chosen)) > 3
    assert len(partition(TRAIN, TEST, "gl-dir", clients=10, unseen=0, seed=0).unseen) == 0


def test_validation_images_keep_the_proportions():
    for scheme in SCHEMES:
        population = partition(TRAIN, TEST, scheme, clients=6, classes_per_client=4, seed=0)
        for client in population.clients:
            kept = torch.bincount(TRAIN.labels[client.train], minlength=20)
            val = torch.bincount(TRAIN.labels[client.val], minlength=20)
            share = len(client.val) / (len(client.val) + len(client.train))
            assert ((val - (kept + val) * share).abs() < 1).all()


def test_a_class_that_runs_out_leaves_a_client_short():
    train, test = image_set([30, 4], supers=2), image_set([10, 1], supers=2)
    population = partition(
        train,
        test,
        "patho",
        clients=2,
        images_per_client=10,
        val_share=0,
        classes_per_client=1,
        unseen=0,
        test_images=5,
        seed=0,
    )
    assert sorted(len(client.train) for client in population.clients) == [4, 10]
    assert sorted(len(client.test) for client in population.clients) == [1, 5]


def test_classes_without_images_are_passed_over():
    train, test = image_set([0, 30, 30, 0, 30], supers=3), image_set([5] * 5, supers=3)
    for scheme in SCHEMES:
        population = partition(train, test, scheme, clients=3, images_per_client=8, classes_per_client=2, seed=0)
        check(population, train, test, 100)
        assert [len(client.train) for client in population.clients] == [8] * 3


def test_clients_may_be_tiny():
    train = image_set([2] * 3)
    population = partition(train, train, "gl-dir", clients=6, min_images=1, test_images=1, seed=0)
    assert [(len(client.train), len(client.val)) for client in population.clients] == [(1, 0)] * 6
    population = partition(train, train, "gl-dir", clients=8, min_images=0, seed=0)
    assert sorted(len(client.train) for client in population.clients) == [0, 0] + [1] * 6
    assert sorted(len(client.test) for client in population.clients) == [0, 0] + [2] * 6


@pytest.mark.parametrize("alpha", [1e-300, 1e-4, 1e9, 1e308])
def test_extreme_concentrations_still_divide_all_images(alpha):
    population = partition(TRAIN, TEST, "gl-dir", clients=8, alpha=alpha, seed=0)
    check(population, TRAIN, TEST, 100)
    assert [len(client.train) for client in population.clients] == [100] * 8


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_seed_decides_everything(scheme):
    def flat(seed: int) -> list[object]:
        population = partition(TRAIN, TEST, scheme, clients=7, classes_per_client=3, seed=seed)
        return [
            (client.train.tolist(), client.val.tolist(), client.test.tolist(), client.group, client.seen)
            for client in population.clients
        ]

    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    first = flat(4)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert flat(4) == first
    assert flat(5) != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "iid"}, "scheme is 'iid', expected one of domains, gl-dir, patho, sc-dir"),
        ({"clients": 0}, "clients is 0, expected at least 1"),
        ({"unseen": 1.0}, "unseen is 1.0"),
        ({"unseen": -0.1}, "unseen is -0.1"),
        ({"unseen": float("nan")}, "unseen is nan"),
        ({"clients": 2, "unseen": 0.9}, "unseen=0.9 of 2 clients leaves none"),
        ({"test_images": 0}, "test_images is 0"),
        ({"val_share": -1}, "val_share is -1"),
        ({"val_share": float("nan")}, "val_share is nan"),
        ({"min_images": -1}, "min_images is -1"),
        ({"max_tries": 0}, "max_tries is 0"),
        ({"alpha": 0.0}, "alpha is 0.0, expected a positive number"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"images_per_client": 0}, "images_per_client is 0, expected at least 2"),
        ({"images_per_client": 3, "min_images": 4}, "images_per_client is 3, expected at least 4"),
        ({"images_per_client": 81}, "10 clients of 101 .* need 1010, and their classes hold 1000"),
        ({"clients": 501}, r"501 clients of 2 images each"),
        ({"scheme": "patho", "classes_per_client": 21}, "classes_per_client is 21, expected 1 to 20"),
        ({"scheme": "patho", "classes_per_client": 0}, "classes_per_client is 0"),
        (
            {"scheme": "patho", "clients": 5, "classes_per_client": 2, "images_per_client": 90},
            "5 clients of 112 images each, validation included, need 560, and their classes hold 500",
        ),
        (
            {"scheme": "patho", "clients": 2, "classes_per_client": 1, "images_per_client": 48},
            "2 clients of 60 .* need 120, and their classes hold 100",
        ),
        ({"scheme": "sc-dir", "superclasses": 5}, "superclasses is 5, expected 1 to 4"),
        ({"scheme": "sc-dir", "superclasses": 0}, "superclasses is 0"),
        ({"scheme": "sc-dir", "superclasses": 4, "clients": 3}, "superclasses=4 are more than 3 clients"),
        (
            {"scheme": "sc-dir", "superclasses": 1, "superclasses_per_client": 2},
            "superclasses_per_client is 2, expected 1 to 1",
        ),
        ({"scheme": "sc-dir", "superclasses_per_client": 0}, "superclasses_per_client is 0"),
        ({"scheme": "sc-dir", "images_per_client": 41}, "10 clients of 51 .* need 510, and their classes hold 500"),
        (
            {"scheme": "sc-dir", "clients": 11, "images_per_client": 36},
            "6 clients of 45 .* need 270, and their classes hold 250",
        ),
        ({"scheme": "sc-dir", "train": image_set([50] * 20)}, "sc-dir needs superclasses and toy has none"),
        ({"train": image_set([50] * 19)}, "differ in classes"),
        ({"train": image_set([0] * 20)}, "toy has no training images"),
    ],
)
def test_impossible_requests_fail_at_once(change, message, monkeypatch):
    monkeypatch.setattr(MODULE, "allocate", lambda *_: pytest.fail("it began to draw"))
    arguments = {"train": TRAIN, "test": TEST, "scheme": "gl-dir", "clients": 10, "seed": 0} | change
    with pytest.raises(PartitionError, match=message):
        partition(**arguments)


@pytest.mark.parametrize("max_tries", [1, 7])
def test_draws_are_bounded(max_tries, monkeypatch):
    train, draws = image_set([30, 1]), []

    def counted(*arguments):
        draws.append(1)
        return allocate(*arguments)

    monkeypatch.setattr(MODULE, "allocate", counted)
    with pytest.raises(
        PartitionError, match=rf"each of {max_tries} draws .* in the last one with 1 .*lower min_images"
    ):
        partition(
            train,
            train,
            "patho",
            clients=2,
            images_per_client=2,
            val_share=0,
            classes_per_client=1,
            seed=0,
            max_tries=max_tries,
        )
    assert len(draws) == max_tries


def test_draws_are_repeated_until_every_client_has_enough():
    train = image_set([40, 40, 1])
    populations = [
        partition(train, train, "patho", clients=2, images_per_client=5, val_share=0, classes_per_client=1, seed=seed)
        for seed in range(10)
    ]
    assert all(len(client.train) == 5 for population in populations for client in population.clients)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    scheme=st.sampled_from(SCHEMES),
    counts=st.lists(st.integers(0, 30), min_size=4, max_size=8),
    clients=st.integers(1, 9),
    images=st.none() | st.integers(1, 12),
    test_images=st.integers(1, 12),
    val_share=st.sampled_from([0, 0.25, 1.5]),
    unseen=st.sampled_from([0, 0.2, 0.7]),
    alpha=st.none() | st.floats(0.001, 100),
    per_client=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_every_population_is_sound(
    scheme, counts, clients, images, test_images, val_share, unseen, alpha, per_client, seed
):
    train, test = image_set(counts, supers=3), image_set(counts[::-1], supers=3)
    try:
        population = partition(
            train,
            test,
            scheme,
            clients=clients,
            unseen=unseen,
            images_per_client=images,
            test_images=test_images,
            val_share=val_share,
            min_images=1,
            alpha=alpha,
            classes_per_client=per_client,
            superclasses_per_client=per_client,
            seed=seed,
            max_tries=5,
        )
    except PartitionError:
        return
    check(population, train, test, test_images)
    sizes = [len(client.train) for client in population.clients]
    assert len(sizes) == clients
    assert min(sizes) >= 1
    assert len(population.unseen) == round(unseen * clients)
    total = sum(sizes) + sum(len(client.val) for client in population.clients)
    if images is not None:
        assert max(sizes) <= images
        assert all(len(client.val) <= round(images * val_share) for client in population.clients)
        if scheme == "gl-dir":
            assert total == clients * (images + round(images * val_share))
    elif scheme == "gl-dir":
        assert total == sum(counts)
    if scheme == "patho":
        assert ((population.class_counts(train.labels, len(counts)) > 0).sum(1) <= per_client).all()


@pytest.fixture(scope="module")
def cifar100() -> tuple[ImageSet, ImageSet]:
    if "HILORA_TEST_DATA" not in os.environ:
        pytest.skip("HILORA_TEST_DATA does not name a folder that holds cifar-100-binary")
    return read_images(Path(os.environ["HILORA_TEST_DATA"]), 32, 0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("clients", "images"), [(100, None), (25, 128)])
def test_the_real_cifar100(cifar100, scheme, clients, images):
    train, test = cifar100
    population = partition(train, test, scheme, clients=clients, images_per_client=images, seed=0)
    check(population, train, test, 100)
    sizes = {(len(client.train), len(client.val), len(client.test)) for client in population.clients}
    assert sizes == {(images or 400, 32 if images else 100, 100)}
    assert len(population.unseen) == clients // 5
    counts = population.class_counts(train.labels, 100)
    if scheme == "patho":
        assert ((counts > 0).sum(1) == 10).all()
        assert ((counts > 0).sum(0).float() == clients / 10).all() or clients == 25
    if scheme == "sc-dir":
        assert population.true_groups is not None
        assert torch.bincount(population.true_groups).tolist() == [5] * (clients // 5)
        assert torch.bincount(population.true_groups[population.unseen]).tolist() == [1] * (clients // 5)
        assert ((counts > 0).sum(1) <= 5).all()
    if scheme == "gl-dir":
        assert ((counts > 0).sum(1) > 20).all()
