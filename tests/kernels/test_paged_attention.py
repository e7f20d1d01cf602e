"""Paged attention, torch and Triton, against dense attention in double precision, one sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch

from pd_kernels.paged_attention import PagedBatch
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
