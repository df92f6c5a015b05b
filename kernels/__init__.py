"""The operations on tensors that everything above is built from. They know nothing of ViTs, adapters or clients."""

from .reference import Tier, gram_penalty, orthonormal_basis, stacked_lora_linear, subspace_distances

__all__ = ["Tier", "gram_penalty", "orthonormal_basis", "stacked_lora_linear", "subspace_distances"]
