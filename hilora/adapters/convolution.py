"""Adapters in convolutions that are a linear layer at each pixel, as CoAtNet and MobileViT V2 have for q, k and v."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from hilora.adapters.layers import TieredLoRALinear
from hilora.kernels.stacked_linear.reference import sheets
from hilora.kernels.stacked_linear.tier import check


class TieredLoRAConv2d(TieredLoRALinear):
    """A `TieredLoRALinear` in place of a 1 × 1 convolution. Its weight keeps its shape, `[out, in, 1, 1]`; the
    convolution itself is PyTorch's, and the adapters' products are the reference's."""

    replaces: ClassVar[type[nn.Module]] = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """`[n, in, h, w]` → `[n, out, h, w]`. Where slots tell clients apart, the n images are in G equal groups.

        Raises:
            ValueError: as `TieredLoRALinear.forward`.
        """
        if isinstance(x, Proxy):
            return self.as_node(x)
        y = F.conv2d(x, self.frozen_weight, self.bias)
        if self.shared.disabled:
            return y
        pixels = x.movedim(-3, -1)  # [n, h, w, in]
        grouped = self.grouped(pixels).to(y.dtype)
        tiers = self.tiers(grouped)
        check(grouped, self.frozen_weight.flatten(1), self.bias, tiers)
        for sheet in sheets(grouped, self.out_features, tiers, self.dropout):
            y = y + sheet.reshape(*pixels.shape[:-1], self.out_features).movedim(-1, -3)
        return y

    def plain(self) -> nn.Module:
        return nn.Conv2d(self.in_features, self.out_features, 1, bias=self.bias is not None, device="meta")
