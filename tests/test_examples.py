"""The examples that show the library beside others, as a user runs them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

PRINTED = {
    "foreign_vit": r"(?s)linear1.*root .*cluster .*leaf    trained, loss \d\.\d+",
    "timm_layer_decay": r"leaf    loss \d\.\d+, rates of the blocks × 0.32, 0.42, 0.56, 0.75",
    "hf_trainer": r"leaf    trained, loss \d\.\d+",
    "serve_peft_adapters": r"three adapters in one batch: outputs differ by at most \d\.\de-0[67]",
}
LEFT = {
    "timm_layer_decay": "runs/timm_layer_decay/averaged.safetensors",
    "hf_trainer": "runs/hf_trainer/adapters.safetensors",
}


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_runs_and_trains(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(PRINTED[name], printed), printed
    losses = [float(loss) for loss in re.findall(r"^(?:root|leaf).* loss (\d\.\d+)", printed, re.MULTILINE)]
    assert losses == sorted(losses, reverse=True)
    if name in LEFT:
        assert (tmp_path / LEFT[name]).stat().st_size > 1000
