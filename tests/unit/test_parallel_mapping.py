"""Which rank holds what: everything exactly once, in shares that the kernels can run."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pdserve.config import LlmArgs, load
from pdserve.devices import gpu_environment
from pdserve.engine.layers.rope_config import RopeConfig
from pdserve.engine.models.config import ModelConfig
from pdserve.engine.models.mapping import Mapping, Shard
from pdserve.errors import ConfigError
from pdserve.supervisor import Supervisor

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
    rope=RopeConfig(10_000.0),
)
SMOLLM2 = replace(
    CONFIG, vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3
)


def shards(config: ModelConfig, tp_size: int, pp_size: int = 1) -> list[Shard]:
    return [Shard.of(config, Mapping(rank, tp_size, pp_size)) for rank in range(tp_size * pp_size)]


def heads(config: ModelConfig, tp_size: int) -> list[tuple[list[int], list[int]]]:
    return [(list(shard.heads), list(shard.kv_heads)) for shard in shards(config, tp_size)]


def test_uneven_kv_heads_take_their_query_heads_along() -> None:
    assert heads(SMOLLM2, 2) == [([0, 1, 2, 3, 4, 5], [0, 1]), ([6, 7, 8], [2])]


def test_kv_heads_are_replicated_where_ranks_outnumber_them() -> None:
    assert heads(SMOLLM2, 4) == [([0, 1], [0]), ([2], [0]), ([3, 4, 5], [1]), ([6, 7, 8], [2])]
    assert heads(replace(SMOLLM2, num_kv_heads=1), 2) == [([0, 1, 2, 3, 4], [0]), ([5, 6, 7, 8], [0])]


def test_a_rank_for_each_stage_and_share() -> None:
    found = [(shard.layers, shard.heads.start, shard.has_embedding, shard.has_output) for shard in shards(CONFIG, 2, 2)]
    assert found == [
        (range(16), 0, True, False),
        (range(16), 16, True, False),
        (range(16, 32), 0, False, True),
        (range(16, 32), 16, False, True),
    ]
    assert Mapping(3, 2, 3).stage_ranks == [2, 3]
    assert Mapping(3, 2, 3).last_stage_ranks == [4, 5]


def test_earlier_stages_are_longer_unless_told_otherwise() -> None:
    assert [len(Shard.of(SMOLLM2, Mapping(rank, 1, 4)).layers) for rank in range(4)] == [8, 8, 7, 7]
    given_layers = [Shard.of(SMOLLM2, Mapping(rank, 1, 3, (5, 15, 10))).layers for rank in range(3)]
    assert given_layers == [range(5), range(5, 20), range(20, 30)]


def test_shares_stay_aligned_where_they_can() -> None:
    assert [len(shard.intermediate) for shard in shards(CONFIG, 4)] == [3584] * 4
    assert [len(shard.intermediate) for shard in shards(replace(CONFIG, intermediate_size=8960), 3)] == [
        3008,
        3008,
        2944,
    ]
    assert [shard.vocab for shard in shards(replace(CONFIG, vocab_size=131), 2)] == [range(72), range(59, 131)]


@given(
    num_kv_heads=st.integers(1, 12),
    group=st.integers(1, 8),
    intermediate_size=st.integers(12, 3000),
    vocab_size=st.integers(1, 3000),
    tp_size=st.integers(1, 12),
)
def test_every_part_is_somewhere(
    num_kv_heads: int, group: int, intermediate_size: int, vocab_size: int, tp_size: int
) -> None:
    config = replace(
        CONFIG,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
    )
    if tp_size > config.num_heads:
        with pytest.raises(ConfigError) as caught:
            Shard.of(config, Mapping(0, tp_size))
        assert caught.value.param == "tensor_parallel_size"
        return
    parts = shards(config, tp_size)
    assert [head for shard in parts for head in shard.heads] == list(range(config.num_heads))
    assert [column for shard in parts for column in shard.intermediate] == list(range(intermediate_size))
    assert {row for shard in parts for row in shard.vocab} == set(range(vocab_size))
    assert len({len(shard.vocab) for shard in parts}) == 1, "one gather joins the logits"
    for shard in parts:
        assert shard.heads
        assert shard.intermediate
        own_group = len(shard.heads) // len(shard.kv_heads)
        assert [head // group for head in shard.heads] == [head for head in shard.kv_heads for _ in range(own_group)]
    sizes = [len(shard.heads) for shard in parts]
    assert max(sizes) - min(sizes) <= group
    for before, after in pairwise(shard.kv_heads for shard in parts):
        assert after.start >= before.stop or (len(before) == len(after) == 1 and before == after)


@pytest.mark.parametrize(
    ("mapping", "param"),
    [
        (Mapping(0, 33, 1), "tensor_parallel_size"),
        (Mapping(0, 1, 33), "pipeline_parallel_size"),
        (Mapping(0, 1, 2, (16, 15)), "pp_partition"),
    ],
)
def test_what_can_not_be_cut_is_refused_by_its_key(mapping: Mapping, param: str) -> None:
    with pytest.raises(ConfigError, match=param) as caught:
        Shard.of(CONFIG, mapping)
    assert caught.value.param == param


def test_a_partition_needs_an_entry_for_each_stage() -> None:
    given_args = LlmArgs(model="m", pipeline_parallel_size=2, pp_partition=(3, 1))
    assert Mapping.of(given_args, 1) == Mapping(1, 1, 2, (3, 1))
    with pytest.raises(ValidationError, match="each of 2 pipeline stages"):
        LlmArgs(model="m", pipeline_parallel_size=2, pp_partition=(3,))


def test_each_worker_gets_a_gpu_for_each_of_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdserve.supervisor.visible_gpus", lambda: ["0", "1", "2", "3", "4"])
    flags = ["--model=m", "--context_servers.tensor_parallel_size=2", "--generation_servers.num_instances=2"]
    children = Supervisor(load(flags=flags))._children()
    first = {child.name: child._environment.get("CUDA_VISIBLE_DEVICES", "")[:3] for child in children[2:]}
    assert first == {"context-0": "0,1", "generation-0": "2,3", "generation-1": "3,4"}


def test_a_worker_sees_its_own_gpus_first() -> None:
    gpus = ["0", "1", "2", "3"]
    assert gpu_environment(gpus, 2) == {"CUDA_VISIBLE_DEVICES": "2,3,0,1"}
    assert gpu_environment(gpus, 5) == {"CUDA_VISIBLE_DEVICES": "1,2,3,0"}
    assert gpu_environment([], 1) == {}
