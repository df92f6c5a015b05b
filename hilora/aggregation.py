"""Averaging of adapters; a short name for `hilora.algorithms.aggregation`."""

from hilora.algorithms.aggregation import check_finite, product_space_mean, relative_change

__all__ = ["check_finite", "product_space_mean", "relative_change"]
