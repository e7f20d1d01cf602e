"""Which rank holds what: everything exactly once, in shares that the kernels can run."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pdserve.config import LlmArgs, load
from pdserve.devices import gpu_environment
from pdserve.engine.parallel.mapping import Mapping
from pdserve.errors import ConfigError
from pdserve.supervisor import Supervisor

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, INTERMEDIATE_SIZE = 32, 32, 8, 14336  # Llama 3.1 8B
SMOLLM2_LAYERS, SMOLLM2_HEADS = 30, (9, 3)


def ranks(tp_size: int, pp_size: int = 1) -> list[Mapping]:
    return [Mapping(rank, tp_size, pp_size) for rank in range(tp_size * pp_size)]


def heads(num_heads: int, num_kv_heads: int, tp_size: int) -> list[tuple[list[int], list[int]]]:
    parts = [mapping.heads(num_heads, num_kv_heads) for mapping in ranks(tp_size)]
    return [(list(queries), list(keys)) for queries, keys in parts]


def test_uneven_kv_heads_take_their_query_heads_along() -> None:
    assert heads(*SMOLLM2_HEADS, 2) == [([0, 1, 2, 3, 4, 5], [0, 1]), ([6, 7, 8], [2])]


def test_kv_heads_are_replicated_where_ranks_outnumber_them() -> None:
    assert heads(*SMOLLM2_HEADS, 4) == [([0, 1], [0]), ([2], [0]), ([3, 4, 5], [1]), ([6, 7, 8], [2])]
    assert heads(9, 1, 2) == [([0, 1, 2, 3, 4], [0]), ([5, 6, 7, 8], [0])]


def test_a_rank_for_each_stage_and_share() -> None:
    found = [
        (each.layers(NUM_LAYERS), each.heads(NUM_HEADS, NUM_KV_HEADS)[0].start, each.is_first_stage, each.is_last_stage)
        for each in ranks(2, 2)
    ]
    assert found == [
        (range(16), 0, True, False),
        (range(16), 16, True, False),
        (range(16, 32), 0, False, True),
        (range(16, 32), 16, False, True),
    ]
    assert Mapping(3, 2, 3).stage_ranks == [2, 3]
    assert Mapping(3, 2, 3).last_stage_ranks == [4, 5]


def test_earlier_stages_are_longer_unless_told_otherwise() -> None:
    assert [len(each.layers(SMOLLM2_LAYERS)) for each in ranks(1, 4)] == [8, 8, 7, 7]
    given_layers = [Mapping(rank, 1, 3, (5, 15, 10)).layers(SMOLLM2_LAYERS) for rank in range(3)]
    assert given_layers == [range(5), range(5, 20), range(20, 30)]


def test_shares_stay_aligned_where_they_can() -> None:
    assert [len(each.columns(INTERMEDIATE_SIZE)) for each in ranks(4)] == [3584] * 4
    assert [len(each.columns(8960)) for each in ranks(3)] == [3008, 3008, 2944]
    assert [each.vocab(131) for each in ranks(2)] == [range(72), range(59, 131)]


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
    num_heads = num_kv_heads * group
    if tp_size > num_heads:
        with pytest.raises(ConfigError) as caught:
            Mapping(0, tp_size).check(NUM_LAYERS, num_heads, intermediate_size)
        assert caught.value.param == "tensor_parallel_size"
        return
    columns = [each.columns(intermediate_size) for each in ranks(tp_size)]
    vocab = [each.vocab(vocab_size) for each in ranks(tp_size)]
    queries, keys = zip(*(each.heads(num_heads, num_kv_heads) for each in ranks(tp_size)), strict=True)
    assert [head for part in queries for head in part] == list(range(num_heads))
    assert [column for part in columns for column in part] == list(range(intermediate_size))
    assert {row for part in vocab for row in part} == set(range(vocab_size))
    assert len({len(part) for part in vocab}) == 1, "one gather joins the logits"
    assert all(columns)
    for own_queries, own_keys in zip(queries, keys, strict=True):
        assert own_queries
        own_group = len(own_queries) // len(own_keys)
        assert [head // group for head in own_queries] == [head for head in own_keys for _ in range(own_group)]
    sizes = [len(part) for part in queries]
    assert max(sizes) - min(sizes) <= group
    for before, after in pairwise(keys):
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
        mapping.check(NUM_LAYERS, NUM_HEADS, INTERMEDIATE_SIZE)
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
