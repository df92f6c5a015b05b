"""A cross-section of the sweep, and the page that the whole of it has written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from hilora.errors import InvalidValueError
from tests.sweep import checks, run
from tests.sweep.checks import CHECKS, NotOurs
from tests.sweep.models import MODELS, Model
from tests.sweep.page import COLUMNS, NOT_OURS, PAGE, PASSED, Verdict, page

SLOW = ("compile",)

TIMM = """
beit_base_patch16_224 cait_xxs24_224 coat_lite_tiny coatnet_0_rw_224 convit_tiny davit_tiny deit3_small_patch16_224
efficientformer_l1 efficientformerv2_s0 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 hiera_tiny_224
levit_128s levit_conv_128s maxvit_tiny_tf_224 mobilevitv2_050 naflexvit_base_patch16_gap pit_ti_224
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 tiny_vit_5m_224 visformer_tiny vit_pwee_patch16_reg1_gap_256
vit_small_patch14_reg4_dinov2 vit_small_patch16_dinov3_qkvb vit_tiny_patch16_224 xcit_nano_12_p16_224
"""
TRANSFORMERS = """
CLIPModel Dinov2ForImageClassification LevitForImageClassification SamVisionModel SegformerForImageClassification
SwinForImageClassification ViTForImageClassification
"""
CROSS_SECTION = [
    *(f"timm {name}" for name in TIMM.split()),
    *(f"transformers {name}" for name in TRANSFORMERS.split()),
    *(f"torchvision {name}" for name in ("MaxVit", "SwinTransformerV2", "VisionTransformer")),
    *(f"open_clip {name}" for name in ("CLIP", "VisionTransformer")),
]


@pytest.fixture
def no_fast_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("no_fast_path")
@pytest.mark.parametrize("key", CROSS_SECTION)
def test_models_are_adapted(key: str) -> None:
    verdict = run.examine(key, [name for name in CHECKS if name not in SLOW])
    assert verdict.passed, verdict


@pytest.mark.slow
@pytest.mark.usefixtures("no_fast_path")
@pytest.mark.parametrize("key", CROSS_SECTION)
def test_models_are_compiled(key: str) -> None:
    verdict = run.examine(key, SLOW)
    assert verdict.passed, verdict


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
@pytest.mark.parametrize(
    "key", ["timm vit_tiny_patch16_224", "timm beit_base_patch16_224", "transformers ViTForImageClassification"]
)
def test_inductor_compiles_them(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "BACKEND", "inductor")
    verdict = run.examine(key, SLOW)
    assert verdict.passed, verdict


def test_the_cross_section_is_of_forty() -> None:
    assert len(set(CROSS_SECTION) & MODELS.keys()) == len(CROSS_SECTION) == 40
    assert len(MODELS) == 146


def _rows() -> dict[str, list[str]]:
    """The cells of each model's row in the page, after its name and its targets."""
    rows, library = {}, ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        library = line.removeprefix("## ") if line.startswith("## ") else library
        if line.startswith("| `") and library:
            name, _, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            rows[f"{library} {name.strip('`')}"] = cells
    return rows


def test_the_page_has_a_row_for_each_model_and_says_how_many_pass() -> None:
    rows = _rows()
    assert rows.keys() == MODELS.keys()
    said = {PASSED, NOT_OURS}
    passed = [key for key, cells in rows.items() if all(cell in said for cell in cells)]
    assert f"\n{len(passed)} of 146 models pass" in PAGE.read_text(encoding="utf-8")
    assert len(passed) >= 139
    for key in rows.keys() - passed:
        assert rows[key][0].startswith("refused: "), f"{key} neither passes nor is refused"


class Silent(nn.Module):
    """Calls its q, and drops what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mean((2, 3))
        self.q(x)
        y: torch.Tensor = self.head(self.v(x))
        return y


def _verdict(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch, **fields: object) -> Verdict:
    model = Model("test", "model", kind, **fields)  # type: ignore[arg-type]
    monkeypatch.setitem(MODELS, "test model", model)
    return run.examine("test model", [name for name in CHECKS if name not in SLOW])


def test_adapters_that_do_nothing_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = _verdict(Silent, monkeypatch)
    assert verdict.wrong.keys() == {"acts", "gradients"}
    assert "adapters of q" in verdict.wrong["acts"]
    assert not verdict.passed
    assert _verdict(Silent, monkeypatch, targets=("v",)).passed


def test_a_refusal_is_no_pass_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = _verdict(Silent, monkeypatch, targets=("fc1",))
    assert "target 'fc1' finds no linear layer" in verdict.refused
    assert (verdict.passed, verdict.wrong) == (False, {})


def test_what_the_plain_model_cannot_do_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(case: Model) -> None:
        raise NotOurs("it cannot")

    def wrong(case: Model) -> None:
        raise InvalidValueError("a fault")

    monkeypatch.setitem(CHECKS, "copies", unable)
    monkeypatch.setitem(CHECKS, "bf16", wrong)
    verdict = _verdict(Silent, monkeypatch, targets=("v",))
    assert verdict.checks["copies"] == NOT_OURS
    assert verdict.wrong == {"bf16": "InvalidValueError: a fault"}


def test_a_model_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def forever(case: Model) -> None:
        while True:
            pass

    monkeypatch.setattr(run, "SECONDS", 1)
    monkeypatch.setitem(CHECKS, "inject", forever)
    assert run.examine("timm vit_tiny_patch16_224").wrong == {"time": "more than 1 s"}


def test_the_page_says_what_became_of_each() -> None:
    fine = {key: Verdict(key, dict.fromkeys(CHECKS, PASSED), "", 1.0) for key in MODELS}
    first, second, *_ = fine
    text = page([*fine.values()])
    assert "\n146 of 146 models pass all of the following; none is refused.\n" in text
    fine[first] = Verdict(first, {}, "for a | reason", 1.0)
    fine[second] = Verdict(second, {**dict.fromkeys(CHECKS, PASSED), "bf16": "a fault"}, "", 1.0)
    text = page([*fine.values()])
    assert "\n144 of 146 models pass all of the following; 1 refused, with a reason in the row; 1 fail." in text
    assert "| refused: for a \\| reason |" in text
    assert "| a fault |" in text
    assert COLUMNS.keys() == CHECKS.keys()
