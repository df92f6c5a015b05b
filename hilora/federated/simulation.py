"""The loop of a federated training: rounds, sampling, evaluation, metrics, and what a run leaves behind."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..saving import save_adapters, write_tensors
from .backbone import Backbone
from .checkpoint import load_checkpoint, save_checkpoint, uninterrupted
from .cohort import Cohort
from .data import ImageSet
from .metrics import MetricsLog, summarise, write_json
from .partition import Population
from .report import Progress, write_report
from .settings import RunConfig
from .state import Models, Trained, stream
from .strategies import STRATEGIES, Stage, Strategy

PICTURES = ("accuracy.png", "clusters.png", "classes.png")
RESULTS = ("summary.json", "metrics.jsonl", "checkpoint.pt", "adapters.safetensors", "heads.safetensors", *PICTURES)
PROGRESS = ("round", "stage", "round_in_stage", "seconds", "images", "tiers", "unseen", "finished")


class Simulation:
    """One strategy on one population.

    Args:
        strategy: a name in `STRATEGIES`.
        run: how to train.
        backbone: the frozen ViT.
        train: images of all clients' training and validation; `test` those of their tests.
        population: who has which of them.
        out: folder for the results.
        device: where to compute.
        dtype: of the backbone.
        resume: go on from the checkpoint in `out`.
        arguments: how the run was asked for, to stand in the summary.

    Raises:
        ValueError: for an unknown strategy, a population that has nothing to train on, or a checkpoint of another run.
        FileNotFoundError: if there is no checkpoint to resume from.
    """

    def __init__(
        self,
        strategy: str,
        run: RunConfig,
        backbone: Backbone,
        train: ImageSet,
        test: ImageSet,
        population: Population,
        out: Path,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        resume: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"unknown strategy {strategy!r}: there are {', '.join(STRATEGIES)}")
        if not any(len(client.train) for client in population.clients if client.seen):
            raise ValueError("no seen client has an image to train on")
        self.name, self.run_config, self.backbone, self.out = strategy, run, backbone, out
        self.train_images = replace(train, images=train.images.to(device))
        self.test_images = replace(test, images=test.images.to(device))
        self.population, self.arguments = population, dict(arguments or {})
        kind = STRATEGIES[strategy]
        self.weights = sum(value.detach().double().abs().sum().item() for value in backbone.model.parameters())
        self.cohort = Cohort(backbone, kind.tiers, run, device, dtype)
        head = {
            "weight": torch.zeros(1, len(train.classes), backbone.features),
            "bias": torch.zeros(1, len(train.classes)),
        }
        self.strategy = kind(run, self.cohort.fresh, head, len(population.clients))
        self.round, self.stage, self.round_in_stage = 0, 0, 0
        self.seconds, self.images = 0.0, 0
        self.tiers: dict[str, dict[str, float | None]] = {}
        self.unseen: dict[str, float | None] = {"zero_leaf": None, "leaf": None}
        self.finished = False
        out.mkdir(parents=True, exist_ok=True)
        if resume:
            self._resume()
        else:
            self._save_checkpoint()
        self.log = MetricsLog(out / "metrics.jsonl", keep=self.round)

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the summary. What was reached is on disk also when this is interrupted.

        Raises:
            KeyboardInterrupt: after the results so far have been written.
        """
        stages = self.strategy.stages()
        try:
            with Progress(sum(stage.rounds for stage in stages), self.name) as progress:
                self.cohort.note = lambda text: progress.note(f"{self.name}: {text}")
                while self.stage < len(stages):
                    self._stage(stages[self.stage], progress)
                if not self.finished:
                    self._arrive(progress)
                    self.finished = True
                    self._save_checkpoint()
        except BaseException:
            self._resume()  # back to the last round that was finished
            raise
        finally:
            self.log.close()
            with uninterrupted():
                summary = self._leave_results()
        return summary

    def _stage(self, stage: Stage, progress: Progress) -> None:
        """The rounds of a stage, or what is left of them."""
        (tier, rounds, rates), seen, number = stage, self.population.seen, self.stage
        if self.round_in_stage == 0:
            started = time.perf_counter()
            self.strategy.begin(tier, seen, self._fit)
            self.seconds += time.perf_counter() - started
            found = self.strategy.clustering()
            if tier == "cluster" and found is not None:
                progress.note(f"{self.name}: {len(seen)} clients in {found.k} cluster{'s' if found.k > 1 else ''}")
        if rounds == 0:
            self.stage += 1
            self._save_checkpoint()
        while self.stage == number:
            started = time.perf_counter()
            clients, epochs = self._sample(seen, tier), self.run_config.local_epochs
            trained = self._fit(clients, self.strategy.models(clients), tier, epochs, rates, "training", self.round + 1)
            noted = self.strategy.aggregate(tier, clients, trained)
            accuracy = self._accuracy(seen, self.strategy.models(seen))
            images, seconds = int(trained.images.sum()), time.perf_counter() - started
            record = {
                "round": self.round + 1,
                "stage": tier,
                "round_in_stage": self.round_in_stage + 1,
                "loss": _mean(trained.loss),
                **accuracy,
                "clients": len(clients),
                "images": images,
                "seconds": seconds,
                **{key: value for key, value in noted.items() if key != "stop"},
            }
            with uninterrupted():
                self.round, self.round_in_stage = self.round + 1, self.round_in_stage + 1
                if self.round_in_stage == rounds or noted.get("stop"):
                    self.stage, self.round_in_stage = number + 1, 0
                self.images, self.seconds = self.images + images, self.seconds + seconds
                self.tiers[tier] = accuracy["test"]
                self.log.append(record)
                self._save_checkpoint()
            progress.round(record)
            if noted.get("stop"):
                progress.note(f"{self.name}: {tier} stops early, ρ = {noted['rho']:.2g}")

    def _sample(self, seen: Tensor, tier: str) -> Tensor:
        """The clients of the next round: a share of them, or all where each trains its own adapter."""
        count = max(1, round(self.run_config.participation * len(seen)))
        if tier == "leaf" or count == len(seen):
            return seen
        order = torch.randperm(len(seen), generator=stream(self.run_config.seed, "sampling", self.round + 1))
        return seen[order[:count].sort().values]

    def _fit(
        self,
        clients: Tensor,
        models: Models,
        tier: str,
        epochs: int,
        rates: str | None = None,
        purpose: str = "probe",
        round: int = 0,
    ) -> Trained:
        """Local training; by default the probe that a strategy may ask for.

        Raises:
            ValueError: if an update is not finite; names the clients.
        """
        shares = [self.population.clients[int(client)].train for client in clients]
        trained = self.cohort.train(self.train_images, shares, models, tier, epochs, clients, purpose, round, rates)
        tensors = (*trained.adapters.values(), *trained.head.values())
        finite = torch.stack([value.isfinite().flatten(1).all(1) for value in tensors]).all(0)
        if not finite.all():
            raise ValueError(f"updates of clients {clients[~finite].tolist()} are not finite: lower the learning rate")
        return trained

    def _accuracy(self, clients: Tensor, models: Models) -> dict[str, dict[str, float | None]]:
        """Personalised accuracy on the clients' validation and test images."""
        members = [self.population.clients[int(client)] for client in clients]
        val = self.cohort.correct(self.train_images, [client.val for client in members], models)
        test = self.cohort.correct(self.test_images, [client.test for client in members], models)
        return {"val": summarise(val), "test": summarise(test)}

    def _arrive(self, progress: Progress) -> None:
        """Unseen clients join, predict with what is there, and then train an adapter of their own."""
        unseen, started = self.population.unseen, time.perf_counter()
        if not len(unseen):
            return
        self.strategy.admit(unseen, self._fit)
        models, tier = self.strategy.models(unseen), self.strategy.own_tier
        if self.strategy.predicts_unseen:
            self.unseen["zero_leaf"] = self._accuracy(unseen, models)["test"]["mean"]
        if self.run_config.unseen_epochs:
            trained = self._fit(unseen, models, tier, self.run_config.unseen_epochs, self.strategy.own_rates, "unseen")
            self.unseen["leaf"] = self._accuracy(unseen, models.replaced(tier, trained))["test"]["mean"]
        self.seconds += time.perf_counter() - started
        figures = ", ".join(f"{name} {value:.1%}" for name, value in self.unseen.items() if value is not None)
        progress.note(f"{self.name}: {len(unseen)} unseen clients, {figures}")

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says; accuracies are fractions of 1."""
        last = list(self.tiers.values())[-1] if self.tiers else summarise(torch.empty(0))
        return {
            "strategy": self.name,
            "partition": self.population.scheme,
            "seed": self.run_config.seed,
            "data": self.train_images.name,
            "backbone": self.backbone.name,
            "dtype": str(self.cohort.dtype).removeprefix("torch."),
            "tiers": self.tiers,
            "final": last,
            "unseen": self.unseen,
            "clusters": clusters(self.strategy, self.population),
            "seconds": self.seconds,
            "images_per_second": self.images / self.seconds if self.seconds else None,
            "interrupted": not self.finished,
            "rounds": self.round,
            "config": self.run_config.to_dict(),
            "arguments": self.arguments,
        }

    def _leave_results(self) -> dict[str, Any]:
        """Everything a run leaves in its folder; returns the summary."""
        summary, images = self.summary(), self.train_images
        write_json(self.out / "summary.json", summary)
        adapters, heads = self.strategy.tables()
        self.cohort.keep(adapters)
        save_adapters(self.cohort.model, self.out / "adapters.safetensors")
        named = {f"{tier}.{name}": value for tier, head in heads.items() for name, value in head.items()}
        write_tensors(self.out / "heads.safetensors", named, {"classes": images.classes})
        counts = self.population.class_counts(images.labels, len(images.classes))
        seen = torch.tensor([client.seen for client in self.population.clients])
        groups, names = self.population.true_groups, self.population.groups
        write_report(self.out, summary, self.log.records, counts, seen, groups, names, self.strategy.clustering())
        return summary

    def _save_checkpoint(self) -> None:
        save_checkpoint(
            self.out / "checkpoint.pt",
            {
                "config": self._identity(),
                "strategy": self.strategy.state_dict(),
                **{name: getattr(self, name) for name in PROGRESS},
            },
        )

    def _resume(self) -> None:
        state = load_checkpoint(self.out / "checkpoint.pt")
        own = self._identity()
        differing = [name for name in own if state["config"].get(name) != own[name]]
        if differing:
            raise ValueError(
                f"the checkpoint in {self.out} is of another run: it differs in {', '.join(differing)}. "
                "Resume with the same settings, or choose another folder"
            )
        self.strategy.load_state_dict(state["strategy"])
        for name in PROGRESS:
            setattr(self, name, state[name])

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be of this run."""
        clients = self.population.clients
        settings = self.run_config.to_dict()
        settings.pop("cohort_size")
        return {
            **settings,
            "strategy": self.name,
            "data": self.train_images.name,
            "backbone": (self.backbone.name, self.backbone.size, self.weights, str(self.cohort.dtype)),
            "partition": self.population.scheme,
            "clients": [(len(client.train), int(client.train.sum())) for client in clients],
        }


def clusters(strategy: Strategy, population: Population) -> dict[str, Any] | None:
    """The groups that a strategy formed: K, the cluster of each seen client, their agreement with the true groups where
    these are known, and the cluster that each unseen client joined."""
    found, truth = strategy.clustering(), population.true_groups
    if found is None:
        return None
    ari = None
    if truth is not None:
        from sklearn.metrics import adjusted_rand_score

        ari = float(adjusted_rand_score(truth[population.seen], found.labels))
    joined = strategy.joined(population.unseen).tolist()
    return {"k": found.k, "labels": found.labels.tolist(), "ari": ari, "unseen": joined}


def set_aside(out: Path) -> None:
    """Move the results of an earlier run in a folder into `earlier-1`, `earlier-2`, … inside of it."""
    found = [out / name for name in RESULTS if (out / name).exists()]
    if found:
        number = next(n for n in itertools.count(1) if not (out / f"earlier-{n}").exists())
        (out / f"earlier-{number}").mkdir()
        for path in found:
            path.rename(out / f"earlier-{number}" / path.name)


def _mean(loss: Tensor) -> float | None:
    known = loss[~loss.isnan()]
    return float(known.mean()) if len(known) else None
