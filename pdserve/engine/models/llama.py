"""Llama and Mistral: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Their kin are subclasses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from pdserve.engine.layers.attention import Attention, AttentionKind
from pdserve.engine.layers.block import Block
from pdserve.engine.layers.builder import Builder
from pdserve.engine.layers.embedding import Embedding, Head
from pdserve.engine.layers.mlp import GatedMlp
from pdserve.engine.layers.norm import RMSNorm
from pdserve.engine.layers.rope import RotaryEmbedding
from pdserve.engine.layers.rope_config import RopeConfig, parse_rope
from pdserve.engine.models.config import ModelConfig, check_head_dim, check_keys, read_dtype, read_window
from pdserve.engine.models.decoder import Decoder
from pdserve.model_fields import count, error, flag, number

_KEYS = frozenset(
    {
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "original_max_position_embeddings",
        "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "sliding_window", "layer_types",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama(ModelConfig):
    """`qk_norm`: whether each head of queries and keys is normalized."""

    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Self:
        """See `ModelConfig`."""
        bias = flag(data, "attention_bias")
        return cls.read_kin(
            data,
            {"attention_bias", "mlp_bias"},
            kv_heads_default=count(data, "num_attention_heads"),
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=flag(data, "mlp_bias"),
        )

    @classmethod
    def read_kin(
        cls, data: Mapping[str, Any], own_keys: Iterable[str] = (), *, kv_heads_default: int | None = None,
        head_dim_default: int | None = None, **facts: Any,
    ) -> Self:  # fmt: skip
        """What Llama and its kin have in common.

        Args:
            own_keys: what of `config.json` the family reads besides.
            kv_heads_default: what a missing `num_key_value_heads` means; None: it may not be missing.
            head_dim_default: what a missing `head_dim` means; None: hidden_size / num_attention_heads.
            facts: fields that the family knows by itself.

        Raises:
            ConfigError: see `ModelConfig.read`.
        """
        architecture = check_keys(data, _KEYS.union(own_keys))
        activation = data.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise error("hidden_act", f"allowed: silu; got {activation}")
        num_heads, hidden_size = count(data, "num_attention_heads"), count(data, "hidden_size")
        num_kv_heads = count(data, "num_key_value_heads", kv_heads_default)
        if num_heads % num_kv_heads:
            raise error("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads = {num_heads}")
        rope = parse_rope(data)
        return cls(
            architecture=architecture,
            vocab_size=count(data, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=count(data, "intermediate_size"),
            num_layers=count(data, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=check_head_dim(count(data, "head_dim", head_dim_default or hidden_size // num_heads)),
            rms_norm_eps=number(data, "rms_norm_eps", 1e-6),
            max_positions=rope.max_positions,
            scaling=rope.kind,
            rope=rope,
            tie_word_embeddings=flag(data, "tie_word_embeddings"),
            checkpoint_dtype=read_dtype(data),
            **{"sliding_window": read_window(data)} | facts,
        )

    def build(self, build: Builder) -> Decoder:
        """See `ModelConfig`."""
        rotary = RotaryEmbedding(self.rope, self.head_dim, build.device)
        kind = AttentionKind(build, self.num_heads, self.num_kv_heads, self.head_dim, rotary=rotary)
        build.ignored.append("rotary_emb.inv_freq")
        embedding = Embedding(build.first_stage, "model.embed_tokens", self.vocab_size, self.hidden_size)
        blocks = [
            self._block(kind, layer, f"model.layers.{i}") for i, layer in enumerate(build.layers(self.num_layers))
        ]
        norm = RMSNorm(build.last_stage, "model.norm", self.hidden_size, self.rms_norm_eps)
        head = Head(build.last_stage, None if self.tie_word_embeddings else "lm_head", embedding)
        return Decoder(build, embedding, blocks, norm, head)

    def _block(self, kind: AttentionKind, build: Builder, name: str) -> Block:
        def norm(of: str, size: int = self.hidden_size) -> RMSNorm:
            return RMSNorm(build, f"{name}.{of}", size, self.rms_norm_eps)

        heads, columns = f"{name}.self_attn", f"{name}.mlp"
        norms = None
        if self.qk_norm:
            norms = norm("self_attn.q_norm", self.head_dim), norm("self_attn.k_norm", self.head_dim)
        attention = Attention(
            build,
            kind,
            self.hidden_size,
            kind.separate(f"{heads}.q_proj", f"{heads}.k_proj", f"{heads}.v_proj"),
            f"{heads}.o_proj",
            bias=self.qkv_bias,
            out_bias=self.o_bias,
            norms=norms,
        )
        mlp = GatedMlp(
            build,
            self.hidden_size,
            self.intermediate_size,
            gate=f"{columns}.gate_proj",
            up=f"{columns}.up_proj",
            down=f"{columns}.down_proj",
            bias=self.mlp_bias,
        )
        return Block(norm("input_layernorm"), attention, norm("post_attention_layernorm"), mlp)


class Mistral(Llama):
    """Llama with a window where the file does not say that there is none."""

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Self:
        """See `ModelConfig`."""
        return cls.read_kin(data, sliding_window=read_window(data, default=4096))
