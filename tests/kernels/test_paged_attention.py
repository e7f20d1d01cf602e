"""Paged attention, torch and Triton, against dense attention in double precision, one sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch

from pd_kernels.paged_attention import PagedBatch
from pd_kernels.paged_attention.decode_kernel import choose_block_n, choose_num_splits
from pd_kernels.paged_attention.reference import TorchPlan
from pd_kernels.paged_attention.triton_kernel import TritonPlan
from tests.kernels.attention_case import DECODES, LAYER, PREFILLS, SHAPES, AnyPlan, Case


@pytest.fixture(params=[TorchPlan, TritonPlan], ids=["torch", "triton"])
def plan(request: pytest.FixtureRequest) -> AnyPlan:
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_and_decode_in_one_batch(plan: AnyPlan, shape: tuple[int, int, int], device: torch.device) -> None:
    Case(DECODES + PREFILLS, shape, torch.float32, device).check(plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seqs", [DECODES, PREFILLS, [(1, 0)], [(70, 70)]], ids=["decodes", "prefills", "one", "tiles"])
def test_half_precision(plan: AnyPlan, seqs: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
    if plan is TritonPlan and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as if they held integers")
    Case(seqs, (9, 3, 64), dtype, device).check(plan)


@pytest.mark.parametrize("tokens_per_block", [1, 3, 128])
def test_any_block_size(plan: AnyPlan, tokens_per_block: int, device: torch.device) -> None:
    Case([*DECODES, (5, 9)], (4, 2, 32), torch.float32, device, tokens_per_block).check(plan)


def test_decodes_of_very_different_lengths_are_not_padded_to_the_longest(device: torch.device) -> None:
    case = Case([(1, 1000), (1, 900), *[(1, 20 - i) for i in range(10)]], (2, 1, 16), torch.float32, device)
    planned = TorchPlan(case.batch, case.pool, case.spec, torch.float32)
    gathered_blocks = sum(group.rows.numel() for group in planned._groups) // 2
    assert gathered_blocks <= 2 * sum(math.ceil(n / 16) for n in case.batch.seq_lens)
    case.check(TorchPlan)


def test_a_long_prefix_is_attended_in_chunks_of_queries(device: torch.device) -> None:
    Case([(300, 100)], (2, 1, 16), torch.float32, device).check(TorchPlan)


def test_what_is_past_a_sequences_end_does_not_matter(plan: AnyPlan, device: torch.device) -> None:
    """Memory of a peer or of an earlier owner may hold anything, and so may the blocks that a table ends with."""
    case = Case([*DECODES, (3, 4), (5, 20)], (4, 2, 16), torch.float32, device)
    unused = torch.ones(len(case.pool), dtype=torch.bool, device=device)
    for row, seq_len in enumerate(case.batch.seq_lens):
        blocks = case.batch.block_tables[row, : math.ceil(seq_len / 16)]
        case.pool[blocks[-1], :, :, :, (seq_len - 1) % 16 + 1 :] = float("nan")
        unused[blocks] = False
    case.pool[unused] = float("nan")
    anywhere = int(unused.nonzero()[0])
    for row, seq_len in enumerate(case.batch.seq_lens):
        case.batch.block_tables[row, math.ceil(seq_len / 16) :] = anywhere
    case.check(plan)


@pytest.mark.parametrize("num_splits", [1, 2, 8, 64])
@pytest.mark.parametrize("shape", [*SHAPES, (8, 1, 80), (5, 5, 128)], ids=str)
def test_any_number_of_splits_gives_the_same_decode(
    shape: tuple[int, int, int], num_splits: int, device: torch.device
) -> None:
    """Lengths around the tile and share sizes: fewer tiles than splits, as many, one more; one token; a long tail."""
    num_heads, _, head_dim = shape
    tile = choose_block_n(head_dim, 4)
    lengths = [5 * tile + 1, 2 * tile, tile + 1, tile, tile - 1, 1]
    case = Case([(1, length - 1) for length in lengths], shape, torch.float32, device)
    out = torch.full((len(lengths), num_heads * head_dim), float("nan"), device=device)
    case.decode(num_splits).run(case.qkv, LAYER, out)
    torch.testing.assert_close(out, case.expected, rtol=1e-5, atol=1e-5)


def test_short_sequences_stay_with_one_program(device: torch.device) -> None:
    """Poisoned partial results: those of sequences below twice `min_tiles` go unread, the others' are all written."""
    shape = (6, 2, 64)
    tile = choose_block_n(64, 4)
    lengths = [9 * tile, 6 * tile + 1, 5 * tile + 1, 5 * tile, tile, 1]
    case = Case([(1, length - 1) for length in lengths], shape, torch.float32, device)
    planned = case.decode(8, min_tiles=3)
    planned._partial.fill_(float("nan"))
    out = torch.empty_like(case.expected)
    planned.run(case.qkv, LAYER, out)
    torch.testing.assert_close(out, case.expected, rtol=1e-5, atol=1e-5)
    written = (~planned._partial.isnan()).all(-1).sum(-1)[:, 0]
    assert written.tolist() == [3, 2, 2, 0, 0, 0]


def test_many_sequences_merge_several_heads_in_a_program(device: torch.device) -> None:
    """Six heads, merged by fours; sequences with and without something to merge."""
    tile = choose_block_n(16, 4)
    lengths = [1 + (17 * index) % (2 * tile + 40) for index in range(33)]
    case = Case([(1, length - 1) for length in lengths], (6, 2, 16), torch.float32, device)
    out = torch.full_like(case.expected, float("nan"))
    case.decode(4).run(case.qkv, LAYER, out)
    torch.testing.assert_close(out, case.expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_a_launch_serves_other_lengths_and_padding_rows(num_splits: int, device: torch.device) -> None:
    """What a CUDA graph's replay does: the lengths on the device change after the plan was made."""
    case = Case([(1, 99), (1, 49), (1, 5), (1, 0)], (6, 2, 32), torch.float32, device)
    planned = case.decode(num_splits)
    out = torch.empty_like(case.expected)
    planned.run(case.qkv, LAYER, out)
    torch.testing.assert_close(out, case.expected, rtol=1e-5, atol=1e-5)

    unread = case.batch.block_tables[1, : math.ceil(50 / 16)]
    case.pool[unread] = float("nan")
    case.batch.seq_lens_tensor[1] = 0
    case.batch.seq_lens_tensor[3] = 0
    out.fill_(float("nan"))
    planned.run(case.qkv, LAYER, out)
    assert not out[1].any()
    assert not out[3].any()
    torch.testing.assert_close(out[[0, 2]], case.expected[[0, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_splits", [1, 2, 16])
def test_splits_never_read_slots_past_the_end(num_splits: int, device: torch.device) -> None:
    case = Case([(1, 99), (1, 48), (1, 0)], (4, 2, 80), torch.float32, device)
    used = torch.zeros(case.pool.shape[0], case.pool.shape[4], dtype=torch.bool, device=device)
    for row, seq_len in enumerate(case.batch.seq_lens):
        at = torch.arange(seq_len, device=device)
        used[case.batch.block_tables[row, at // 16], at % 16] = True
    case.pool.permute(0, 4, 1, 2, 3, 5)[~used] = float("nan")
    out = torch.empty_like(case.expected)
    case.decode(num_splits).run(case.qkv, LAYER, out)
    torch.testing.assert_close(out, case.expected, rtol=1e-5, atol=1e-5)


def test_padding_rows_give_zeros(plan: AnyPlan, device: torch.device) -> None:
    case = Case([(1, 40), (1, 7), (1, 3)], (4, 2, 16), torch.float32, device)
    seq_lens = [41, 0, 0]
    tensor = torch.tensor(seq_lens, device=device)
    batch = PagedBatch([1, 1, 1], seq_lens, case.batch.q_starts, tensor, case.batch.block_tables)
    out = plan(batch, case.pool, case.spec, torch.float32).run(case.qkv, LAYER)
    assert not out[1:].any()
    torch.testing.assert_close(out[0], case.expected[0], rtol=1e-5, atol=1e-5)


def test_decode_of_a_batch_reads_only_its_tensors(device: torch.device) -> None:
    """A captured graph's plan knows no lengths, so none may steer the launch."""
    case = Case(DECODES, (4, 2, 16), torch.float32, device)
    batch = case.batch
    blind = PagedBatch(batch.q_lens, [], batch.q_starts, batch.seq_lens_tensor, batch.block_tables)
    out = TritonPlan(blind, case.pool, case.spec, torch.float32).run(case.qkv, LAYER)
    torch.testing.assert_close(out, case.expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_shares", "num_splits"), [(1, 64), (8, 64), (128, 16), (512, 8), (100_000, 8)])
def test_splits_fill_the_gpu_and_not_more(num_shares: int, num_splits: int) -> None:
    assert choose_num_splits(num_shares, 132) == num_splits
