"""FFA-LoRA (Sun et al., Improving LoRA in Privacy-preserving Federated Learning, 2024): A stays at its random start."""

from __future__ import annotations

from hilora.federated.strategies.fedit import FedIT


class FFALoRA(FedIT):
    """Only B and the head are trained and averaged: then the mean of the products is the product of the means.

    An unseen client's own training leaves A as it is, too.
    """

    name = "ffa-lora"
    factors = "B"
