"""Paged attention, torch and Triton, against dense attention in double precision, one sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch

from pd_kernels.paged_attention import PagedBatch, fresh_prefill
from pd_kernels.paged_attention.decode_kernel import DecodeAttention, choose_block_n, choose_num_splits
from pd_kernels.paged_attention.reference import TorchPlan
from pd_kernels.paged_attention.triton_kernel import TritonPlan

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LAYER, NUM_LAYERS = 1, 2

# (new tokens, tokens in the cache before them) of each sequence, decodes first.
DECODES = [(1, 40), (1, 17), (1, 16), (1, 3), (1, 0)]
PREFILLS = [(7, 0), (1 + 16, 16), (33, 5), (2, 30)]
SHAPES = [(1, 1, 16), (4, 4, 8), (6, 2, 80), (9, 3, 64), (5, 1, 256), (40, 2, 16)]


class Case:
    """A batch with scattered blocks in a pool of noise, and what attention over it must give."""

    def __init__(
        self, seqs: list[tuple[int, int]], shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device,
        tokens_per_block: int = 16,
    ) -> None:  # fmt: skip
        self.num_heads, num_kv_heads, head_dim = shape
        q_lens = [q_len for q_len, _ in seqs]
        seq_lens = [q_len + cached for q_len, cached in seqs]
        counts = [math.ceil(n / tokens_per_block) for n in seq_lens]
        num_blocks = sum(counts) + 2
        self.pool = torch.randn(num_blocks, NUM_LAYERS, 2, num_kv_heads, tokens_per_block, head_dim, device=device)
        self.pool = self.pool.to(dtype)
        self.qkv = torch.randn(sum(q_lens), (self.num_heads + 2 * num_kv_heads) * head_dim, device=device).to(dtype)
        ids = torch.randperm(num_blocks, device=device)
        tables = torch.zeros(len(seqs), max(counts), dtype=torch.int64, device=device)
        starts = torch.tensor([0, *q_lens], device=device).cumsum(0)
        expected, used = [], 0
        for row, (q_len, seq_len, count) in enumerate(zip(q_lens, seq_lens, counts, strict=True)):
            tables[row, :count] = ids[used : used + count]
            used += count
            expected.append(self._attend(tables[row, :count], int(starts[row]), q_len, seq_len))
        self.expected = torch.cat(expected).to(dtype)
        self.batch = PagedBatch(q_lens, seq_lens, starts, torch.tensor(seq_lens, device=device), tables)

    def _attend(self, blocks: torch.Tensor, start: int, q_len: int, seq_len: int) -> torch.Tensor:
        """Write the sequence's new keys and values to the cache, then attend densely over all of them."""
        num_kv_heads, tokens_per_block, head_dim = self.pool.shape[3:]
        heads = self.qkv[start : start + q_len].view(q_len, -1, head_dim)
        new = heads[:, self.num_heads :].view(q_len, 2, num_kv_heads, head_dim)
        for index, position in enumerate(range(seq_len - q_len, seq_len)):
            self.pool[blocks[position // tokens_per_block], LAYER, :, :, position % tokens_per_block] = new[index]
        cached = self.pool[blocks, LAYER].transpose(0, 2).flatten(2, 3)[:, :, :seq_len]
        keys, values = cached.double().repeat_interleave(self.num_heads // num_kv_heads, dim=0).unbind(1)
        scores = heads[:, : self.num_heads].double().transpose(0, 1) @ keys.transpose(1, 2) / math.sqrt(head_dim)
        positions = torch.arange(seq_len, device=scores.device)
        scores = scores.masked_fill(positions > positions[seq_len - q_len :, None], float("-inf"))
        return (scores.softmax(-1) @ values).transpose(0, 1).flatten(1)

    def check(self, plan: type[TorchPlan] | type[TritonPlan]) -> None:
        out = plan(self.batch, self.pool, self.num_heads).run(self.qkv, LAYER)
        tolerance = TOLERANCE[out.dtype]
        torch.testing.assert_close(out, self.expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[TorchPlan, TritonPlan], ids=["torch", "triton"])
def plan(request: pytest.FixtureRequest) -> type[TorchPlan] | type[TritonPlan]:
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_and_decode_in_one_batch(
    plan: type[TorchPlan] | type[TritonPlan], shape: tuple[int, int, int], device: torch.device
) -> None:
    Case(DECODES + PREFILLS, shape, torch.float32, device).check(plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seqs", [DECODES, PREFILLS, [(1, 0)], [(70, 70)]], ids=["decodes", "prefills", "one", "tiles"])
def test_half_precision(
    plan: type[TorchPlan] | type[TritonPlan], seqs: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> None:
    if plan is TritonPlan and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as if they held integers")
    Case(seqs, (9, 3, 64), dtype, device).check(plan)


@pytest.mark.parametrize("tokens_per_block", [1, 3, 128])
def test_any_block_size(plan: type[TorchPlan] | type[TritonPlan], tokens_per_block: int, device: torch.device) -> None:
    Case([*DECODES, (5, 9)], (4, 2, 32), torch.float32, device, tokens_per_block).check(plan)


def test_decodes_of_very_different_lengths_are_not_padded_to_the_longest(device: torch.device) -> None:
    case = Case([(1, 1000), (1, 900), *[(1, 20 - i) for i in range(10)]], (2, 1, 16), torch.float32, device)
    planned = TorchPlan(case.batch, case.pool, case.num_heads)
    gathered_blocks = sum(group.rows.numel() for group in planned._groups) // 2
    assert gathered_blocks <= 2 * sum(math.ceil(n / 16) for n in case.batch.seq_lens)
    case.check(TorchPlan)


def test_a_long_prefix_is_attended_in_chunks_of_queries(device: torch.device) -> None:
    Case([(300, 100)], (2, 1, 16), torch.float32, device).check(TorchPlan)


def test_triton_never_reads_slots_past_the_end(device: torch.device) -> None:
    """Unlike the torch plan, which needs them finite: memory of a peer or an earlier owner may hold anything."""
    case = Case([(1, 16), (3, 4)], (2, 1, 16), torch.float32, device)
    for row, seq_len in enumerate(case.batch.seq_lens):
        last = case.batch.block_tables[row, (seq_len - 1) // 16]
        case.pool[last, :, :, :, (seq_len - 1) % 16 + 1 :] = float("nan")
    case.check(TritonPlan)


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
    decode(case, num_splits).run(case.qkv, LAYER, out)
    torch.testing.assert_close(out, case.expected, rtol=1e-5, atol=1e-5)


def decode(case: Case, num_splits: int, min_tiles: int = 1) -> DecodeAttention:
    batch = case.batch
    return DecodeAttention(
        batch.seq_lens_tensor, batch.block_tables, case.pool, len(batch.q_lens), case.num_heads, num_splits, min_tiles
    )


def test_short_sequences_stay_with_one_program(device: torch.device) -> None:
    """Poisoned partial results: those of sequences up to `min_tiles` go unread, and the others' are all written."""
    shape = (6, 2, 64)
    tile = choose_block_n(64, 4)
    lengths = [9 * tile, 3 * tile + 1, 3 * tile, tile, 1]
    case = Case([(1, length - 1) for length in lengths], shape, torch.float32, device)
    planned = decode(case, 8, min_tiles=3)
    planned._partial.fill_(float("nan"))
    out = torch.empty_like(case.expected)
    planned.run(case.qkv, LAYER, out)
    torch.testing.assert_close(out, case.expected, rtol=1e-5, atol=1e-5)
    written = (~planned._partial.isnan()).all(-1).sum(-1)[:, 0]
    assert written.tolist() == [3, 2, 0, 0, 0]


@pytest.mark.parametrize("num_splits", [1, 4])
def test_a_launch_serves_other_lengths_and_padding_rows(num_splits: int, device: torch.device) -> None:
    """What a CUDA graph's replay does: the lengths on the device change after the plan was made."""
    case = Case([(1, 99), (1, 49), (1, 5), (1, 0)], (6, 2, 32), torch.float32, device)
    planned = decode(case, num_splits)
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
    decode(case, num_splits).run(case.qkv, LAYER, out)
    torch.testing.assert_close(out, case.expected, rtol=1e-5, atol=1e-5)


def test_padding_rows_give_zeros(plan: type[TorchPlan] | type[TritonPlan], device: torch.device) -> None:
    case = Case([(1, 40), (1, 7), (1, 3)], (4, 2, 16), torch.float32, device)
    seq_lens = [41, 0, 0]
    tensor = torch.tensor(seq_lens, device=device)
    batch = PagedBatch([1, 1, 1], seq_lens, case.batch.q_starts, tensor, case.batch.block_tables)
    out = plan(batch, case.pool, case.num_heads).run(case.qkv, LAYER)
    assert not out[1:].any()
    torch.testing.assert_close(out[0], case.expected[0], rtol=1e-5, atol=1e-5)


def test_decode_of_a_batch_reads_only_its_tensors(device: torch.device) -> None:
    """A captured graph's plan knows no lengths, so none may steer the launch."""
    case = Case(DECODES, (4, 2, 16), torch.float32, device)
    batch = case.batch
    blind = PagedBatch(batch.q_lens, [], batch.q_starts, batch.seq_lens_tensor, batch.block_tables)
    out = TritonPlan(blind, case.pool, case.num_heads).run(case.qkv, LAYER)
    torch.testing.assert_close(out, case.expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_shares", "num_splits"), [(1, 64), (8, 64), (128, 16), (512, 8), (100_000, 8)])
def test_splits_fill_the_gpu_and_not_more(num_shares: int, num_splits: int) -> None:
    assert choose_num_splits(num_shares, 132) == num_splits


@pytest.mark.parametrize(
    "seqs",
    [[(9, 0)], [(1, 20), (1, 3), (9, 0), (5, 7), (17, 0), (2, 0), (6, 1)], [(4, 4), (3, 0)], [(9, 0), (7, 0)]],
    ids=["alone", "between others", "last", "two"],
)
def test_fresh_prompts_take_the_fused_kernels(
    seqs: list[tuple[int, int]], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need no cache: poison in its place goes unread."""
    case = Case(seqs, (6, 2, 32), torch.float16, device)
    monkeypatch.setattr(fresh_prefill, "is_supported", lambda pool: True)
    for row, (q_len, cached) in enumerate(seqs):
        if q_len > 1 and not cached:
            case.pool[case.batch.block_tables[row, : math.ceil(q_len / 16)]] = float("nan")
    case.check(TritonPlan)


@pytest.mark.parametrize(("num_tokens", "padded"), [(2048, 2048), (2049, 2304), (4095, 4096), (4097, 4608)])
def test_long_prompts_are_padded_to_few_lengths(num_tokens: int, padded: int) -> None:
    assert fresh_prefill.padded_tokens(num_tokens) == padded


def test_padding_a_prompt_changes_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh_prefill, "_LONG_TOKENS", 16)
    monkeypatch.setattr(fresh_prefill, "is_supported", lambda pool: True)
    Case([(37, 0), (15, 0)], (6, 2, 32), torch.float16, device).check(TritonPlan)


def test_float32_and_odd_heads_never_take_the_fused_kernels() -> None:
    if torch.cuda.is_available():
        assert fresh_prefill.is_supported(torch.empty(1, 1, 2, 1, 16, 128, dtype=torch.bfloat16, device="cuda"))
        assert not fresh_prefill.is_supported(torch.empty(1, 1, 2, 1, 16, 128, device="cuda"))
        assert not fresh_prefill.is_supported(torch.empty(1, 1, 2, 1, 16, 20, dtype=torch.float16, device="cuda"))
    assert not fresh_prefill.is_supported(torch.empty(1, 1, 2, 1, 16, 128, dtype=torch.bfloat16))
