"""GPT-2: LayerNorm with biases, learned positions, an MLP without a gate; its checkpoints hold matrices transposed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from torch import Tensor
from torch.nn import functional

from pdserve.engine.layers.attention import Attention, AttentionKind
from pdserve.engine.layers.block import Block
from pdserve.engine.layers.builder import Builder
from pdserve.engine.layers.embedding import Head, PositionedEmbedding
from pdserve.engine.layers.mlp import Mlp
from pdserve.engine.layers.norm import LayerNorm
from pdserve.engine.models.config import ModelConfig, check_head_dim, check_keys, read_dtype
from pdserve.engine.models.decoder import Decoder
from pdserve.model_fields import count, error, flag, number

_KEYS = frozenset(
    {
        "n_embd", "n_layer", "n_head", "n_positions", "n_inner", "activation_function", "layer_norm_epsilon",
        "scale_attn_weights",
        # Of an older name for n_positions, and of heads for other tasks.
        "n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
        "summary_first_dropout",
    }
)  # fmt: skip
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu": functional.gelu,
    "relu": functional.relu,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpt2(ModelConfig):
    """`activation` is a key of `_ACTIVATIONS`."""

    layer_norm_eps: float
    activation: str

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Self:
        """See `ModelConfig`."""
        architecture = check_keys(data, _KEYS)
        hidden_size, num_heads = count(data, "n_embd"), count(data, "n_head")
        if hidden_size % num_heads:
            raise error("n_head", f"{num_heads} does not divide n_embd = {hidden_size}")
        check_head_dim(hidden_size // num_heads, "n_head")
        activation = data.get("activation_function", "gelu_new")
        if activation not in _ACTIVATIONS:
            raise error("activation_function", f"allowed: {', '.join(_ACTIVATIONS)}; got {activation}")
        if not flag(data, "scale_attn_weights", True):
            raise error("scale_attn_weights", "allowed: true")
        return cls(
            architecture=architecture,
            vocab_size=count(data, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=count(data, "n_inner", 4 * hidden_size),
            num_layers=count(data, "n_layer"),
            num_heads=num_heads,
            max_positions=count(data, "n_positions"),
            tie_word_embeddings=flag(data, "tie_word_embeddings", True),
            checkpoint_dtype=read_dtype(data),
            layer_norm_eps=number(data, "layer_norm_epsilon", 1e-5),
            activation=activation,
        )

    def build(self, build: Builder) -> Decoder:
        """See `ModelConfig`."""
        build.optional_prefix = "transformer."
        # Masks, which older releases of transformers saved.
        build.ignored += [".attn.bias", ".attn.masked_bias"]
        kind = AttentionKind(build, self.num_heads, self.num_heads, self.hidden_size // self.num_heads)
        embedding = PositionedEmbedding(
            build.first_stage,
            "transformer.wte",
            self.vocab_size,
            self.hidden_size,
            positions="transformer.wpe",
            max_positions=self.max_positions,
        )
        blocks = [
            self._block(kind, layer, f"transformer.h.{index}")
            for index, layer in enumerate(build.layers(self.num_layers))
        ]
        norm = LayerNorm(build.last_stage, "transformer.ln_f", self.hidden_size, self.layer_norm_eps)
        head = Head(build.last_stage, None if self.tie_word_embeddings else "lm_head", embedding)
        return Decoder(build, embedding, blocks, norm, head)

    def _block(self, kind: AttentionKind, build: Builder, name: str) -> Block:
        hidden_size, eps = self.hidden_size, self.layer_norm_eps
        attention = Attention(
            build,
            kind,
            hidden_size,
            kind.fused(f"{name}.attn.c_attn"),
            f"{name}.attn.c_proj",
            bias=True,
            out_bias=True,
            transposed=True,
        )
        mlp = Mlp(
            build,
            hidden_size,
            self.intermediate_size,
            _ACTIVATIONS[self.activation],
            up=f"{name}.mlp.c_fc",
            down=f"{name}.mlp.c_proj",
            transposed=True,
        )
        first_norm = LayerNorm(build, f"{name}.ln_1", hidden_size, eps)
        return Block(first_norm, attention, LayerNorm(build, f"{name}.ln_2", hidden_size, eps), mlp)
