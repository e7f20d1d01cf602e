"""Prefills on a GPU: which kernel attends to what, and that the parts add up. cuDNN is stood in for on a CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from pd_kernels.paged_attention import AttentionSpec, cudnn, decode_kernel, prefill, prepare, workspace_bytes
from pd_kernels.paged_attention.decode_kernel import DecodeAttention
from pd_kernels.paged_attention.layout import Partial
from pd_kernels.paged_attention.triton_kernel import TritonPlan
from tests.kernels.attention_case import DECODES, PREFILLS, Case

SHAPE = (6, 2, 32)


def dense_attention(qkv: Tensor, kv: Tensor, spec: AttentionSpec, is_causal: bool) -> Partial:
    """What `cudnn.attend` promises."""
    q = qkv[:, : spec.out_width].view(-1, spec.num_heads, spec.qk_dim).transpose(0, 1).double()
    keys, values = kv.reshape(kv.shape[0], 2, spec.num_kv_heads, spec.qk_dim).double().unbind(1)
    keys, values = (x.transpose(0, 1).repeat_interleave(spec.group, 0) for x in (keys, values))
    scores = q @ keys.transpose(1, 2) / math.sqrt(spec.qk_dim)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    out = (scores.softmax(-1) @ values).transpose(0, 1).to(qkv.dtype).contiguous()
    return Partial(out, scores.logsumexp(-1).float())


@dataclass
class StandIn:
    """cuDNN with small steps: what it was called for, (tokens, keys, causal)."""

    calls: list[tuple[int, int, bool]] = field(default_factory=list)

    def attend(self, qkv: Tensor, kv: Tensor, spec: AttentionSpec, is_causal: bool) -> Partial:
        self.calls.append((qkv.shape[0], kv.shape[0], is_causal))
        return dense_attention(qkv, kv, spec, is_causal)


@pytest.fixture
def small_cudnn(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(cudnn, "declines", lambda *_: None)
    monkeypatch.setattr(cudnn, "ROW_STEP", 16)
    monkeypatch.setattr(cudnn, "KEY_STEP", 64)
    monkeypatch.setattr(cudnn, "_MIN_FRESH_TOKENS", 32)
    monkeypatch.setattr(cudnn, "attend", stand_in.attend)
    return stand_in


@pytest.mark.parametrize(
    ("seqs", "calls"),
    [
        ([(48, 0)], [(48, 48, True)]),
        ([(31, 0)], []),
        ([(40, 0), (35, 0), (5, 0)], [(32, 32, True), (32, 32, True)]),
        ([(16, 64)], [(16, 16, True), (16, 64, False)]),
        ([(50, 200)], [(48, 48, True), (32, 192, False), (16, 192, False)]),
        ([(15, 200), (40, 63)], []),
        ([*DECODES, (70, 0), (3, 9), (33, 130), *PREFILLS],
         [(64, 64, True), (32, 32, True), (32, 128, False)]),
    ],
    ids=["square", "short", "fresh", "aligned", "pieces", "too little", "step"],
)  # fmt: skip
def test_cudnn_takes_what_it_can_and_triton_the_rest(
    seqs: list[tuple[int, int]], calls: list[tuple[int, int, bool]], small_cudnn: StandIn, device: torch.device
) -> None:
    Case(seqs, SHAPE, torch.float16, device).check(TritonPlan)
    assert small_cudnn.calls == calls


def test_weights_of_parts_may_differ_by_any_factor(small_cudnn: StandIn, device: torch.device) -> None:
    """Scores of hundreds: one part is all of the result for some rows, none for others, and nothing overflows."""
    case = Case([(16, 70)], SHAPE, torch.float32, device)
    case.qkv *= 20
    case.pool *= 20
    case.expected = case._attend(case.batch.block_tables[0], 0, 16, 86).float()
    out = case.run(TritonPlan)
    # In float32 such scores are off by 1e-4, and so are the weights, relatively; values reach 60.
    torch.testing.assert_close(out, case.expected, rtol=1e-4, atol=6e-3)
    assert small_cudnn.calls


def test_shapes_are_few(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """`prepare` sees every shape that any step up to its size needs."""
    prepared, spec = StandIn(), AttentionSpec.plain(1, 1, 8)
    monkeypatch.setattr(cudnn, "attend", prepared.attend)
    monkeypatch.setattr(cudnn, "ROW_STEP", 4)
    monkeypatch.setattr(cudnn, "KEY_STEP", 16)
    cudnn.prepare(torch.zeros(300, 16), spec, max_tokens=23)
    shapes = set(prepared.calls)
    # Squares are prepared twice: for a prompt's own keys, and for gathered ones.
    assert len(prepared.calls) == len(shapes) + 5
    for num_tokens in range(1, 24):
        for num_cached in range(300):
            rows, keys = cudnn.part_over_cache(num_tokens, num_cached)
            if rows:
                assert rows <= num_tokens
                assert keys <= num_cached
                assert num_cached - keys < max(16, num_cached / 4)
                assert (rows, rows, True) in shapes
                assert all((stop - start, keys, False) in shapes for start, stop in cudnn.pieces(rows))


@pytest.mark.parametrize(("num_rows", "spans"), [(1024, [(0, 1024)]), (7168, [(0, 4096), (4096, 6144), (6144, 7168)])])
def test_rows_over_the_cache_come_in_powers_of_two(num_rows: int, spans: list[tuple[int, int]]) -> None:
    assert cudnn.pieces(num_rows) == spans


def test_a_step_of_one_square_is_not_copied(small_cudnn: StandIn, device: torch.device) -> None:
    case = Case([(32, 0)], SHAPE, torch.float16, device)
    plan = TritonPlan(case.batch, case.pool, case.spec, torch.float16)
    assert plan._prefills is not None
    assert plan._prefills.run_alone(case.qkv) is not None
    both = Case([(32, 0), (2, 0)], SHAPE, torch.float16, device)
    plan = TritonPlan(both.batch, both.pool, both.spec, torch.float16)
    assert plan._prefills is not None
    assert plan._prefills.run_alone(both.qkv) is None


@pytest.mark.parametrize("head_dim", [32, 5], ids=["copyable", "odd"])
def test_fresh_prompts_need_no_cache(head_dim: int, device: torch.device) -> None:
    """Poison in its place goes unread, unless heads are so odd that keys must be laid out anew."""
    seqs = [(1, 20), (1, 3), (9, 0), (5, 7), (17, 0), (2, 0), (6, 1)]
    case = Case(seqs, (6, 2, head_dim), torch.float16, device)
    for row, (q_len, cached) in enumerate(seqs):
        if head_dim == 32 and q_len > 1 and not cached:
            case.pool[case.batch.block_tables[row, : math.ceil(q_len / 16)]] = float("nan")
    case.check(TritonPlan)


@pytest.mark.parametrize("head_dim", [1, 5, 12, 33, 96, 130])
def test_odd_head_sizes(head_dim: int, device: torch.device) -> None:
    Case([(1, 9), *PREFILLS], (4, 2, head_dim), torch.float32, device).check(TritonPlan)


@pytest.mark.parametrize("group", [1, 2, 3, 7, 8, 16, 65])
def test_any_number_of_heads_may_share_a_key_head(group: int, device: torch.device) -> None:
    Case([(1, 70), (70, 3), (5, 0)], (group * 2, 2, 16), torch.float32, device).check(TritonPlan)


def test_a_nan_stays_in_its_sequence(device: torch.device) -> None:
    """A sequence's last tile of keys reaches into the next sequence's rows."""
    for seqs in ([(9, 0), (5, 0), (7, 0)], [(9, 3), (5, 2), (7, 1)]):
        case = Case(seqs, SHAPE, torch.float32, device)
        case.qkv[9:14] = float("nan")
        case.pool[case.batch.block_tables[1, 0]] = float("nan")
        out = case.run(TritonPlan)
        torch.testing.assert_close(out[:9], case.expected[:9], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out[14:], case.expected[14:], rtol=1e-5, atol=1e-5)
        assert out[9:14].isnan().all()


def test_many_long_sequences_are_laid_out_in_turns(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(prefill, "MAX_GATHERED_TOKENS", 192)
    case = Case([(4, 200), (5, 60), (6, 100), (3, 2), (2, 30)], SHAPE, torch.float32, device)
    plan = TritonPlan(case.batch, case.pool, case.spec, torch.float32)
    assert plan._prefills is not None
    assert [group.num_rows for group in plan._prefills._cached] == [256, 128, 192, 64]
    case.check(TritonPlan)


def test_workspace_is_what_a_step_allocates_at_most() -> None:
    spec, cpu = AttentionSpec.plain(8, 2, 32), torch.device("cpu")
    prefill_bytes = 2 * (100 * 300 * 128 + 2 * 100 * 8 * (32 + 2))
    assert prefill.workspace_bytes(spec, torch.float16, 100, 300) == prefill_bytes
    longest = prefill.MAX_GATHERED_TOKENS * 2
    assert prefill.workspace_bytes(spec, torch.float16, 1, longest) > longest * 128 * 2
    limits = {"max_tokens": 100, "max_seqs": 9, "max_seq_len": 300}
    decode_bytes = decode_kernel.workspace_bytes(spec, cpu, 9)
    assert workspace_bytes(spec, "triton", torch.float16, cpu, **limits) == prefill_bytes + decode_bytes
    assert workspace_bytes(spec, "torch", torch.float16, cpu, **limits) == 0


@pytest.mark.parametrize("num_seqs", [1, 3, 9])
def test_decodes_allocate_no_more_than_their_workspace(num_seqs: int, device: torch.device) -> None:
    case = Case([(1, 20)] * num_seqs, SHAPE, torch.float32, device)
    planned = DecodeAttention(case.batch.seq_lens_tensor, case.batch.block_tables, case.pool, num_seqs, case.spec)
    taken_bytes = 4 * (planned._partial.numel() + planned._lse.numel())
    assert 0 < taken_bytes <= decode_kernel.workspace_bytes(case.spec, device, 9)


def test_preparing_runs_what_a_step_may_need(small_cudnn: StandIn, device: torch.device) -> None:
    """Also over a pool that is too small for the larger steps, and one of 8 bits."""
    for num_blocks, dtype in ((9, torch.float16), (1, torch.float16), (12, torch.float8_e4m3fn)):
        small_cudnn.calls.clear()
        pool = torch.zeros(num_blocks, 2, 2, 2, 16, 32, device=device).to(dtype)
        prepare(pool, AttentionSpec.plain(6, 2, 32), 50, "triton", torch.float16)
        rows_over_cache = {rows for rows, _, is_causal in small_cudnn.calls if not is_causal}
        assert rows_over_cache == ({16, 32} if num_blocks > 4 else set())
        assert max(keys for _, keys, _ in small_cudnn.calls) <= max(48, num_blocks * 16)
