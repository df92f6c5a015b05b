"""A client of a deployment: it answers what the server asks, from images that stay with it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hilora.adapters.io.files import checksum
from hilora.errors import InvalidValueError
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions import Client, Partition, Population, partition
from hilora.federated.deploy.messages import Counts, Done, Errand, Lacks, MessageError, Order, Present
from hilora.federated.deploy.private import Private
from hilora.federated.deploy.settings import Asked
from hilora.federated.deploy.wire import Layout, done, downloaded, received
from hilora.federated.engine.batched import BatchedEngine
from hilora.federated.engine.device import DTYPES
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Head, Upload
from hilora.federated.strategies.base import Problem, Strategy
from hilora.federated.streams import stream
from hilora.models.backbone import Backbone

VAL_SHARE = 0.2  # of a client's own training images, kept from training


class OwnImages(NamedTuple):
    """The images of one client, and which of them are for what: indices into `train`, `train` and `test`."""

    train: ImageSet
    test: ImageSet
    shares: Client


def share_of(train: ImageSet, test: ImageSet, scheme: Partition, client: int, seed: int) -> OwnImages:
    """A client's share of a set of images that all clients have, divided as in the simulation; the others' images are
    not kept."""
    mine = partition(train, test, scheme, seed=seed).clients[client]
    both = torch.cat([mine.train, mine.val])
    shares = Client(
        torch.arange(len(mine.train)),
        torch.arange(len(mine.train), len(both)),
        torch.arange(len(mine.test)),
        mine.group,
        mine.seen,
    )
    return OwnImages(_only(train, both), _only(test, mine.test), shares)


def all_of(train: ImageSet, test: ImageSet, client: int, seed: int, seen: bool = True) -> OwnImages:
    """All images of a set, which are one client's: a fifth of the training images is for validation."""
    order = torch.randperm(len(train), generator=stream(seed, "validation", client))
    count = int(VAL_SHARE * len(train))
    shares = Client(order[count:].sort().values, order[:count].sort().values, torch.arange(len(test)), None, seen)
    return OwnImages(train, test, shares)


def _only(images: ImageSet, index: Tensor) -> ImageSet:
    domains = None if images.domains is None else images.domains[index]
    return replace(images, images=images.images[index], labels=images.labels[index], domains=domains)


def with_classes(images: ImageSet, names: tuple[str, ...], named: bool) -> ImageSet:
    """The images with the classes of the run: by name where the run names them, else by place.

    Raises:
        InvalidValueError: they have a class that the run does not have.
    """
    if not named:
        if len(images.classes) != len(names):
            raise InvalidValueError(
                f"{images.name} has {len(images.classes)} classes and the run {len(names)}: let its setting classes "
                "name them all, then a client may have some of them"
            )
        return images
    if odd := sorted(set(images.classes) - set(names)):
        raise InvalidValueError(
            f"{images.name} has classes {', '.join(odd)}, which the run does not have: {', '.join(names)}"
        )
    place = torch.tensor([names.index(name) for name in images.classes])
    return replace(images, labels=place[images.labels], classes=names, groups=None, group_names=())


class Member:
    """One client, with its half of the strategy.

    Args:
        asked: the settings of the run.
        backbone: the frozen ViT.
        images: the client's own.
        client: its id.
        device: where to compute.
    """

    def __init__(self, asked: Asked, backbone: Backbone, images: OwnImages, client: int, device: torch.device) -> None:
        if not 0 <= client < asked.run.clients:
            raise InvalidValueError(f"client-id={client}: expected 0 to {asked.run.clients - 1}")
        train, test = (
            with_classes(one, asked.run.class_names, asked.run.names_classes).to(device)
            for one in (images.train, images.test)
        )
        self.client, self.id, self.images, self.test = images.shares, client, train, test
        self.backbone, self.method = backbone, asked.strategy.name or type(asked.strategy).__name__
        self.strategy, self.engine, self.layout = half(asked, backbone, device)
        self.secret, self.only_sums = asked.sizes_are_secret, asked.run.secure_aggregation
        none = torch.empty(0, dtype=torch.long)
        nobody = Client(none, none, none, None, False)
        self.population = Population((*[nobody] * client, images.shares), "own images", ())

    def present(self) -> Present:
        """Who it is."""
        weights = checksum("", self.backbone.model.state_dict())
        images = None if self.secret else len(self.client.train)
        return Present(client=self.id, seen=self.client.seen, images=images, backbone=weights)

    def answer(self, order: Order, private: Private, measure: bool = False) -> Done | Counts | Lacks:
        """Do what an order says.

        Args:
            order: from the server.
            private: the client's state, which is written.
            measure: predict, and do not train.

        Raises:
            MessageError: the order is not as it should be, or asks for an update that may be sent in a sum alone.
            Diverged: the update is not finite.
        """
        download = self._download(order, private)
        if isinstance(download, Lacks):
            return download
        if measure:
            return self._counts(order.errand, private, download)
        upload = self._trained(order.errand, private, download)
        if self.only_sums and (upload.tiers or upload.head is not None or upload.choice is not None):
            raise MessageError("this run has secure aggregation: an update goes into a sum alone")
        return done(replace(upload, images=torch.ones_like(upload.images)) if self.secret else upload, order.errand)

    def train(self, order: Order, private: Private) -> tuple[Upload, Download]:
        """The client's update and what it was made from, for a sum; as `answer` otherwise."""
        download = self._download(order, private)
        if isinstance(download, Lacks):
            raise MessageError("lacks parts that it was sent")
        return self._trained(order.errand, private, download), download

    def _download(self, order: Order, private: Private) -> Download | Lacks:
        parts, lacking = received(order, self.layout, private.held)
        private.held |= parts
        return Lacks(errand=order.errand, parts=lacking) if lacking else downloaded(order, parts)

    def _trained(self, errand: Errand, private: Private, download: Download) -> Upload:
        private.begin(errand)
        mine = private.store.of(torch.tensor([self.id]))
        return self.strategy.local(mine, download, self._trainer(errand))

    def _trainer(self, errand: Errand) -> Trainer:
        ids = torch.tensor([self.id])
        return Trainer(self.engine, self.images, self.population, ids, errand.purpose, errand.number)

    def _counts(self, errand: Errand, private: Private, download: Download) -> Counts:
        state, trainer = private.store.of(torch.tensor([self.id])), self._trainer(errand)
        if errand.purpose == "unseen":
            private.begin(errand)
            models = self.strategy.personalise(state, download, trainer)
        else:
            models = self.strategy.models(state, download, trainer)

        def count(images: ImageSet, share: Tensor) -> tuple[int, int]:
            correct = self.engine.evaluate(images, [share], models, self.images).correct
            total = min(100, len(share) * 100) if self.secret else len(share)
            return round(float(correct.nan_to_num(0.0)) * total), total

        val, test = count(self.images, self.client.val), count(self.test, self.client.test)
        return Counts(errand=errand, client=self.id, val=val, test=test)


def half(asked: Asked, backbone: Backbone, device: torch.device) -> tuple[Strategy, BatchedEngine, Layout]:
    """Half of a strategy with its problem, where it computes, and what travels looks like."""
    strategy, training = copy.deepcopy(asked.strategy), asked.training
    engine = BatchedEngine(backbone, strategy.adapters(training), training, device, DTYPES[asked.run.dtype])
    classes = len(asked.run.class_names)
    head = Head(torch.zeros(1, classes, backbone.features), torch.zeros(1, classes))
    strategy.join(Problem(training, asked.run.clients, engine.fresh, head, blocks=engine.blocks.of))
    tiers = {tier: engine.fresh(tier, 1, torch.Generator()) for tier in engine.config.tiers}
    return strategy, engine, Layout(tiers, head)
