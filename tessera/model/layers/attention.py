"""The attention half of a layer: projections and rotation; the attention itself is the caller's."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tessera.kernels.fused import fused_on
from tessera.kernels.turn import Turn
from tessera.model.layers.linear import Linear
from tessera.model.layers.norm import RMSNorm
from tessera.model.layers.parameter import Placement
from tessera.model.layers.rope import Rotation, rotate
from tessera.model.spec import ModelSpec


class Attend(Protocol):
    """What a model calls to attend, once a layer."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, turn: Turn | None = None, /) -> Tensor:
        """(layer, q, k, v) -> [tokens, q_heads, head_dim]; q has that shape, k and v [tokens, kv_heads, head_dim].

        All three are views whose heads lie together (last stride 1) but whose tokens are further apart. `turn` comes
        from layers that are `fused` and only from them: q and k are as projected, and whoever attends turns them.
        """
        ...


class Attention(nn.Module):
    """Projects to q, k and v, turns q and k to their positions, attends, and projects back.

    It knows nothing of pages, windows or scale: `attend` does.

    fused  whether `attend` is left to normalise and turn q and k as it stores keys, in one kernel; None: where it runs
    """

    def __init__(self, spec: ModelSpec, layer: int, placement: Placement, *, fused: bool | None = None) -> None:
        super().__init__()
        self.fused = fused_on(placement.device) if fused is None else fused
        self.layer = layer
        self.head_dim = spec.head_dim
        self.num_heads = (spec.num_q_heads, spec.num_kv_heads)
        num_outputs = (spec.num_q_heads + 2 * spec.num_kv_heads) * spec.head_dim
        self.qkv = Linear(spec.hidden_size, num_outputs, bias=spec.qkv_bias, placement=placement)
        self.output = Linear(
            spec.num_q_heads * spec.head_dim, spec.hidden_size, bias=spec.output_bias, placement=placement
        )
        self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps, placement, fused=fused) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps, placement, fused=fused) if spec.qk_norm else None

    def forward(self, hidden: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """[tokens, hidden_size] -> [tokens, hidden_size]"""
        output: Tensor = self.output(self._attended(self.qkv(hidden), rotation, attend))
        return output

    def add_small(self, hidden: Tensor, norm: RMSNorm, rotation: Rotation | None, attend: Attend) -> Tensor:
        """Few tokens, [tokens, hidden_size]: hidden + attention(norm(hidden)) in two launches and those of `attend`."""
        attended = self._attended(self.qkv.small(hidden, norm=norm), rotation, attend)
        return self.output.small(attended, residual=hidden)

    def _attended(self, projected: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """q, k and v side by side, [tokens, heads * head_dim] -> [tokens, q_heads * head_dim]"""
        heads: Any = projected.view(projected.shape[0], -1, self.head_dim)
        num_q_heads, num_kv_heads = self.num_heads
        if self.fused:
            q, k, v = heads.split((num_q_heads, num_kv_heads, num_kv_heads), 1)
            return attend(self.layer, q, k, v, self._turn(rotation)).flatten(1)
        both, v = heads.split((num_q_heads + num_kv_heads, num_kv_heads), 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = both.split(self.num_heads, 1)
            both = torch.cat((self.q_norm(q), self.k_norm(k)), 1)
        if rotation is not None:
            both = rotate(both, rotation)
        q, k = both.split(self.num_heads, 1)
        return attend(self.layer, q, k, v).flatten(1)

    def _turn(self, rotation: Rotation | None) -> Turn:
        """What `attend` has to do to q and k."""
        if self.q_norm is None or self.k_norm is None:
            return Turn(rotation=rotation)
        return Turn(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps, rotation)
