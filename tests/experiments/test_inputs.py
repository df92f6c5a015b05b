"""Which reader serves which setting, and what a run says of where it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from hilora.experiments.experiment import Model, Setting
from hilora.experiments.inputs import Inputs, check_files
from tests.experiments.conftest import Write

CPU = torch.device("cpu")


def setting(data: str, scheme: str, classes: int | None = None) -> Setting:
    return Setting("ours", data, classes, scheme, {}, (0,), {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two folders of two folders of six images: domains of classes, or classes of folders that are no images."""
    for domain in ("photo", "sketch"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / domain / name).mkdir(parents=True)
            for number in range(6):
                Image.new("RGB", (8, 8)).save(tmp_path / "pets" / domain / name / f"{number}.png")
    return tmp_path


def test_the_scheme_decides_whether_folders_are_domains(folder: Path) -> None:
    inputs = Inputs(Model("glyph_vit"), folder, CPU)
    train, test = inputs.images(setting("pets", "domains"))
    assert train.domain_names == test.domain_names == ("photo", "sketch")
    assert train.classes == ("cat", "dog")
    classes, _ = inputs.images(setting("pets/photo", "gl-dir"))
    assert classes.classes == ("cat", "dog")
    assert classes.images.shape[2:] == (32, 32)  # what the backbone takes


def test_the_largest_classes_alone_are_read(folder: Path) -> None:
    for domain in ("photo", "sketch"):
        (folder / "pets" / domain / "cow").mkdir()
        for number in range(12):
            Image.new("RGB", (8, 8)).save(folder / "pets" / domain / "cow" / f"{number}.png")
    inputs = Inputs(Model("glyph_vit"), folder, CPU)
    train, test = inputs.images(setting("pets", "domains", classes=2))
    assert len(train.classes) == 2
    assert "cow" in train.classes
    assert test.classes == train.classes
    assert len(inputs.images(setting("pets", "domains"))[0].classes) == 3


def test_images_are_read_once_and_are_the_same_for_all_seeds(folder: Path) -> None:
    inputs = Inputs(Model("glyph_vit"), folder, CPU)
    first = inputs.images(setting("pets/photo", "gl-dir"))
    assert inputs.images(setting("pets/photo", "gl-dir")) is first
    again = Inputs(Model("glyph_vit"), folder, CPU).images(setting("pets/photo", "gl-dir"))
    assert torch.equal(again[0].labels, first[0].labels)
    assert inputs.backbone is inputs.backbone


def test_settings_that_take_turns_do_not_read_their_data_again(folder: Path) -> None:
    inputs = Inputs(Model("glyph_vit"), folder, CPU)
    first = inputs.images(setting("pets/photo", "sc-dir"))
    inputs.images(setting("pets", "domains"))
    assert inputs.images(setting("pets/photo", "patho")) is first


def test_data_that_cannot_be_read_are_named(folder: Path) -> None:
    inputs = Inputs(Model("glyph_vit"), folder, CPU)
    with pytest.raises(ValueError, match=r"the data nowhere cannot be read: .*nowhere"):
        inputs.images(setting("nowhere", "domains"))


def test_the_dtype_is_the_one_asked_for() -> None:
    assert Inputs(Model("glyph_vit", dtype="bfloat16"), Path(), CPU).dtype is torch.bfloat16
    assert Inputs(Model("glyph_vit", dtype="auto"), Path(), CPU).dtype in (torch.bfloat16, torch.float32)


def test_missing_data_and_weights_are_named(write: Write, folder: Path) -> None:
    experiment = write(
        ('backbone = "glyph_vit"', 'backbone = "vit"\nweights = "vit.pt"'), ('data = "glyphs"', 'data = "pets"')
    )
    with pytest.raises(FileNotFoundError, match=r"does not hold vit\.pt: give"):
        check_files(experiment.model, experiment.settings.values(), folder)
    (folder / "vit.pt").touch()
    elsewhere = write(('data = "glyphs"\npartition = "gl-dir"', 'data = "far"\npartition = "gl-dir"'))
    groups, mixed = elsewhere.settings.values()
    check_files(elsewhere.model, [groups], folder)
    with pytest.raises(FileNotFoundError, match="does not hold far"):
        check_files(elsewhere.model, [groups, mixed], folder)
    check_files(experiment.model, experiment.settings.values(), folder)
