"""A plugin of pytest under which our layer is wrong by a hundredth part in one output."""

import pytest
from torch import Tensor

from hilora import kernels
from hilora.kernels.backends import chosen_backend


@pytest.fixture(autouse=True)
def _wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.stacked_lora_linear

    def wrong(*args: object, **more: object) -> Tensor:
        y: Tensor = right(*args, **more)  # type: ignore[arg-type]
        if chosen_backend() is None:
            return y * (1 + 0.01 * (y == y.max()))
        return y

    monkeypatch.setattr(kernels, "stacked_lora_linear", wrong)
