"""The operations on tensors that everything above is built from. They know nothing of ViTs, adapters or clients.

Each folder is a family of operations; `backends` says who serves a call.
"""

from .backends import explain, twice_differentiable, use_backend
from .overlaps import gram_penalty, orthonormal_basis, subspace_distances
from .stacked_linear import Tier, Tiers, dequantized, float8_lora_linear, quantized, stacked_lora_linear

__all__ = [
    "Tier",
    "Tiers",
    "dequantized",
    "explain",
    "float8_lora_linear",
    "gram_penalty",
    "orthonormal_basis",
    "quantized",
    "stacked_lora_linear",
    "subspace_distances",
    "twice_differentiable",
    "use_backend",
]
