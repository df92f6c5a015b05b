"""ViTs of timm in less time, to the same results: attention without copies that it can do without, and in the last
block nothing that the class token does not need."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from hilora.kernels.torch_internals import autocast_dtype, linear, linear_gradient, softmax_gradient
from hilora.kernels.twice import differentiable_gradients


def hasten(model: nn.Module) -> None:
    """Let a ViT without masks compute its features in less time, in place; what it does not know it leaves alone.

    Attention in one autograd step serves where torch's fused one does not, as on a CPU; there frozen linear layers add
    their bias within the product. Where only the class token is pooled, the last block gives it alone, `[n, 1, D]`.
    """
    for module in list(model.modules()):
        if type(module) is Attention and _is_plain(module):
            module.__class__ = QuickAttention
        elif type(module) is nn.Linear:
            module.__class__ = QuickLinear
    if type(model) is VisionTransformer and _pools_class_token(model):
        blocks: Any = model.blocks
        last = blocks[-1]
        if type(last) is Block and type(last.attn) is QuickAttention:
            last.__class__ = LastBlock


def _is_plain(attention: Attention) -> bool:
    between = (attention.q_norm, attention.k_norm)
    return attention.gate is None and all(isinstance(module, nn.Identity) for module in between)


def _pools_class_token(model: VisionTransformer) -> bool:
    return (
        model.global_pool == "token" and model.attn_pool is None and isinstance(model.norm, nn.LayerNorm | nn.Identity)
    )


class QuickLinear(nn.Linear):
    """A linear layer, quicker where it is frozen and on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` → `[..., out]`."""
        trained = any(parameter.requires_grad for parameter in self.parameters())
        if trained or not x.is_cpu or x.dtype != self.weight.dtype or autocast_dtype("cpu") is not None:
            return super().forward(x)
        y: Tensor = _FrozenLinear.apply(x, self.weight, self.bias)
        return y


class _FrozenLinear(torch.autograd.Function):
    """`x Wᵀ + b`, differentiable in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return linear_gradient(dy, weight), None, None


class QuickAttention(Attention):  # type: ignore[misc, unused-ignore]
    """timm's attention, without masks, gates and normalised q and k."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[n, N, D]` → `[n, N, D]`."""
        dropout = self.training and self.attn_drop.p > 0
        if self.fused_attn or dropout or attn_mask is not None or is_causal:
            found: Tensor = super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
            return found
        return self._projected(_SelfAttention.apply(self.qkv(x), self.num_heads, self.scale, x.shape[1]))

    def of_first(self, x: Tensor) -> Tensor:
        """`[n, N, D]` → `[n, 1, D]`: what the first token attends to."""
        qkv = self.qkv(x)
        if not self.fused_attn:
            return self._projected(_SelfAttention.apply(qkv, self.num_heads, self.scale, 1))
        q, k, v = qkv.view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self._projected(F.scaled_dot_product_attention(q[:, :, :1], k, v).flatten(1)[:, None])

    def _projected(self, y: Tensor) -> Tensor:
        found: Tensor = self.proj_drop(self.proj(self.norm(y)))
        return found


class LastBlock(Block):  # type: ignore[misc, unused-ignore]
    """The last block of a ViT whose class token alone is pooled."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[n, N, D]` → `[n, 1, D]`."""
        dropout = self.training and self.attn.attn_drop.p > 0
        if dropout or attn_mask is not None or is_causal:
            found: Tensor = super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
            return found
        x = x[:, :1] + self.drop_path1(self.ls1(self.attn.of_first(self.norm1(x))))
        last: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return last


class _SelfAttention(torch.autograd.Function):
    """`softmax(scale · q kᵀ) v` of each head, from qkv `[n, N, 3 D]`, for the first M tokens: `[n, M, D]`.

    Heads are laid out once in each direction, instead of once for each product.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, scale: float, count: int) -> Tensor:
        n, tokens, width = qkv.shape
        apart = qkv.view(n, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        parts = apart.clone(memory_format=torch.contiguous_format).view(3, n * heads, tokens, -1)
        q = parts[0, :, :count].mul_(scale)
        weights = (q @ parts[1].mT).softmax(-1)
        ctx.save_for_backward(qkv, parts, weights)
        ctx.options = heads, scale, count
        return (weights @ parts[2]).view(n, heads, count, -1).transpose(1, 2).reshape(n, count, width // 3)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        qkv, parts, weights = ctx.saved_tensors
        heads, scale, count = ctx.options
        if torch.is_grad_enabled():
            again = differentiable_gradients(lambda qkv: written_out(qkv, heads, scale, count), [qkv], dy)
            return again[0], None, None, None
        n, tokens, width = qkv.shape
        back = dy.view(n, count, heads, -1).transpose(1, 2).reshape(n * heads, count, -1)
        gradients = torch.empty_like(parts) if count == tokens else torch.zeros_like(parts)
        torch.bmm(weights.mT, back, out=gradients[2])
        of_scores = softmax_gradient(back @ parts[2].mT, weights)
        gradients[0, :, :count].baddbmm_(of_scores, parts[1], beta=0, alpha=scale)
        torch.bmm(of_scores.mT, parts[0, :, :count], out=gradients[1])
        return (
            gradients.view(3, n, heads, tokens, -1).permute(1, 3, 0, 2, 4).reshape(n, tokens, width),
            None,
            None,
            None,
        )


def written_out(qkv: Tensor, heads: int, scale: float, count: int) -> Tensor:
    """The same in plain operations."""
    n, tokens, width = qkv.shape
    q, k, v = qkv.view(n, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (scale * q[:, :, :count] @ k.mT).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(n, count, width // 3)
