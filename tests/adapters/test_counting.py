from __future__ import annotations

import pytest
import torch
from torch import nn

import hilora
from hilora import HiLoRAConfig
from tests.helpers import vit


def test_what_is_trained_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    model = vit()
    plain = hilora.count_parameters(model)
    assert plain == (plain.total, plain.total)
    hilora.inject(model, HiLoRAConfig(r=2))
    one_tier = 2 * (2 * 2 * 24 + 2 * 24 * 2)
    head = 5 * 24 + 5
    counted = hilora.count_parameters(model)
    assert counted == (one_tier + head, plain.total + 3 * one_tier)
    hilora.print_trainable_parameters(model)
    share = 100 * counted.trainable / counted.total
    assert capsys.readouterr().out == (
        f"trainable params: {counted.trainable:,d} || all params: {counted.total:,d} || trainable%: {share:.4f}\n"
    )


def test_a_model_without_parameters_trains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    hilora.print_trainable_parameters(nn.ReLU())
    assert capsys.readouterr().out == "trainable params: 0 || all params: 0 || trainable%: 0.0000\n"
    assert hilora.count_parameters(nn.Linear(2, 3, device="meta", dtype=torch.half)) == (9, 9)
