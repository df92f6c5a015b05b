"""The generated images."""

from __future__ import annotations

import socket

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hilora.federated.data import glyphs
from hilora.federated.data.images import ImageSet, prepare
from hilora.models import glyph_vit


@pytest.fixture(scope="module")
def drawn() -> tuple[ImageSet, ImageSet]:
    return glyphs.load_glyphs(seed=3, train_per_class=20, test_per_class=10)


def test_shapes_and_groups(drawn):
    for data, per_class in zip(drawn, (20, 10), strict=True):
        assert data.images.shape == (50 * per_class, 3, 32, 32)
        assert data.labels.bincount().tolist() == [per_class] * 50
        assert data.groups is not None
        assert data.groups.bincount().tolist() == [10] * 5
        assert data.group_names == ("armenian", "georgian", "hebrew", "arabic", "lao")
        assert (data.name, data.mirrors) == ("glyphs", False)
        assert len(set(data.classes)) == 50


def test_same_seed_same_images(drawn):
    again = glyphs.load_glyphs(seed=3, train_per_class=20, test_per_class=10)
    assert all(torch.equal(a.images[:], b.images[:]) for a, b in zip(drawn, again, strict=True))


def test_another_seed_or_split_other_images(drawn):
    train, test = drawn
    other, _ = glyphs.load_glyphs(seed=4, train_per_class=20, test_per_class=1)
    assert not (train.images == other.images).flatten(1).all(1).any()
    known = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in known for image in test.images)


@pytest.mark.parametrize("per_class", [(0, 5), (5, -1)])
def test_no_images_is_an_error(per_class):
    with pytest.raises(ValueError, match="must be positive"):
        glyphs.load_glyphs(0, *per_class)


def test_missing_fonts_are_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(RuntimeError, match="no DejaVu font"):
        glyphs._masks("no face has these")


def look(scripts: tuple[glyphs.Script, ...]) -> Tensor:
    """Each character's mean mask over its faces, blurred to 16 x 16, of unit length: `[characters, 256]`."""
    means = []
    for script in scripts:
        masks, faces = glyphs._masks(script.characters)
        means += [of_one.mean(0) for of_one in masks.split(faces.tolist())]
    return F.normalize(F.avg_pool2d(torch.stack(means)[:, None], 2).flatten(1))


def test_characters_are_distinct():
    """Neither by code point nor by sight is a character in twice, least of all with the clients and in pretraining."""
    clients, pretraining = glyphs.CLIENT_SCRIPTS, glyphs.PRETRAINING_SCRIPTS
    characters = "".join(script.characters for script in clients + pretraining)
    assert len(set(characters)) == len(characters) == 50 + 282
    theirs, others = look(clients), look(pretraining)
    assert (theirs @ others.T).max() < 0.9
    assert (theirs @ theirs.T).triu(1).max() < 0.9
    assert (others @ others.T).triu(1).max() < 0.95


def test_frozen_features_serve_characters_never_seen(drawn):
    """A ridge classifier on 20 images a class: far above chance (2 %), and above the same ViT with random weights."""

    def probe(model: torch.nn.Module) -> float:
        half = torch.full((3,), 0.5)
        with torch.inference_mode():
            x, y = (model.eval()(prepare(data.images, 32, half, half, torch.float32)) for data in drawn)
        mean, std = x.mean(0), x.std(0)
        x, y = (x - mean) / std, (y - mean) / std
        targets = F.one_hot(drawn[0].labels).float() - 0.02
        weights = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ targets)
        return float(((y @ weights).argmax(1) == drawn[1].labels).float().mean())

    torch.manual_seed(0)
    pretrained, random = probe(glyph_vit.glyph_vit(0)), probe(glyph_vit.new_glyph_vit(0))
    assert pretrained > 0.4
    assert pretrained > 2 * random


def test_needs_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something tried to connect")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    glyphs.load_glyphs(0, 1, 1)
    glyphs.pretraining_glyphs(0, 1, 1)
    glyph_vit.glyph_vit(3)
