"""A family of another distribution: layers that attend over a window, and layers that attend over all, in turn.

The first kind has rotary positions, the second none. As small as it can be and still have two cache groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch.nn import functional

from pdserve.engine.layers.attention import Attention, AttentionKind
from pdserve.engine.layers.block import Block
from pdserve.engine.layers.builder import Builder
from pdserve.engine.layers.embedding import Embedding, Head
from pdserve.engine.layers.mlp import Mlp
from pdserve.engine.layers.norm import RMSNorm
from pdserve.engine.layers.rope import RotaryEmbedding
from pdserve.engine.layers.rope_config import RopeConfig
from pdserve.engine.models.config import ModelConfig, check_head_dim, check_keys
from pdserve.engine.models.decoder import Decoder
from pdserve.model_fields import count

THETA, EPS = 100.0, 1e-6

_KEYS = frozenset({"width", "depth", "heads", "kv_heads", "window", "longest"})


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowedToy(ModelConfig):
    num_kv_heads: int
    window: int

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Self:
        width, num_heads = count(data, "width"), count(data, "heads")
        check_head_dim(width // num_heads, "heads")
        return cls(
            architecture=check_keys(data, _KEYS),
            vocab_size=count(data, "vocab_size"),
            hidden_size=width,
            intermediate_size=2 * width,
            num_layers=count(data, "depth"),
            num_heads=num_heads,
            num_kv_heads=count(data, "kv_heads"),
            window=count(data, "window"),
            max_positions=count(data, "longest"),
        )

    def build(self, build: Builder) -> Decoder:
        heads = (self.num_heads, self.num_kv_heads, self.hidden_size // self.num_heads)
        rotary = RotaryEmbedding(RopeConfig(THETA), heads[2], build.device)
        near = AttentionKind(build, *heads, window=self.window, rotary=rotary)
        far = AttentionKind(build, *heads)
        embedding = Embedding(build.first_stage, "tokens", self.vocab_size, self.hidden_size)
        blocks = [
            self._block(far if index % 2 else near, layer, str(index))
            for index, layer in enumerate(build.layers(self.num_layers))
        ]
        norm = RMSNorm(build.last_stage, "norm", self.hidden_size, EPS)
        return Decoder(build, embedding, blocks, norm, Head(build.last_stage, "head", embedding))

    def _block(self, kind: AttentionKind, build: Builder, name: str) -> Block:
        width = self.hidden_size
        projections = kind.separate(f"{name}.q", f"{name}.k", f"{name}.v")
        return Block(
            RMSNorm(build, f"{name}.norm1", width, EPS),
            Attention(build, kind, width, projections, f"{name}.o"),
            RMSNorm(build, f"{name}.norm2", width, EPS),
            Mlp(
                build, width, self.intermediate_size, functional.relu, up=f"{name}.up", down=f"{name}.down", bias=False
            ),
        )
