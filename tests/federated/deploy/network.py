"""Three clients with images of their own on a network, runs of hilora's app there, and the same in a simulation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hilora.federated.archive import unpacked
from hilora.federated.callbacks.checkpoint import CHECKPOINT
from hilora.federated.data.glyphs import load_glyphs
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions import Client, Population
from hilora.federated.data.readers import read_images
from hilora.federated.deploy.member import OwnImages, all_of, with_classes
from hilora.federated.deploy.settings import asked
from hilora.federated.simulation import Simulation
from hilora.models.backbone import load_backbone
from tests.federated.deploy.loopback import ROOT, Loopback, until
from tests.federated.deploy.recorder import Recorder
from tests.federated.deploy.rounding import STEADY_APP

CLIENTS = 3
CLASSES = ("a", "b", "c", "d", "e")
HAS = ("abc", "ab", "cde")
"""The classes that each client has images of."""
CONFIG: dict[str, Any] = {
    "clients": CLIENTS,
    "classes": ",".join(CLASSES),
    "backbone": "glyph_vit",
    "rounds": "1,1,1",
    "batch-size": 4,
    "evaluate-every": 0,
    "deadline": 60.0,
    "resume": False,
}
FAULTY = '''
"""A client that waits in a round, or sends what is not a number, where a file says so."""

import time
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from hilora.federated.deploy.flower import client_app, data_of, record
from hilora.federated.deploy.messages import Done, Order, of_bytes, to_bytes

app = ClientApp()
inner = client_app()
faults = Path({faults!r})


@app.query()
def query(message: Message, context: Context) -> Message:
    return inner(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return inner(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    client = context.node_config["client-id"]
    number = of_bytes(data_of(message.content), Order).errand.number
    while (faults / f"wait {{client}} in {{number}}").exists():
        (faults / "waits").touch()
        time.sleep(0.05)
    reply = inner(message, context)
    if (faults / f"poison{{client}}").exists():
        done = of_bytes(data_of(reply.content), Done)
        next(iter(done.tiers["root"].values())).view(-1)[0] = torch.nan
        reply.content = record(to_bytes(done))
    return reply
'''


def draw(folder: Path) -> None:
    """A folder of small pictures for each client."""
    train, test = load_glyphs(train_per_class=8, test_per_class=4)
    for client, names in enumerate(HAS):
        for split, images in (("train", train), ("test", test)):
            for name in names:
                label = 7 * CLASSES.index(name)
                found = images.images[images.labels == label]
                found = found.roll(client, 0)[: len(found) * 3 // 4]  # not the same pictures at all clients
                place = folder / f"client{client}" / split / name
                place.mkdir(parents=True)
                for number, image in enumerate(found):
                    Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number}.png")


class Network:
    """Three SuperNodes that talk to a SuperLink through a recorder.

    Args:
        link: the SuperLink.
        recorder: in between.
        folder: for images, private states and results.
    """

    def __init__(self, link: Loopback, recorder: Recorder, folder: Path) -> None:
        self.link, self.recorder, self.folder = link, recorder, folder
        self.faults = folder / "faults"
        self.faults.mkdir()
        draw(folder)
        for client in range(CLIENTS):
            self.start(client)

    def start(self, client: int) -> None:
        """Start a client's SuperNode."""
        config = {
            "client-id": client,
            "data": str(self.folder / f"client{client}"),
            "state-dir": str(self.state(client)),
        }
        self.link.start_node(client, config, self.recorder.address)

    def state(self, client: int) -> Path:
        return self.folder / f"state{client}"

    @contextmanager
    def waiting(self, client: int, number: int) -> Iterator[Callable[[], None]]:
        """A client waits in a round, as long as this lasts; what is given waits until it does."""
        fault, waits = self.faults / f"wait {client} in {number}", self.faults / "waits"
        fault.touch()
        yield lambda: until(waits.exists, f"client {client} is in round {number}")
        fault.unlink()
        waits.unlink(missing_ok=True)

    def app(self, name: str, faulty: bool = False, **config: Any) -> Path:
        """The app of examples/flower with other settings."""
        app = self.folder / f"app-{name}"
        app.mkdir(exist_ok=True)
        template = ROOT / "examples" / "flower"
        for file in template.glob("*.py"):
            (app / file.name).write_text(file.read_text())
        client = app / "client_app.py"
        client.write_text((FAULTY.format(faults=str(self.faults)) if faulty else client.read_text()) + STEADY_APP)
        head, section, _ = (template / "pyproject.toml").read_text().partition("[tool.flwr.app.config]\n")
        settings = self.config(name, **config)
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        (app / "pyproject.toml").write_text(head + section + lines)
        return app

    def begin(self, name: str, faulty: bool = False, **config: Any) -> int:
        """Start a run, and return its number."""
        return self.link.submit(self.app(name, faulty, **config), {})

    def end(self, run: int) -> str:
        """Wait for a run to complete, and return its log."""
        said = self.link.finish(run)
        assert self.link.status(run) == "finished:completed", said
        return said

    def run(self, name: str, **config: Any) -> None:
        """A run from its start to its end, once."""
        if not (self.folder / name / "summary.json").exists():
            self.end(self.begin(name, **config))

    def config(self, name: str, **config: Any) -> dict[str, Any]:
        given = {key.replace("_", "-"): value for key, value in config.items()}
        return {**CONFIG, "out": str(self.folder / name), **given}

    def checkpoint(self, name: str) -> dict[str, Any]:
        """Where the server of a run ended."""
        return unpacked((self.folder / name / CHECKPOINT).read_bytes())

    def summary(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / name / "summary.json").read_text())
        return found

    def records(self, name: str) -> list[dict[str, Any]]:
        """What the server wrote of each round so far."""
        path = self.folder / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def private(self, name: str, client: int) -> dict[str, Any]:
        """What is in the file that a client keeps of a run."""
        run = self.checkpoint(name)["id"]
        (file,) = self.state(client).glob(f"client-{client}.run-{run}.safetensors")
        return unpacked(file.read_bytes())

    def images(self, client: int) -> OwnImages:
        """A client's images as it has them."""
        train, test = read_images(self.folder / f"client{client}", 32, 0)
        found = all_of(train, test, client, 0)
        return found._replace(train=with_classes(train, CLASSES, True), test=with_classes(test, CLASSES, True))

    def simulation(self, name: str, **config: Any) -> Simulation:
        """The same clients in one process, one by one: several at once are added up in another order."""
        what = asked({**self.config(name, **config), "clients-at-once": 1})
        owned = [self.images(client) for client in range(CLIENTS)]
        clients, starts = [], [0, 0]
        for one in owned:
            shares = one.shares.train + starts[0], one.shares.val + starts[0], one.shares.test + starts[1]
            clients.append(Client(*shares, None, True))
            starts = [starts[0] + len(one.train), starts[1] + len(one.test)]
        train, test = _joined([one.train for one in owned]), _joined([one.test for one in owned])
        population = Population(tuple(clients), "their own", ())
        out, device = self.folder / f"{name}-simulated", torch.device("cpu")
        backbone = load_backbone("glyph_vit")
        return Simulation(what.strategy, what.training, backbone, train, test, population, out, device, torch.float32)


def _joined(parts: list[ImageSet]) -> ImageSet:
    first = parts[0]
    images, labels = torch.cat([pixels(part) for part in parts]), torch.cat([part.labels for part in parts])
    return ImageSet(images, labels, first.classes, "theirs", mirrors=first.mirrors)


def pixels(images: ImageSet) -> torch.Tensor:
    """The pixels of images that are in memory."""
    assert isinstance(images.images, torch.Tensor)
    return images.images
