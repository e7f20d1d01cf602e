"""Which rank holds which part of a model: arithmetic, without a process or a device.

Ranks are counted through a stage first: rank r is number r % tp_size of stage r // tp_size. Within a stage every layer
is cut as Megatron-LM does it (arXiv 1909.08053): by heads and by intermediate columns, with one sum over the stage
after attention and one after the MLP. The embedding is whole on every rank of the first stage; the output matrix is cut
by vocabulary over the ranks of the last. Nothing has to divide: see `Mapping.heads`, `columns` and `vocab_starts`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.config import LlmArgs
from pdserve.errors import ConfigError

# Matrix products read their operands 16 bytes at a time: eight numbers of a 16-bit type.
_ALIGNMENT = 8
# What a share is a multiple of where it has a choice: full tiles of a matrix product.
_TILE = 64


@dataclass(frozen=True, slots=True)
class Mapping:
    """One rank's place. `layers_per_stage` is None where the stages are as equal as they can be."""

    rank: int = 0
    tp_size: int = 1
    pp_size: int = 1
    layers_per_stage: tuple[int, ...] | None = None

    @classmethod
    def of(cls, args: LlmArgs, rank: int = 0) -> Mapping:
        """The place of `rank` among those that `args` ask for."""
        return cls(rank, args.tensor_parallel_size, args.pipeline_parallel_size, args.pp_partition)

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def stage(self) -> int:
        return self.rank // self.tp_size

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pp_size - 1

    @property
    def stage_ranks(self) -> list[int]:
        """The ranks that share this rank's layers."""
        return list(range(self.stage * self.tp_size, (self.stage + 1) * self.tp_size))

    @property
    def last_stage_ranks(self) -> list[int]:
        return list(range(self.world_size - self.tp_size, self.world_size))

    def layers(self, num_layers: int) -> range:
        """The layers of the rank's stage."""
        if self.layers_per_stage is None:
            # Longer stages first: the last one has the output matrix besides.
            return even_part(num_layers, self.pp_size, self.stage)
        start = sum(self.layers_per_stage[: self.stage])
        return range(start, start + self.layers_per_stage[self.stage])

    def heads(self, num_heads: int, num_kv_heads: int) -> tuple[range, range]:
        """The rank's query heads and KV heads. Each of its KV heads serves equally many of its query heads.

        KV heads are shared out as evenly as possible, with the query heads that attend to them. Where ranks outnumber
        KV heads, a KV head is held by several ranks, which share out its query heads.
        """
        group = num_heads // num_kv_heads
        if self.tp_size <= num_kv_heads:
            kv_heads = even_part(num_kv_heads, self.tp_size, self.tp_rank)
            return range(kv_heads.start * group, kv_heads.stop * group), kv_heads
        holders = [even_part(self.tp_size, num_kv_heads, kv_head) for kv_head in range(num_kv_heads)]
        kv_head = next(index for index, ranks in enumerate(holders) if self.tp_rank in ranks)
        ranks = holders[kv_head]
        part = even_part(group, len(ranks), self.tp_rank - ranks.start)
        return range(kv_head * group + part.start, kv_head * group + part.stop), range(kv_head, kv_head + 1)

    def columns(self, total: int) -> range:
        """The rank's intermediate columns: equal parts if they are aligned, else whole units of a power of two."""
        if total % (self.tp_size * _ALIGNMENT) == 0:
            return even_part(total, self.tp_size, self.tp_rank)
        unit = _TILE
        while unit > 1 and (total % unit or total // unit < self.tp_size):
            unit //= 2
        part = even_part(total // unit, self.tp_size, self.tp_rank)
        return range(part.start * unit, part.stop * unit)

    def vocab(self, vocab_size: int) -> range:
        """The rank's rows of the output matrix, see `vocab_starts`."""
        starts, width = vocab_starts(vocab_size, self.tp_size)
        return range(starts[self.tp_rank], starts[self.tp_rank] + width)

    def check(self, num_layers: int, num_heads: int, intermediate_size: int) -> None:
        """Raises ConfigError if there are more ranks than such a model can be cut into; `param` names the key."""
        most = min(num_heads, intermediate_size)
        if self.tp_size > most:
            raise ConfigError(
                f"tensor_parallel_size: the model has {num_heads} query heads and {intermediate_size} "
                f"intermediate columns; allowed: up to {most}, got {self.tp_size}",
                "tensor_parallel_size",
            )
        if self.pp_size > num_layers:
            raise ConfigError(
                f"pipeline_parallel_size: the model has {num_layers} layers; allowed: up to {num_layers}, "
                f"got {self.pp_size}",
                "pipeline_parallel_size",
            )
        partition = self.layers_per_stage
        if partition is not None and sum(partition) != num_layers:
            raise ConfigError(
                f"pp_partition: {list(partition)} adds up to {sum(partition)} layers, the model has {num_layers}",
                "pp_partition",
            )


def vocab_starts(vocab_size: int, tp_size: int) -> tuple[list[int], int]:
    """Where each rank's rows of the output matrix start, and how many each has.

    All have equally many, so that one gather joins the logits; where the vocabulary doesn't divide, the rows of the
    last ranks overlap those before them, and some logits are computed twice.
    """
    width = min(vocab_size, -(-vocab_size // (tp_size * _ALIGNMENT)) * _ALIGNMENT)
    return [min(rank * width, vocab_size - width) for rank in range(tp_size)], width


def even_part(total: int, num_parts: int, index: int) -> range:
    """Part `index` of `range(total)` cut into `num_parts`; the first ones are longer by one where it doesn't divide."""
    length, longer = divmod(total, num_parts)
    start = index * length + min(index, longer)
    return range(start, start + length + (index < longer))
