"""Training on images that lie on disk is the training on the same images in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hilora.federated.data.images import ImageSet
from hilora.federated.data.stored import StoredImages, stored
from tests.federated.conftest import Simulate, records, same, squares

pytestmark = pytest.mark.slow


def on_disk(images: ImageSet, name: str) -> ImageSet:
    tensor = images.images[:]
    n, channels, height, width = tensor.shape
    kept = stored(name, {}, (n, channels, height, width), lambda start: ((row.numpy(), 0) for row in tensor[start:]))
    return replace(images, images=kept)


@pytest.mark.parametrize("augment", [False, True])
def test_a_run_is_the_same_from_disk(simulate: Simulate, tmp_path: Path, monkeypatch, augment: bool) -> None:
    monkeypatch.setenv("HILORA_CACHE", str(tmp_path / "cache"))
    kept = squares(120, 1), squares(42, 2)
    read = on_disk(kept[0], "train"), on_disk(kept[1], "test")
    one, other = (
        simulate("hilora", tmp_path / name, images=images, augment=augment, rounds=[2, 1, 1])
        for name, images in (("memory", kept), ("disk", read))
    )
    assert isinstance(other.train_images.images, StoredImages)
    assert isinstance(one.train_images.images, torch.Tensor)
    summaries = [run.run() for run in (one, other)]
    assert summaries[0]["final"] == summaries[1]["final"]
    clients = one.population.seen
    first, second = one.models(clients), other.models(clients)
    assert first.tiers.keys() == second.tiers.keys()
    assert all(same(first.tiers[tier].taken(), second.tiers[tier].taken()) for tier in first.tiers)
    assert same(first.head.taken(), second.head.taken())
    assert [record["loss"] for record in records(one)] == [record["loss"] for record in records(other)]


def test_a_run_in_memory_goes_on_from_disk(simulate: Simulate, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HILORA_CACHE", str(tmp_path / "cache"))
    kept = squares(120, 1), squares(42, 2)
    simulate("hilora", images=kept, rounds=[1, 1, 0]).run()
    read = on_disk(kept[0], "train"), on_disk(kept[1], "test")
    simulate("hilora", images=read, rounds=[1, 1, 0], resume=True)
    wrong = replace(kept[0], images=255 - kept[0].images[:])
    with pytest.raises(ValueError, match="is of another run: data was"):
        simulate("hilora", images=(on_disk(wrong, "wrong"), kept[1]), rounds=[1, 1, 0], resume=True)
