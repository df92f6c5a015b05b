"""The example as a user runs it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hilora.locks import claimed

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "examples" / "federated_cifar100.py"
SMALL = ["--clients", "5", "--images-per-client", "8", "--rounds", "1,1,1", "--rank", "2", "--dtype", "float32"]


def load_example(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example(SCRIPT)


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def test_with_nothing_given_it_runs_on_glyphs_and_compares_three_strategies(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main([*SMALL, "--out", str(tmp_path)]) == 0
    for strategy in ("hilora", "fedit", "local-lora"):
        found = summary(tmp_path / strategy)
        assert found["strategy"] == strategy
        assert found["data"] == "glyphs"
        assert found["backbone"] == "glyph_vit"
    assert not (tmp_path / "summary.json").exists()
    table = (tmp_path / "comparison.md").read_text()
    printed = capsys.readouterr().out
    assert "glyph" in printed
    assert "cifar" not in printed.lower().replace("cifar-100", "")  # named only to say that this is not it
    for strategy in ("hilora", "fedit", "local-lora"):
        assert any(line.lstrip().lower().startswith(strategy) for line in printed.splitlines())
        assert f"| {strategy} |" in table


def test_values_per_tier_and_their_mistakes(example: ModuleType, tmp_path: Path) -> None:
    arguments = [*SMALL, "--strategy", "hilora", "--rank", "4,2,1", "--lr", "1e-3", "--out", str(tmp_path)]
    assert example.main(arguments) == 0
    config = summary(tmp_path)["config"]
    assert config["rank"] == {"root": 4, "cluster": 2, "leaf": 1}
    assert set(config["lr"].values()) == {1e-3}
    for mistake in (["--rank", "4,2"], ["--strategy", "fedit", "fedit"], ["--download"]):
        with pytest.raises(SystemExit) as stopped:
            example.main(mistake)
        assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data-dir", "/nowhere"], "/nowhere"),
        (["--clients", "0"], "--clients is 0"),
        (["--classes-per-client", "3"], "--classes-per-client is for patho: the partition is sc-dir"),
        (["--clients", "4000", "--images-per-client", "100"], "images"),
        (["--unseen", "1.5"], "--unseen is 1.5"),
        (["--weights", "/nowhere/w.safetensors", "--backbone", "deit_tiny_patch16_224"], "/nowhere/w.safetensors"),
        (["--backbone", "no_such_vit"], "--backbone no_such_vit: "),
        (["--participation", "0"], "--participation=0"),
        (["--batch-size", "0"], "--batch-size=0"),
        (["--device", "quantum"], "--device quantum: "),
        (["--resume"], "--resume"),
        (["--data-dir", __file__], "test_train.py"),
        (["--seed", "-1"], "seed"),
        (["--k", "3"], "--k is for ifca"),
        (["--pf2lora.own-rank", "3"], "--pf2lora.own-rank is for pf2lora: "),
        (["--gamma-root", "nan"], "--gamma-root=nan"),
        (["--gamma", "1", "--strategy", "fedit"], "--gamma is for hilora: "),
        (["--k-min", "3", "--k-max", "2"], "k_max (2) is below k_min (3)"),
        (["--rank", "200"], "rank"),
        (["--strategy", "hilora", "fedit", "--rank-budgets", "1/2:2,1/2:1"], "fedit has no use for budgets of ranks"),
        (["--strategy", "flexlora", "--rank-budgets", "3"], "rank_budgets='3': flexlora has adapters of rank 2"),
        (["--strategy", "fedra", "--layer-budgets", "1/2:6,1/2:3"], "the model has 5 blocks with adapters"),
    ],
)
def test_mistakes_end_in_one_clear_line(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert example.main([*SMALL, "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert said in error
    assert not list(tmp_path.rglob("summary.json"))


def test_an_out_that_is_a_file_ends_in_one_clear_line(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    assert example.main([*SMALL, "--out", str(taken)]) == 2
    assert str(taken) in capsys.readouterr().err
    assert taken.read_text() == "mine"


def test_a_second_run_in_the_same_folder_loses_nothing(example: ModuleType, tmp_path: Path) -> None:
    arguments = [*SMALL, "--strategy", "fedit", "--out", str(tmp_path)]
    assert example.main([*arguments, "--seed", "1"]) == 0
    assert example.main([*arguments, "--seed", "2"]) == 0
    assert summary(tmp_path / "earlier-1")["seed"] == 1
    assert summary(tmp_path)["seed"] == 2


def interrupt(arguments: list[str], log: Path, rounds: int, number: signal.Signals) -> tuple[str, str]:
    """Send a signal, as Ctrl-C does, when the log has so many rounds; returns what was printed."""
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, default)  # a background suite inherits that it is ignored
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    signal.signal(number, before)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= rounds):
        time.sleep(0.05)  # no event tells a test that a file has grown
    process.send_signal(number)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    return printed, errors


@pytest.mark.parametrize(("number", "rounds"), [(signal.SIGINT, 0), (signal.SIGTERM, 2), (signal.SIGHUP, 1)])
def test_a_signal_ends_cleanly_with_what_was_reached_and_resume_goes_on(
    example: ModuleType, tmp_path: Path, number: signal.Signals, rounds: int
) -> None:
    arguments = [*SMALL, "--strategy", "hilora", "--rounds", "15,1,1"]
    out = tmp_path / "stopped"
    printed, errors = interrupt([*arguments, "--out", str(out)], out / "metrics.jsonl", rounds, number)
    assert "Traceback" not in errors
    assert "--resume goes on from here" in errors
    assert "hilora" in printed.lower()
    found = summary(out)
    assert found["interrupted"] is True
    assert found["rounds"] >= rounds
    for name in ("accuracy.png", "clusters.png", "adapters.safetensors"):
        assert (out / name).stat().st_size > 0
    assert example.main([*arguments, "--out", str(out), "--resume"]) == 0
    assert example.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    resumed, whole = summary(out), summary(tmp_path / "whole")
    assert resumed["interrupted"] is False
    for key in ("tiers", "final", "unseen", "clusters", "rounds"):
        assert resumed[key] == whole[key], key


def test_a_folder_that_another_process_writes_to_is_refused(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with claimed(tmp_path / "out"):
        assert example.main([*SMALL, "--out", str(tmp_path / "out")]) == 2
    assert f"another process is writing to --out {tmp_path / 'out'}" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_real_images_and_a_pretrained_vit(example: ModuleType, tmp_path: Path) -> None:
    root = os.environ.get("HILORA_TEST_DATA")
    if root is None:
        pytest.skip("HILORA_TEST_DATA is not set: no real data to run on")
    weights = next(Path(root).glob("deit_tiny*.safetensors"), None)
    if weights is None:
        pytest.skip("no weights of DeiT-Ti in HILORA_TEST_DATA")
    data = ["--data-dir", root, "--backbone", "deit_tiny_patch16_224", "--weights", str(weights), "--img-size", "32"]
    assert example.main([*SMALL, *data, "--out", str(tmp_path), "--partition", "patho"]) == 0
    found = summary(tmp_path)
    assert found["data"] == "cifar100"
    assert found["backbone"].startswith("deit_tiny_patch16_224")
    assert found["strategy"] == "hilora"
    assert found["clusters"]["ari"] is None
