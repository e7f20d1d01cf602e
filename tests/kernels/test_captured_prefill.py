"""Prefills as a CUDA graph has them: fixed sizes, spans that only the device knows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pd_kernels.paged_attention import PagedBatch, PrefillRoom
from pd_kernels.paged_attention.triton_kernel import TritonPlan
from tests.kernels.attention_case import DECODES, LAYER, PREFILLS, SHAPES, TOLERANCE, Case

# An empty tile divides nothing by nothing, and stores none of it.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide")

NUM_PREFILLS, MAX_TOKENS, MAX_CONTEXT = 5, 80, 384


def padded(values: Tensor, rows: int) -> Tensor:
    return torch.cat([values, values.new_full((rows - len(values), *values.shape[1:]), 0)])


def attend(case: Case, num_decodes: int) -> Tensor:
    """The case's attention, its prefills in a room with some to spare."""
    batch, prefills = case.batch, range(num_decodes, len(case.batch.q_lens))
    spans = [(int(batch.q_starts[seq]), batch.q_lens[seq], batch.seq_lens[seq] - batch.q_lens[seq]) for seq in prefills]
    device = case.qkv.device
    room = PrefillRoom(
        padded(torch.tensor(spans, dtype=torch.int64, device=device).view(-1, 3), NUM_PREFILLS),
        padded(batch.block_tables[num_decodes:], NUM_PREFILLS),
        MAX_TOKENS,
        MAX_CONTEXT,
    )
    ones, starts = [1] * num_decodes, torch.arange(num_decodes + 1, device=device)
    lengths, tables = batch.seq_lens_tensor[:num_decodes], batch.block_tables[:num_decodes]
    captured = PagedBatch(ones, ones, starts, lengths, tables, room)
    qkv = padded(case.qkv, num_decodes + MAX_TOKENS)
    out = TritonPlan(captured, case.pool, case.spec, qkv.dtype).run(qkv, LAYER)
    assert len(out) == len(qkv)
    return out[: len(case.qkv)]


@pytest.mark.parametrize(
    "prefills",
    [PREFILLS, [(80, 0)], [(1, 63), (64, 64)], [(2, 300)], [(16, 0), (16, 1), (16, 15), (16, 16), (1, 0)], []],
    ids=["several", "full", "whole tiles", "long", "every place", "none"],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefills_of_a_captured_step_are_attended_as_others(
    prefills: list[tuple[int, int]], shape: tuple[int, int, int], device: torch.device
) -> None:
    case = Case([*DECODES, *prefills], shape, torch.float32, device)
    out = attend(case, len(DECODES))
    torch.testing.assert_close(out, case.expected, rtol=TOLERANCE[out.dtype], atol=TOLERANCE[out.dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_types(dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter has no bfloat16")
    case = Case([*DECODES, (30, 70), (5, 0)], (6, 2, 80), dtype, device, tokens_per_block=32)
    out = attend(case, len(DECODES))
    torch.testing.assert_close(out, case.expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
