from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions import PartitionError, Population, partition
from hilora.federated.data.readers import read_domains
from tests.federated.data.test_partition import check, image_set

pytestmark = pytest.mark.slow


def domain_set(counts: list[list[int]], seed: int = 0) -> ImageSet:
    """Images of one pixel, `counts[d][c]` of class c in domain d."""
    classes = len(counts[0])
    cells = image_set([count for row in counts for count in row], seed)
    return replace(
        cells,
        labels=cells.labels % classes,
        classes=cells.classes[:classes],
        domains=cells.labels // classes,
        domain_names=tuple(f"domain {d}" for d in range(len(counts))),
    )


def by_cell(images: ImageSet) -> ImageSet:
    """The same with the domains' classes as so many classes."""
    assert images.domains is not None
    names = tuple(f"{domain} {name}" for domain in images.domain_names for name in images.classes)
    return replace(images, labels=images.domains * len(images.classes) + images.labels, classes=names)


def check_domains(population: Population, train: ImageSet, test: ImageSet, test_images: int = 100) -> None:
    """What holds of every population over domains."""
    check(population, by_cell(train), by_cell(test), test_images)
    assert train.domains is not None
    assert test.domains is not None
    for client in population.clients:
        assert client.group is not None
        owned = torch.cat([train.domains[client.train], train.domains[client.val], test.domains[client.test]])
        assert {train.domain_names[int(domain)] for domain in owned} <= {population.groups[client.group]}


TRAIN, TEST = domain_set([[40] * 6, [90] * 6, [60] * 6], 1), domain_set([[20] * 6, [20] * 6, [20] * 6], 2)


@pytest.mark.parametrize(("clients", "images"), [(12, None), (12, 16), (13, None), (3, 100)])
def test_a_client_has_images_of_one_domain_and_clients_are_dealt_evenly(clients, images):
    population = partition(TRAIN, TEST, "domains", clients=clients, images_per_client=images, test_images=15, seed=0)
    check_domains(population, TRAIN, TEST, 15)
    assert population.scheme == "domains"
    assert population.groups == ("domain 0", "domain 1", "domain 2")
    assert population.true_groups is not None
    sizes = torch.bincount(population.true_groups)
    assert sizes.max() - sizes.min() <= clients % 3
    if images is None:
        assert sum(len(client.train) + len(client.val) for client in population.clients) == len(TRAIN)
    else:
        assert {len(client.train) for client in population.clients} == {images}


def test_unseen_clients_come_evenly_from_the_domains():
    for seed in range(3):
        population = partition(TRAIN, TEST, "domains", clients=15, unseen=0.4, seed=seed)
        assert population.true_groups is not None
        assert torch.bincount(population.true_groups[population.unseen]).tolist() == [2, 2, 2]


def test_the_default_concentration_is_the_papers():
    def skew(alpha: float | None) -> float:
        population = partition(TRAIN, TEST, "domains", clients=12, images_per_client=12, alpha=alpha, seed=0)
        return float((population.class_counts(TRAIN.labels, 6) / 12).square().sum(1).mean())

    assert skew(None) == skew(0.6)
    assert skew(0.1) > skew(0.6) > skew(1e6)


def test_classes_that_a_domain_lacks_are_passed_over():
    train, test = domain_set([[30, 0, 30], [0, 0, 9], [0, 0, 0]]), domain_set([[9, 9, 9], [9, 9, 9], [9, 9, 9]])
    population = partition(train, test, "domains", clients=4, seed=0)
    check_domains(population, train, test)
    assert population.groups == ("domain 0", "domain 1"), "there are no training images of the third"
    counts = population.class_counts(train.labels, 3)
    assert (counts[population.true_groups == 1][:, :2] == 0).all()


def test_the_seed_decides_everything():
    def flat(seed: int) -> list[object]:
        population = partition(TRAIN, TEST, "domains", clients=7, seed=seed)
        return [(client.train.tolist(), client.test.tolist(), client.seen) for client in population.clients]

    assert flat(4) == flat(4) != flat(5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clients": 2}, "clients is 2, expected one for each of 3 domains at least"),
        (
            {"train": image_set([50] * 6)},
            "domains needs images with domains and toy has none: read it with read_domain",
        ),
        ({"test": image_set([50] * 6)}, "the training and the test set differ in domains"),
        ({"images_per_client": 200}, "9 clients of 250 .* need 2250, and their classes hold 1140"),
    ],
)
def test_impossible_requests_say_why(change, message):
    arguments = {"train": TRAIN, "test": TEST, "scheme": "domains", "clients": 9, "seed": 0} | change
    with pytest.raises(PartitionError, match=message):
        partition(**arguments)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    counts=st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3), min_size=1, max_size=4),
    clients=st.integers(1, 9),
    images=st.none() | st.integers(1, 12),
    unseen=st.sampled_from([0, 0.2, 0.7]),
    alpha=st.none() | st.floats(0.01, 100),
    seed=st.integers(0, 5),
)
def test_every_population_is_sound(counts, clients, images, unseen, alpha, seed):
    train, test = domain_set(counts), domain_set(counts[::-1])
    try:
        population = partition(
            train,
            test,
            "domains",
            clients=clients,
            unseen=unseen,
            images_per_client=images,
            test_images=8,
            min_images=1,
            alpha=alpha,
            seed=seed,
            max_tries=5,
        )
    except PartitionError:
        return
    check_domains(population, train, test, 8)
    assert len(population.clients) == clients
    assert len(population.unseen) == round(unseen * clients)
    if images is None:
        assert sum(len(client.train) + len(client.val) for client in population.clients) == len(train)


def test_the_real_pacs():
    root = os.environ.get("HILORA_TEST_DATA")
    if root is None or not Path(root, "pacs").is_dir():
        pytest.skip("HILORA_TEST_DATA does not name a folder that holds pacs")
    train, test = read_domains(Path(root, "pacs"), 8, seed=0)
    population = partition(train, test, "domains", clients=60, seed=0)
    check_domains(population, train, test)
    assert population.groups == ("art_painting", "cartoon", "photo", "sketch")
    assert population.true_groups is not None
    assert torch.bincount(population.true_groups).tolist() == [15] * 4
    assert torch.bincount(population.true_groups[population.unseen]).tolist() == [3] * 4
    assert min(len(client.train) for client in population.clients) > 60
    assert min(len(client.test) for client in population.clients) > 50
