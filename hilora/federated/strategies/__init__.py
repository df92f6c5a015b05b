"""Federated methods, one file each."""

from .base import Stage, Strategy
from .fedit import FedIT
from .hilora import HiLoRA
from .local import LocalLoRA

STRATEGIES: dict[str, type[Strategy]] = {"hilora": HiLoRA, "fedit": FedIT, "local-lora": LocalLoRA}

__all__ = ["STRATEGIES", "FedIT", "HiLoRA", "LocalLoRA", "Stage", "Strategy"]
