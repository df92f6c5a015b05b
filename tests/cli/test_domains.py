"""The example for several domains as a user runs it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from tests.cli.test_train import SCRIPT, load_example, summary

pytestmark = pytest.mark.slow

SMALL = ["--clients-per-domain", "2", "--unseen", "0.34", "--rounds", "1,1,1", "--rank", "2", "--dtype", "float32"]
GLYPH_VIT = ["--backbone", "glyph_vit"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example(SCRIPT.with_name("federated_domains.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains of three classes: the colour is the class, its brightness the domain."""
    root = tmp_path_factory.mktemp("data") / "colours"
    for domain, shade in (("bright", 250), ("dark", 60), ("dim", 140)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / domain / name).mkdir(parents=True)
            for i in range(8 + channel):
                colour = [i, i, i]
                colour[channel] = shade
                Image.new("RGB", (32, 32), (colour[0], colour[1], colour[2])).save(root / domain / name / f"{i}.png")
    return root


def test_a_run_compares_its_clusters_with_the_domains(
    example: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, *GLYPH_VIT, "--data-dir", str(folder), "--strategy", "hilora", "fedit", "--classes", "2"]
    assert example.main([*arguments, "--out", str(tmp_path)]) == 0
    found = summary(tmp_path / "hilora")
    assert found["data"] == "colours (3 domains, 2 largest classes)"
    assert found["partition"] == "domains"
    assert found["config"]["local_epochs"] == 2
    assert found["arguments"]["clients_per_domain"] == 2
    assert len(found["clusters"]["labels"]) == 4, "of six clients two are unseen"
    assert isinstance(found["clusters"]["ari"], float)
    assert summary(tmp_path / "fedit")["clusters"] is None
    printed = capsys.readouterr().out
    assert "4 clients and 2 unseen ones, domains, on colours" in printed
    assert "2 classes" in printed
    for line in ("hilora", "fedit", "files: "):
        assert any(found.startswith(line) for found in printed.splitlines())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data-dir", "/nowhere"], "there is no folder /nowhere"),
        (["--classes", "4"], "classes is 4, expected 1 to 3"),
        (["--alpha", "0"], "alpha"),
        (["--clients-per-domain", "0"], "clients"),
        (["--images-per-client", "1000"], "images"),
        (["--resume"], "--resume"),
    ],
)
def test_mistakes_end_in_one_clear_line(
    example: ModuleType,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    given = [*SMALL, *GLYPH_VIT, "--data-dir", str(folder), "--out", str(tmp_path / "out"), *arguments]
    assert example.main(given) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert said in error
    assert not (tmp_path / "out" / "summary.json").exists()


def test_the_data_must_be_given(example: ModuleType) -> None:
    with pytest.raises(SystemExit) as stopped:
        example.main(SMALL)
    assert stopped.value.code == 2


def test_the_real_pacs_and_a_pretrained_vit(example: ModuleType, tmp_path: Path) -> None:
    root = os.environ.get("HILORA_TEST_DATA")
    if root is None or not Path(root, "pacs").is_dir():
        pytest.skip("HILORA_TEST_DATA does not name a folder that holds pacs")
    weights = next(Path(root).glob("deit_tiny*.safetensors"), None)
    if weights is None:
        pytest.skip("no weights of DeiT-Ti in HILORA_TEST_DATA")
    model = ["--backbone", "deit_tiny_patch16_224", "--weights", str(weights), "--img-size", "32"]
    images = ["--data-dir", str(Path(root, "pacs")), "--images-per-client", "8"]
    assert example.main([*SMALL, *model, *images, "--out", str(tmp_path)]) == 0
    found = summary(tmp_path)
    assert found["data"] == "pacs (4 domains)"
    assert found["clusters"]["ari"] is not None
    records = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in records] == ["root", "cluster", "leaf"]
