"""A cache of several groups: each has a pool and a block table of its own, and brings only what it remembers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from context_worker.exporter import Exporter
from generation_worker.handoffs import _can_be_read
from generation_worker.importer import Importer
from kv_transfer.layout import GroupLayout, KvLayout, KvPoolView, Span
from kv_transfer.pieces import Piece
from kv_transfer.routes import agree, held_by, routes
from kv_transfer.staging import largest_block, size_for
from kv_transfer.wire import Offer
from pd_kernels.kv_pack import pool_with_margins
from pdserve.errors import LayoutMismatch
from pdserve.handoff import ExportDone, ExportFailed, ImportDone, ImportFailed, ImportOffered
from pdserve.protocol import Key
from tests.transfer.harness import POISON, MakeNode, Node, accept_into, nodes, rows
from tests.transfer.networks import SIMPLE

make_node = pytest.fixture(nodes, params=[SIMPLE, f"{SIMPLE}, direct"])
staged = pytest.fixture(nodes, params=[SIMPLE])

KEY, WINDOW, TOKENS = Key("r", 0), 9, 22
FULL = GroupLayout(
    num_layers=2, kv_factor=2, num_kv_heads=2, tokens_per_block=4, head_dim=5, dtype="float16", layer_ids=(1, 4)
)
NARROW = GroupLayout(
    num_layers=3, kv_factor=2, num_kv_heads=2, tokens_per_block=2, head_dim=3, dtype="float32", layer_ids=(0, 2, 3),
    kind="window", window=WINDOW,
)  # fmt: skip
STATE = GroupLayout(
    num_layers=1, kv_factor=1, num_kv_heads=2, tokens_per_block=1, head_dim=7, dtype="float32", layer_ids=(5,),
    kind="state",
)  # fmt: skip
BLOCKS = {"full": 12, "window": 9, "state": 3}
"""Of each group's pool. The window's would not hold all tokens."""

SOURCE = ((5, 3, 8, 1, 0, 9), (-1, -1, -1, -1, -1, -1, -1, 4, 2, 7, 0), (2,))
TARGET = ((2, 4, 6, 8, 10, 11), (-1, -1, -1, -1, -1, -1, -1, 8, 6, 1, 3), (0,))
"""Token 22 looks back at 8 others, from 14 on, which is block 7 of the window's."""


def cache(*groups: GroupLayout) -> KvLayout:
    return KvLayout(model="two kinds", groups=groups)


def pools(of: KvLayout, seed: int | None) -> list[torch.Tensor]:
    found = []
    for number, group in enumerate(of.groups):
        tensor = pool_with_margins((BLOCKS[group.kind], *group.block_shape), getattr(torch, group.dtype))
        raw = tensor.view(torch.uint8)
        if seed is None:
            raw.fill_(POISON)
        else:
            raw.random_(0, 100, generator=torch.Generator().manual_seed(seed + number))
        found.append(tensor)
    return found


class Ends:
    """A worker of these groups at either end; the receiver accepts at once."""

    def __init__(self, make: MakeNode, sends: KvLayout, receives: KvLayout, cached: int = 0, **options: Any) -> None:
        self.num_groups = len(sends.groups)
        self.source, self.target = pools(sends, seed=1), pools(receives, seed=None)
        self.cached = cached
        self.gen = make(
            self.target[0], "generation-0", of=receives, pools=self.target, role="generation", on_offer=self._accept,
            **options,
        )  # fmt: skip
        self.ctx = make(self.source[0], "context-0", of=sends, pools=self.source, role="context", **options)
        self.exporter = Exporter(self.ctx.transceiver)

    def offer(self, tables: Sequence[Sequence[int]] = SOURCE) -> None:
        self.exporter.offer(KEY, self.gen.address, TOKENS, tables[: self.num_groups])

    def finish(self) -> None:
        self.exporter.finish(KEY, 7)
        assert self.gen.wait(ImportDone, KEY).first_token == 7
        self.ctx.wait(ExportDone, KEY)

    def assert_arrived(self) -> None:
        """What is needed came bit for bit, and nothing else was touched."""
        self.gen.assert_staging_free()
        for number, (source, target) in enumerate(zip(self.source, self.target, strict=True)):
            width = self.gen.transceiver.layout.groups[number].tokens_per_block
            pairs = list(zip(SOURCE[number], TARGET[number], strict=True))
            cached = 0 if number == 2 else self.cached // width
            sent = [(theirs, ours) for theirs, ours in pairs[cached:] if theirs >= 0]
            assert torch.equal(rows(target, [ours for _, ours in sent]), rows(source, [theirs for theirs, _ in sent]))
            others = [block for block in range(target.shape[0]) if block not in [ours for _, ours in sent]]
            assert bool((rows(target, others) == POISON).all())

    def _accept(self, node: Node, event: ImportOffered) -> None:
        Importer(node.transceiver).accept(event.key, TARGET[: self.num_groups], self.cached)


@pytest.mark.parametrize("cached", [0, 8, 20])
@pytest.mark.parametrize("groups", [(FULL, NARROW), (FULL, NARROW, STATE)], ids=["two", "three"])
def test_each_group_brings_what_it_remembers(make_node: MakeNode, groups: tuple[GroupLayout, ...], cached: int) -> None:
    """A window needs its last blocks and a state its one, however many tokens there are and are cached."""
    ends = Ends(make_node, cache(*groups), cache(*groups), cached)
    ends.offer()
    ends.finish()
    ends.assert_arrived()
    transport = ends.gen.transceiver.counts()[0].transport
    assert (transport == "in_place") == ends.gen.direct_reads
    expected = 0
    for number, (group, pool) in enumerate(zip(groups, ends.source, strict=True)):
        skipped = 0 if group.kind == "state" else cached // group.tokens_per_block
        expected += sum(block >= 0 for block in SOURCE[number][skipped:]) * pool[0].nbytes
    assert ends.gen.transceiver.counts()[0].bytes == expected


def test_groups_leave_as_their_layers_are_computed(make_node: MakeNode) -> None:
    """Of the model's layers the first is the window's, then come one of each, then the rest with the state."""
    groups = FULL, NARROW, STATE
    ends = Ends(make_node, cache(*groups), cache(*groups))
    ends.offer()
    layer = {group.kind: pool[0, 0].nbytes for group, pool in zip(groups, ends.source, strict=True)}
    full_blocks, narrow_blocks = 6, 4
    came = 0
    for num_layers, more in (
        (1, narrow_blocks * layer["window"]),
        (3, full_blocks * layer["full"] + narrow_blocks * layer["window"]),
        (6, full_blocks * layer["full"] + narrow_blocks * layer["window"] + layer["state"]),
    ):
        came += more
        ends.exporter.computed(KEY, TOKENS, num_layers)
        gen = ends.gen
        gen.wait_until(lambda: sum(each.bytes for each in gen.transceiver.counts()) == came, f"{num_layers} layers")  # noqa: B023
    ends.finish()
    ends.assert_arrived()


def test_a_window_that_is_cut_and_typed_differently_starts_at_its_first_token(staged: MakeNode) -> None:
    other = msgspec.structs.replace(NARROW, tokens_per_block=8, dtype="float16")
    ends = Ends(staged, cache(NARROW), cache(other))
    source = ends.source[0]
    source.copy_(torch.randint(-50, 50, source.shape).to(source.dtype))
    target = [1, 5, 7]
    ends.gen._on_offer = lambda node, event: Importer(node.transceiver).accept(KEY, ((-1, *target[1:]),), 0)
    ends.exporter.offer(KEY, ends.gen.address, TOKENS, (SOURCE[1],))
    ends.finish()
    for token in range(24):
        ours = ends.target[0][target[token // 8], :, :, :, token % 8]
        if TOKENS - WINDOW < token < TOKENS:
            assert torch.equal(ours, source[SOURCE[1][token // 2], :, :, :, token % 2].half())
        else:
            assert bool((ours.contiguous().view(torch.uint8) == POISON).all())


@pytest.mark.parametrize(
    ("others", "field"),
    [
        ((FULL,), "groups"),
        ((FULL, msgspec.structs.replace(NARROW, window=6)), "window"),
        ((FULL, msgspec.structs.replace(NARROW, kind="full", window=0)), "kind"),
        ((FULL, msgspec.structs.replace(NARROW, layer_ids=(0, 2, 4))), "layer_ids"),
        ((NARROW, FULL), "kind"),
    ],
)
def test_groups_that_differ_are_refused_by_the_field(
    staged: MakeNode, others: tuple[GroupLayout, ...], field: str
) -> None:
    ends = Ends(staged, cache(FULL, NARROW), cache(*others))
    ends.offer()
    error = ends.ctx.wait(ExportFailed, KEY).error
    assert (error.reason, error.param) == ("layout", field)
    assert not ends.gen.events


@pytest.mark.parametrize(
    "tables",
    [
        (SOURCE[0], (-1,) * 8 + SOURCE[1][8:]),
        (SOURCE[0], (-2, *SOURCE[1][1:])),
        (SOURCE[0], (1 << 62, *SOURCE[1][1:])),
        (SOURCE[0], (*SOURCE[1][:10], 9)),
        (SOURCE[0], (*SOURCE[1][:10], 4)),
        (SOURCE[0], SOURCE[1][:10]),
        ((5, 3, 8, 1, 0, -1), SOURCE[1]),
    ],
    ids=[
        "a hole in the window",
        "no block",
        "a huge one before the window",
        "beyond the pool",
        "a block twice",
        "too few",
        "a hole in the rest",
    ],
)
def test_a_table_that_does_not_name_what_is_needed_is_not_read(tables: tuple[tuple[int, ...], ...]) -> None:
    layout = cache(FULL, NARROW)
    groups = {index: SimpleNamespace(num_blocks=BLOCKS[group.kind]) for index, group in enumerate(layout.groups)}
    source: Any = SimpleNamespace(groups=groups)
    assert _can_be_read(Offer(1, KEY, TOKENS, SOURCE[:2]), source, layout)
    assert not _can_be_read(Offer(1, KEY, TOKENS, tables), source, layout)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"kind": "window"}, "no window"),
        ({"window": 4}, "a window of a full group"),
        ({"kind": "state"}, "a state in blocks of four"),
        ({"layer_ids": (4, 1)}, "layers out of order"),
        ({"layer_ids": (1, 4, 5)}, "more layers than there are"),
    ],
)
def test_a_group_makes_sense(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError):
        msgspec.structs.replace(FULL, **fields)


@given(cuts=st.tuples(st.integers(1, 5), st.integers(1, 5)), heads=st.tuples(st.booleans(), st.booleans()))
def test_stages_and_ranks_exchange_each_layer_and_head_of_each_group_once(
    cuts: tuple[int, int], heads: tuple[bool, bool]
) -> None:
    """Also where a stage holds no layer of a group."""

    def ranks(cut: int, halved: bool) -> list[KvLayout]:
        found = []
        for stage in (Span(0, cut), Span(cut, 6)):
            for kv_heads in (Span(0, 1), Span(1, 2)) if halved else (Span(0, 2),):
                groups = [
                    msgspec.structs.replace(group, layers=held if held.size else Span(0, 0), kv_heads=kv_heads)
                    for group in (FULL, NARROW, STATE)
                    for held in (group.within(stage),)
                ]
                found.append(cache(*groups))
        return found

    senders, receivers = ranks(cuts[0], heads[0]), ranks(cuts[1], heads[1])
    found = routes(senders, receivers)
    for number, receiver in enumerate(receivers):
        got = Counter(
            (group, layer, head)
            for route in found
            if route.receiver == number
            for group, share in enumerate(route.shares)
            for layer in range(*share.layers)
            for head in range(*share.kv_heads)
        )
        wanted = {
            (group, layer, head)
            for group, share in enumerate(held_by(receiver))
            for layer in range(*share.layers)
            for head in range(*share.kv_heads)
        }
        assert set(got) == wanted
        assert set(got.values()) <= {1}
    for route in found:
        terms = agree(
            receivers[route.receiver], senders[route.sender], receivers[route.receiver], route.shares, 1 << 20
        )
        assert [each.piece.group for each in terms.wanted(TOKENS, 0)] == [
            group for group, share in enumerate(route.shares) if share.pairs
        ]
    with pytest.raises(LayoutMismatch):
        routes(senders, [msgspec.structs.replace(receivers[0], groups=receivers[0].groups[:2])])


def test_staging_holds_as_many_tokens_of_all_groups_and_a_block_of_the_largest() -> None:
    of = cache(FULL, NARROW, STATE)
    view = KvPoolView(pools(of, seed=None), of)
    size, block_bytes = size_for(view, 64), largest_block(view)
    assert block_bytes % 16 == 0
    assert block_bytes >= max(group.block_bytes for group in view.groups)
    all_bytes = sum(64 // group.layout.tokens_per_block * group.block_bytes for group in view.groups)
    assert (
        all_bytes - block_bytes * size.buffer_blocks < size.num_buffers * size.buffer_blocks * block_bytes <= all_bytes
    )


def test_a_piece_of_a_group_that_is_not_there_is_refused(staged: MakeNode) -> None:
    ends = Ends(staged, cache(FULL), cache(FULL))
    ends.offer()
    ends.gen.wait(ImportOffered, KEY)
    share = next(iter(ends.gen.transceiver._halves.imports._imports.values()))._shares[0]  # type: ignore[attr-defined]
    for number in (1, -1, 1 << 40):
        assert not share._claim(Piece(Span(0, 2), Span(0, 4), number))
    ends.finish()


def test_one_process_holds_both_halves(make_node: MakeNode) -> None:
    """And sends to, and receives from, another of its kind at the same time."""
    tensors = [
        pool.view(BLOCKS["full"], *FULL.block_shape) for pool in (*pools(cache(FULL), 1), *pools(cache(FULL), 2))
    ]
    both = [
        make_node(tensor, f"both-{number}", of=cache(FULL), on_offer=accept_into(lambda key: [10, 11]))
        for number, tensor in enumerate(tensors)
    ]
    keys = [Key("there", 0), Key("back", 0)]
    for key, here, there in zip(keys, both, reversed(both), strict=True):
        here.exporter.offer(key, there.address, 8, [0, 1])
        here.exporter.finish(key, 3)
    for key, here, there in zip(keys, both, reversed(both), strict=True):
        there.wait(ImportDone, key)
        here.wait(ExportDone, key)
        assert torch.equal(rows(there.tensor, [10, 11]), rows(here.tensor, [0, 1]))


@pytest.mark.parametrize("hole", [7, 10], ids=["first block of the window", "last block"])
def test_blocks_of_the_window_must_be_named(make_node: MakeNode, hole: int) -> None:
    """By the receiver's engine; what is before the window nobody looks at."""
    ends = Ends(make_node, cache(FULL, NARROW), cache(FULL, NARROW))
    table = [block if index != hole else -1 for index, block in enumerate(TARGET[1])]
    ends.gen._on_offer = lambda node, event: Importer(node.transceiver).accept(KEY, (TARGET[0], table), 0)
    ends.offer()
    assert ends.gen.wait(ImportFailed, KEY).error.reason == "protocol"
    assert ends.ctx.wait(ExportFailed, KEY).error.reason == "protocol"
    assert all(bool((rows(pool, range(pool.shape[0])) == POISON).all()) for pool in ends.target)
