"""Llama and the families that differ from it in numbers only: Mistral, Qwen2, Qwen3.

What differs is in the spec: windows (Mistral, Qwen), bias of q, k and v (Qwen2), normalised heads (Qwen3).
"""

from __future__ import annotations

from torch import Tensor, nn

from tessera.kernels.fused import fused_on
from tessera.model.language_model import Attend, LanguageModel, fused_slots, linear_slots
from tessera.model.layers.attention import Attention
from tessera.model.layers.embedding import Embedding, Head
from tessera.model.layers.mlp import GatedMLP
from tessera.model.layers.norm import RMSNorm
from tessera.model.layers.parameter import Placement
from tessera.model.layers.rope import RotaryEmbedding, Rotation
from tessera.model.spec import ModelSpec, Rope


class LlamaLayer(nn.Module):
    """Attention, then a gated MLP, each on normalised input and added to what came in.

    The MLP's output is not added here but by the norm that follows, the next layer's or the model's, which may do
    both in one launch. In a small step of a fused layer nothing is left to be added: the norms ride on the products
    behind them and the sums on those before, six launches in all (eight beyond `FEW_ROWS`, see `Linear.small`).

    fused  whether Triton kernels compute what lies between the products, and in small steps (`Linear.serves_small`)
           the products themselves; None: wherever they run
    """

    def __init__(self, spec: ModelSpec, layer: int, placement: Placement, *, fused: bool | None = None) -> None:
        super().__init__()
        self.fused = fused_on(placement.device) if fused is None else fused
        self.attention_norm = RMSNorm(spec.hidden_size, spec.norm_eps, placement, fused=self.fused)
        self.attention = Attention(spec, layer, placement, fused=self.fused)
        self.mlp_norm = RMSNorm(spec.hidden_size, spec.norm_eps, placement, fused=self.fused)
        self.mlp = GatedMLP(
            spec.hidden_size,
            spec.intermediate_size,
            spec.activation,
            bias=spec.mlp_bias,
            placement=placement,
            fused=self.fused,
        )

    def forward(
        self, hidden: Tensor, update: Tensor | None, rotation: Rotation, attend: Attend
    ) -> tuple[Tensor, Tensor | None]:
        """What came in and what is still to be added to it -> the same after this layer; all [tokens, hidden_size]."""
        if self.fused and update is None and self._serves_small(hidden.shape[0]):
            hidden = self.attention.add_small(hidden, self.attention_norm, rotation, attend)
            return self.mlp.add_small(hidden, self.mlp_norm), None
        if update is None:
            normed = self.attention_norm(hidden)
        else:
            hidden, normed = self.attention_norm.add(hidden, update)
        hidden, normed = self.mlp_norm.add(hidden, self.attention(normed, rotation, attend))
        return hidden, self.mlp(normed)

    def _serves_small(self, num_tokens: int) -> bool:
        products = (self.attention.qkv, self.attention.output, self.mlp.gate_up, self.mlp.down)
        return all(each.serves_small(num_tokens) for each in products)

    def slots(self, prefix: str) -> dict[str, Tensor]:
        """The weights of a layer under the names that transformers gives them."""
        attention, mlp = self.attention, self.mlp
        qkv_names = tuple(f"{prefix}self_attn.{name}_proj" for name in ("q", "k", "v"))
        q_size, k_size = (heads * attention.head_dim for heads in attention.num_heads)
        gate_up_names = (f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj")
        slots: dict[str, Tensor] = {
            f"{prefix}input_layernorm.weight": self.attention_norm.weight,
            f"{prefix}post_attention_layernorm.weight": self.mlp_norm.weight,
            **fused_slots(qkv_names, (q_size, k_size, k_size), attention.qkv),
            **linear_slots(f"{prefix}self_attn.o_proj", attention.output),
            **fused_slots(gate_up_names, (mlp.gate_up.weight.shape[0] // 2,) * 2, mlp.gate_up),
            **linear_slots(f"{prefix}mlp.down_proj", mlp.down),
        }
        if attention.q_norm is not None and attention.k_norm is not None:
            slots[f"{prefix}self_attn.q_norm.weight"] = attention.q_norm.weight
            slots[f"{prefix}self_attn.k_norm.weight"] = attention.k_norm.weight
        return slots


class Llama(LanguageModel):
    """Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3, dense.

    fused  see LlamaLayer
    """

    prefix = "model."
    ignored = r"rotary_emb\.inv_freq$"

    def __init__(self, spec: ModelSpec, placement: Placement, *, fused: bool | None = None) -> None:
        super().__init__(spec)
        self.embedding = Embedding(spec.vocab_size, spec.hidden_size, placement)
        self.rope = RotaryEmbedding(_rope_of(spec), spec.head_dim, placement.device, fused=fused)
        self.layers = nn.ModuleList(LlamaLayer(spec, layer, placement, fused=fused) for layer in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps, placement, fused=fused)
        self.head = Head(self.embedding, tied=spec.tie_word_embeddings, placement=placement)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """See LanguageModel.forward."""
        hidden: Tensor = self.embedding(token_ids)
        rotation = self.rope(positions, hidden.dtype)
        update: Tensor | None = None
        for layer in self.layers:
            hidden, update = layer(hidden, update, rotation, attend)
        if update is None:
            normed: Tensor = self.norm(hidden)
            return normed
        return self.norm.add(hidden, update)[1]

    def slots(self) -> dict[str, Tensor]:
        """See LanguageModel.slots."""
        slots: dict[str, Tensor] = {
            "model.embed_tokens.weight": self.embedding.weight,
            "model.norm.weight": self.norm.weight,
        }
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, LlamaLayer)
            slots |= layer.slots(f"model.layers.{index}.")
        if not self.spec.tie_word_embeddings:
            slots["lm_head.weight"] = self.head.weight
        return slots


def _rope_of(spec: ModelSpec) -> Rope:
    assert spec.rope is not None, "every family served here has rotary positions"
    return spec.rope
