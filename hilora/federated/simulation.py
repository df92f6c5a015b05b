"""The loop of a federated training: rounds, sampling, evaluation, metrics, and what a run leaves behind."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hilora.adapters.io.native import save_adapters, write_tensors
from hilora.federated.callbacks.checkpoint import load_checkpoint, save_checkpoint, uninterrupted
from hilora.federated.callbacks.diagnostics import diagnose
from hilora.federated.callbacks.results import clusters
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partition import Population
from hilora.federated.engine.batched import Cohort
from hilora.federated.engine.predictor import Scores
from hilora.federated.engine.state import Models, stream
from hilora.federated.engine.work import Work
from hilora.federated.settings import RunConfig
from hilora.federated.strategies import STRATEGIES, Stage
from hilora.models.backbone import Backbone
from hilora.reporting.metrics import MetricsLog
from hilora.reporting.progress import Progress, log
from hilora.reporting.statistics import summarise
from hilora.reporting.summary import SCHEMA, write_summary

NOT_MEASURED = summarise(torch.empty(0))
PROGRESS = (
    *("round", "stage", "round_in_stage", "seconds", "images", "traffic", "trained_parameters"),
    *("tiers", "val", "unseen", "per_client", "diagnostics", "finished"),
)
BYTES = 4  # of a number that is sent: adapters and heads are fp32


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
        kind = STRATEGIES[strategy]
        run = kind.adapted(run)
        self.name, self.run_config, self.backbone, self.out = strategy, run, backbone, out
        self.train_images = replace(train, images=train.images.to(device))
        self.test_images = replace(test, images=test.images.to(device))
        self.population, self.arguments = population, dict(arguments or {})
        self.weights = sum(value.detach().double().abs().sum().item() for value in backbone.model.parameters())
        self.cohort = Cohort(backbone, kind.tiers, run, device, dtype)
        head = {
            "weight": torch.zeros(1, len(train.classes), backbone.features),
            "bias": torch.zeros(1, len(train.classes)),
        }
        self.strategy = kind(run, self.cohort.fresh, head, len(population.clients))
        self.round, self.stage, self.round_in_stage = 0, 0, 0
        self.seconds, self.images, self.trained_parameters = 0.0, 0, 0
        self.traffic = {"up": 0, "down": 0}  # numbers that a client sent and received
        self.tiers: dict[str, dict[str, float | None]] = {}
        self.val = summarise(torch.empty(0))
        self.unseen: dict[str, float | None] = {"zero_leaf": None, "leaf": None}
        self.per_client: dict[str, list[Any]] = {}
        self.diagnostics: dict[str, dict[str, Any]] = {}
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
                self.cohort.note = lambda text: log.info("%s: %s", self.name, text)
                while self.stage < len(stages):
                    self._stage(stages[self.stage], progress)
                if not self.finished:
                    self._arrive(progress)
                    self.finished = True
                    self._save_checkpoint()
        except BaseException as ended:
            try:
                with uninterrupted():
                    self._resume()  # back to the last round that was finished
                    self._leave_results()
            except Exception as error:  # what ended the run is what is raised
                ended.add_note(f"what was reached could not be written: {error}")
            raise
        with uninterrupted():
            return self._leave_results()

    def _stage(self, stage: Stage, progress: Progress) -> None:
        """The rounds of a stage, or what is left of them."""
        (tier, rounds, _), seen, number = stage, self.population.seen, self.stage
        if self.round_in_stage == 0:
            started = time.perf_counter()
            work = self._work("probe")
            self.strategy.begin(tier, seen, work)
            self.seconds += time.perf_counter() - started
            found = self.strategy.clustering()
            if tier == "cluster" and found is not None:
                log.info(f"{self.name}: {len(seen)} clients in {found.k} cluster{'s' if found.k > 1 else ''}")
        if rounds == 0:
            self.stage += 1
            self._save_checkpoint()
        while self.stage == number:
            started = time.perf_counter()
            clients, work = self._sample(seen, tier), self._work("training", self.round + 1)
            noted = self.strategy.round(stage, clients, work)
            last = bool(self.round_in_stage + 1 == rounds or noted.get("stop"))
            every = self.run_config.evaluate_every
            scores = (
                self._scores(seen, self.strategy.models(seen))
                if last or (every and (self.round + 1) % every == 0)
                else {}
            )
            terms = self._diagnose(tier, seen) if last else {}
            traffic, seconds = self.strategy.traffic(tier), time.perf_counter() - started
            accuracy = {
                split: summarise(scores[split].correct) if scores else NOT_MEASURED for split in ("val", "test")
            }
            record = {
                "round": self.round + 1,
                "stage": tier,
                "round_in_stage": self.round_in_stage + 1,
                "loss": _mean(work.losses),
                **accuracy,
                "clients": len(clients),
                "images": work.images,
                "seconds": seconds,
                **{key: value for key, value in noted.items() if key != "stop"},
            }
            with uninterrupted():
                self.round, self.round_in_stage = self.round + 1, self.round_in_stage + 1
                self.images, self.seconds = self.images + work.images, self.seconds + seconds
                self.traffic = {way: self.traffic[way] + getattr(traffic, way) for way in self.traffic}
                self.trained_parameters = max(self.trained_parameters, work.parameters)
                if last:
                    self.stage, self.round_in_stage = number + 1, 0
                    self.diagnostics[tier] = terms
                if scores:
                    self.tiers.pop(tier, None)  # the last one measured stands last
                    self.tiers[tier], self.val = accuracy["test"], accuracy["val"]
                    self.per_client = {"ids": seen.tolist()}
                    self.per_client |= {split: one.correct.tolist() for split, one in scores.items()}
                self.log.append(record)
                self._save_checkpoint()
            progress.round(record)
            if noted.get("stop"):
                log.info(f"{self.name}: {tier} stops early, ρ = {noted['rho']:.2g}")

    def _work(self, purpose: str, round: int = 0) -> Work:
        return Work(self.cohort, self.train_images, self.population, self.run_config, purpose, round)

    def _sample(self, seen: Tensor, tier: str) -> Tensor:
        """The clients of the next round: a share of them, or all where nothing is sent and each trains alone."""
        count = max(1, round(self.run_config.participation * len(seen)))
        if not any(self.strategy.traffic(tier)) or count == len(seen):
            return seen
        order = torch.randperm(len(seen), generator=stream(self.run_config.seed, "sampling", self.round + 1))
        return seen[order[:count].sort().values]

    def _scores(self, clients: Tensor, models: Models) -> dict[str, Scores]:
        """How the clients predict their validation and test images."""
        members = [self.population.clients[int(client)] for client in clients]
        train, test, evaluate = self.train_images, self.test_images, self.cohort.evaluate
        return {
            "val": evaluate(train, [client.val for client in members], models),
            "test": evaluate(test, [client.test for client in members], models, train),
        }

    def _diagnose(self, tier: str, seen: Tensor) -> dict[str, Any]:
        """The theorem's terms at the end of a stage."""
        models, images = self.strategy.models(seen), self.train_images
        loss = self._work("diagnosis").scores(seen, models).loss
        counts = self.population.class_counts(images.labels, len(images.classes))[seen]
        member = self.strategy.joined(seen)
        together = torch.zeros_like(member) if (member < 0).any() else member
        return diagnose(loss, models, counts, together if any(self.strategy.traffic(tier)) else None)

    def _arrive(self, progress: Progress) -> None:
        """Unseen clients join, predict with what is there, and then train an adapter of their own."""
        unseen, started = self.population.unseen, time.perf_counter()
        if not len(unseen):
            return
        self.strategy.admit(unseen, self._work("probe"))
        self.per_client["unseen_ids"] = unseen.tolist()
        if self.strategy.predicts_unseen:
            self._score_unseen("zero_leaf", self.strategy.models(unseen))
        if self.run_config.unseen_epochs:
            self._score_unseen("leaf", self.strategy.personalise(unseen, self._work("unseen")))
        self.seconds += time.perf_counter() - started
        figures = ", ".join(f"{name} {value:.1%}" for name, value in self.unseen.items() if value is not None)
        log.info(f"{self.name}: {len(unseen)} unseen clients, {figures}")

    def _score_unseen(self, name: str, models: Models) -> None:
        correct = self._scores(self.population.unseen, models)["test"].correct
        self.unseen[name] = summarise(correct)["mean"]
        self.per_client[f"unseen_{name}"] = correct.tolist()

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says; accuracies are fractions of 1."""
        last = list(self.tiers.values())[-1] if self.tiers else summarise(torch.empty(0))
        return {
            "schema": SCHEMA,
            "strategy": self.name,
            "partition": self.population.scheme,
            "seed": self.run_config.seed,
            "data": self.train_images.name,
            "backbone": self.backbone.name,
            "dtype": str(self.cohort.dtype).removeprefix("torch."),
            "tiers": self.tiers,
            "final": last,
            "val": self.val,
            "unseen": self.unseen,
            "per_client": self.per_client,
            "diagnostics": self.diagnostics,
            "communication": {way: BYTES * numbers / max(self.round, 1) for way, numbers in self.traffic.items()},
            "trained_parameters": self.trained_parameters,
            "images": self.images,
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
        from hilora.reporting.plots import draw_run  # loads matplotlib

        summary, images = self.summary(), self.train_images
        write_summary(self.out / "summary.json", summary)
        adapters, heads = self.strategy.tables()
        self.cohort.keep(adapters)
        save_adapters(self.cohort.model, self.out / "adapters.safetensors")
        named = {f"{tier}.{name}": value for tier, head in heads.items() for name, value in head.items()}
        write_tensors(self.out / "heads.safetensors", named, {"classes": images.classes})
        counts = self.population.class_counts(images.labels, len(images.classes))
        seen = torch.tensor([client.seen for client in self.population.clients])
        groups, names = self.population.true_groups, self.population.groups
        draw_run(self.out, summary, self.log.records, counts, seen, groups, names, self.strategy.clustering())
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


def _mean(losses: list[Tensor]) -> float | None:
    known = torch.cat([torch.empty(0), *(loss[~loss.isnan()] for loss in losses)])
    return float(known.mean()) if len(known) else None
