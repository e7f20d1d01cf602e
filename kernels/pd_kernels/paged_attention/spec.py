"""What kind of attention a model's layers have: the border between a model and the backends that compute it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

_COPY_BYTES = 16  # the copy engine of a GPU takes rows and columns that start at multiples of it


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """Causal attention of one kind. Layers of one spec and one pool share a plan.

    Two specs are equal only if they are one object, because they may hold tensors.
    The token at position p gives the key at position k <= p the weight exp(cap(query * key * scale) + slope * (k - p)),
    where cap(x) = softcap * tanh(x / softcap). A head's weights are divided by their sum plus exp(sink).

    Args:
        num_heads: query heads, a multiple of `num_kv_heads`; neighbours share a key head.
        qk_dim, v_dim: elements of a query's or key's head, and of a value's.
        window: how many tokens a token sees, itself included; None: all before it. A sequence's table may hold
            anything, -1 included, for blocks that are wholly before the window of its first new token.
        softcap: bound of the scores (arXiv 2408.00118 §2).
        sinks: [num_layers, num_heads] float32, for each layer of the pool (arXiv 2309.17453 §3).
        alibi: [num_heads] float32: slopes (arXiv 2108.12409).

    Raises:
        ValueError: a number or shape is out of its range.
    """

    num_heads: int
    num_kv_heads: int
    qk_dim: int
    v_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    alibi: Tensor | None = None

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {self.num_heads}, {self.num_kv_heads}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be more than 0, got {self.softcap}")
        for name, value, num_dims in (("sinks", self.sinks, 2), ("alibi", self.alibi, 1)):
            if value is not None and (value.dim() != num_dims or value.shape[-1] != self.num_heads):
                raise ValueError(f"{name} must have {num_dims} dimensions, the last of num_heads, got {[*value.shape]}")

    @classmethod
    def plain(cls, num_heads: int, num_kv_heads: int, head_dim: int) -> AttentionSpec:
        """Attention over all tokens before, scaled by 1 / sqrt(head_dim)."""
        return cls(num_heads, num_kv_heads, head_dim, head_dim, head_dim**-0.5)

    @cached_property
    def extras(self) -> list[str]:
        """Names of what a backend for plain attention does not know."""
        return [name for name in ("window", "softcap", "sinks", "alibi") if getattr(self, name) is not None]

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.num_heads // self.num_kv_heads

    @property
    def qkv_width(self) -> int:
        """Elements of a token's queries, keys and values, which stand side by side in one row."""
        return (self.num_heads + self.num_kv_heads) * self.qk_dim + self.num_kv_heads * self.v_dim

    @property
    def out_width(self) -> int:
        """Elements of a token's attention output."""
        return self.num_heads * self.v_dim

    def pitch(self, element_bytes: int) -> int:
        """Elements from one head to the next where keys are laid out for the copy engine: qk_dim or a few more."""
        unit = _COPY_BYTES // element_bytes
        return -(-self.qk_dim // unit) * unit

    def first_key(self, position: int) -> int:
        """Position of the first token that the one at `position` sees."""
        return 0 if self.window is None else max(0, position + 1 - self.window)
