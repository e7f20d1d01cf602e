"""Which rank holds which part of a model: arithmetic, without a process or a device.

Ranks are counted through a stage first: rank r is number r % tp_size of stage r // tp_size. Within a stage every layer
is cut as Megatron-LM does it (arXiv 1909.08053): by heads and by intermediate columns, with one sum over the stage
after attention and one after the MLP. The embedding is whole on every rank of the first stage; the output matrix is cut
by vocabulary over the ranks of the last. Nothing has to divide: see `heads_of`, `_cut` and `vocab_starts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pdserve.config import LlmArgs
from pdserve.engine.models.config import ModelConfig
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


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank holds of the model `whole`.

    `config` describes it as a model of its own: the rank's layers, heads and intermediate columns; hidden size and
    vocabulary are the whole model's. The ranges say which ones they are; `vocab` are the rows of the output matrix.
    """

    mapping: Mapping
    whole: ModelConfig
    config: ModelConfig
    layers: range
    heads: range
    kv_heads: range
    intermediate: range
    vocab: range

    @property
    def has_embedding(self) -> bool:
        return self.mapping.is_first_stage

    @property
    def has_output(self) -> bool:
        """Whether the final norm and a part of the output matrix are here."""
        return self.mapping.is_last_stage

    @property
    def adds_bias(self) -> bool:
        """Whether this rank's summand of a layer's output carries the bias."""
        return self.mapping.tp_rank == 0

    @classmethod
    def of(cls, config: ModelConfig, mapping: Mapping | None = None) -> Shard:
        """The part of `config` that belongs to `mapping`'s rank; all of it without one.

        Raises:
            ConfigError: there are more ranks than something can be cut into; `param` names the key.
        """
        mapping = mapping or Mapping()
        _check(config, mapping)
        layers = _layers_of(config.num_layers, mapping)
        heads, kv_heads = heads_of(config, mapping.tp_size, mapping.tp_rank)
        intermediate = _cut(config.intermediate_size, mapping.tp_size, mapping.tp_rank)
        own = replace(
            config,
            num_layers=len(layers),
            num_heads=len(heads),
            num_kv_heads=len(kv_heads),
            intermediate_size=len(intermediate),
        )
        return cls(
            mapping=mapping,
            whole=config,
            config=own,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            intermediate=intermediate,
            vocab=_vocab_of(config.vocab_size, mapping),
        )


def heads_of(config: ModelConfig, tp_size: int, tp_rank: int) -> tuple[range, range]:
    """Query heads and KV heads of a rank. Each of its KV heads serves equally many of its query heads.

    KV heads are shared out as evenly as possible, with the query heads that attend to them. Where ranks outnumber KV
    heads, a KV head is held by several ranks, which share out its query heads.
    """
    group = config.num_heads // config.num_kv_heads
    if tp_size <= config.num_kv_heads:
        kv_heads = even_part(config.num_kv_heads, tp_size, tp_rank)
        return range(kv_heads.start * group, kv_heads.stop * group), kv_heads
    holders = [even_part(tp_size, config.num_kv_heads, kv_head) for kv_head in range(config.num_kv_heads)]
    kv_head = next(index for index, ranks in enumerate(holders) if tp_rank in ranks)
    ranks = holders[kv_head]
    part = even_part(group, len(ranks), tp_rank - ranks.start)
    return range(kv_head * group + part.start, kv_head * group + part.stop), range(kv_head, kv_head + 1)


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


def _vocab_of(vocab_size: int, mapping: Mapping) -> range:
    starts, width = vocab_starts(vocab_size, mapping.tp_size)
    return range(starts[mapping.tp_rank], starts[mapping.tp_rank] + width)


def _cut(total: int, num_parts: int, index: int) -> range:
    """Part `index` of `range(total)`: equal parts if they are aligned, else parts of whole units of a power of two."""
    if total % (num_parts * _ALIGNMENT) == 0:
        return even_part(total, num_parts, index)
    unit = _TILE
    while unit > 1 and (total % unit or total // unit < num_parts):
        unit //= 2
    part = even_part(total // unit, num_parts, index)
    return range(part.start * unit, part.stop * unit)


def _layers_of(num_layers: int, mapping: Mapping) -> range:
    if mapping.layers_per_stage is None:
        # Longer stages first: the last one has the output matrix besides.
        return even_part(num_layers, mapping.pp_size, mapping.stage)
    start = sum(mapping.layers_per_stage[: mapping.stage])
    return range(start, start + mapping.layers_per_stage[mapping.stage])


def _check(config: ModelConfig, mapping: Mapping) -> None:
    most = min(config.num_heads, config.intermediate_size)
    if mapping.tp_size > most:
        raise ConfigError(
            f"tensor_parallel_size: the model has {config.num_heads} query heads and {config.intermediate_size} "
            f"intermediate columns; allowed: up to {most}, got {mapping.tp_size}",
            "tensor_parallel_size",
        )
    if mapping.pp_size > config.num_layers:
        raise ConfigError(
            f"pipeline_parallel_size: the model has {config.num_layers} layers; allowed: up to {config.num_layers}, "
            f"got {mapping.pp_size}",
            "pipeline_parallel_size",
        )
    _check_partition(config.num_layers, mapping.layers_per_stage)


def _check_partition(num_layers: int, layers_per_stage: Sequence[int] | None) -> None:
    if layers_per_stage is not None and sum(layers_per_stage) != num_layers:
        raise ConfigError(
            f"pp_partition: {list(layers_per_stage)} adds up to {sum(layers_per_stage)} layers, "
            f"the model has {num_layers}",
            "pp_partition",
        )
