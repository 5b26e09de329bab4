"""GPT-2: learned positions, LayerNorm, an MLP without a gate, biases everywhere."""

from __future__ import annotations

from torch import Tensor, nn

from tessera.model.language_model import Attend, LanguageModel
from tessera.model.layers.attention import Attention
from tessera.model.layers.embedding import Embedding, Head
from tessera.model.layers.linear import Linear
from tessera.model.layers.mlp import MLP
from tessera.model.layers.norm import LayerNorm
from tessera.model.layers.parameter import Placement
from tessera.model.spec import ModelSpec


class GPT2Layer(nn.Module):
    """Attention, then an MLP, each on normalised input and added to what came in."""

    def __init__(self, spec: ModelSpec, layer: int, placement: Placement) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(spec.hidden_size, spec.norm_eps, placement)
        self.attention = Attention(spec, layer, placement)
        self.mlp_norm = LayerNorm(spec.hidden_size, spec.norm_eps, placement)
        self.mlp = MLP(
            spec.hidden_size, spec.intermediate_size, spec.activation, bias=spec.mlp_bias, placement=placement
        )

    def forward(self, hidden: Tensor, attend: Attend) -> Tensor:
        """[tokens, hidden_size] -> [tokens, hidden_size]"""
        hidden = hidden + self.attention(self.attention_norm(hidden), None, attend)
        output: Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        return output

    def slots(self, prefix: str) -> dict[str, Tensor]:
        """The weights of a layer under the names that transformers gives them."""
        return {
            **_norm_slots(f"{prefix}ln_1", self.attention_norm),
            **_norm_slots(f"{prefix}ln_2", self.mlp_norm),
            **_transposed_slots(f"{prefix}attn.c_attn", self.attention.qkv),
            **_transposed_slots(f"{prefix}attn.c_proj", self.attention.output),
            **_transposed_slots(f"{prefix}mlp.c_fc", self.mlp.up),
            **_transposed_slots(f"{prefix}mlp.c_proj", self.mlp.down),
        }


class GPT2(LanguageModel):
    """GPT-2 in all its sizes."""

    prefix = "transformer."
    ignored = r"(^|\.)h\.\d+\.attn\.(bias|masked_bias)$"

    def __init__(self, spec: ModelSpec, placement: Placement) -> None:
        super().__init__(spec)
        self.embedding = Embedding(spec.vocab_size, spec.hidden_size, placement)
        self.position_embedding = Embedding(spec.max_position, spec.hidden_size, placement)
        self.layers = nn.ModuleList(GPT2Layer(spec, layer, placement) for layer in range(spec.num_layers))
        self.norm = LayerNorm(spec.hidden_size, spec.norm_eps, placement)
        self.head = Head(self.embedding, tied=spec.tie_word_embeddings, placement=placement)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """See LanguageModel.forward; positions must be below the spec's max_position."""
        hidden: Tensor = self.embedding(token_ids) + self.position_embedding(positions)
        for layer in self.layers:
            hidden = layer(hidden, attend)
        output: Tensor = self.norm(hidden)
        return output

    def slots(self) -> dict[str, Tensor]:
        """See LanguageModel.slots."""
        slots: dict[str, Tensor] = {
            "transformer.wte.weight": self.embedding.weight,
            "transformer.wpe.weight": self.position_embedding.weight,
            **_norm_slots("transformer.ln_f", self.norm),
        }
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, GPT2Layer)
            slots |= layer.slots(f"transformer.h.{index}.")
        if not self.spec.tie_word_embeddings:
            slots["lm_head.weight"] = self.head.weight
        return slots


def _norm_slots(name: str, norm: LayerNorm) -> dict[str, Tensor]:
    return {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}


def _transposed_slots(name: str, linear: Linear) -> dict[str, Tensor]:
    """GPT-2's checkpoints hold weights as [num_inputs, num_outputs]."""
    assert linear.bias is not None
    return {f"{name}.weight": linear.weight.t(), f"{name}.bias": linear.bias}
