"""Two pools are joined where their models agree; the error names the field that doesn't."""

from __future__ import annotations

import msgspec
import pytest
import torch

from kv_transfer.layout import CONVERTIBLE, SAME, GroupLayout, KvLayout, KvPoolView, Span, split
from kv_transfer.routes import Share
from kv_transfer.wire import WIRE_VERSION, Offer, OpenLink, decode, encode
from pdserve.errors import TransferError
from pdserve.protocol import Key
from tests.transfer.harness import layout, only, pool_tensor

CHANGES = {
    "model": "another",
    "num_layers": 4,
    "kv_factor": 1,
    "num_kv_heads": 3,
    "tokens_per_block": 8,
    "head_dim": 6,
    "dtype": "bfloat16",
    "layers": Span(1, 3),
    "kv_heads": Span(0, 1),
    "weights": "1-another",
    "kind": "latent",
    "layer_ids": (0, 2, 5),
}
WINDOW = {"kind": "window", "window": 8}


def test_every_field_is_covered() -> None:
    covered = {*CHANGES, *WINDOW, "groups"}
    assert covered == {*KvLayout.__struct_fields__, *GroupLayout.__struct_fields__}


@pytest.mark.parametrize("field", CHANGES)
def test_a_difference_in_the_model_is_named_and_any_changes_the_hash(field: str) -> None:
    ours, theirs = layout(weights="1-ours"), layout(**{"weights": "1-ours", field: CHANGES[field]})
    assert ours.hash() != theirs.hash()
    mismatch = ours.compare(theirs)
    if field in (*SAME, "model", "weights"):
        assert mismatch is not None
        assert mismatch.param == field
        assert mismatch.reason == "layout"
    else:
        assert mismatch is None


@pytest.mark.parametrize(("ours", "theirs"), [("", "1-a"), ("1-a", ""), ("1-a", "2-b"), ("1-a", "1-a")])
def test_weights_that_can_not_be_compared_are_no_difference(ours: str, theirs: str) -> None:
    assert layout(weights=ours).compare(layout(weights=theirs)) is None


def test_types_fit_if_they_are_equal_or_can_be_converted() -> None:
    assert layout(dtype="int16").compare(layout(dtype="int16")) is None
    for ours in sorted(CONVERTIBLE):
        assert all(layout(dtype=ours).compare(layout(dtype=theirs)) is None for theirs in CONVERTIBLE)
        for pair in ((layout(dtype=ours), layout(dtype="int16")), (layout(dtype="int16"), layout(dtype=ours))):
            mismatch = pair[0].compare(pair[1])
            assert mismatch is not None
            assert mismatch.param == "dtype"


def test_a_rank_that_names_no_share_holds_everything() -> None:
    assert layout() == layout(layers=Span(0, 3), kv_heads=Span(0, 2))
    assert only(layout(layers=Span(1, 2))).block_shape == (1, 2, 2, 4, 5)


@pytest.mark.parametrize("changes", [{"layers": Span(2, 4)}, {"kv_heads": Span(1, 1)}, {"head_dim": 0}])
def test_a_share_outside_the_model_is_refused_here_and_on_the_wire(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        layout(**changes)
    fields = msgspec.to_builtins(layout())
    fields["groups"] = [fields["groups"][0] | changes]
    opening = OpenLink("w", "i", layout(), (Share(Span(0, 1), Span(0, 1)),), 100)
    raw = msgspec.msgpack.decode(encode(opening)[1:])
    raw[3] = fields
    with pytest.raises(TransferError) as caught:
        decode(bytes((WIRE_VERSION,)) + msgspec.msgpack.encode(raw))
    assert caught.value.reason == "protocol"


@pytest.mark.parametrize(
    ("count", "parts", "expected"),
    [
        (8, 3, [(0, 3), (3, 6), (6, 8)]),
        (3, 2, [(0, 2), (2, 3)]),
        (2, 3, [(0, 1), (0, 1), (1, 2)]),
        (3, 8, [(0, 1), (0, 1), (0, 1), (1, 2), (1, 2), (1, 2), (2, 3), (2, 3)]),
        (1, 1, [(0, 1)]),
    ],
)
def test_split(count: int, parts: int, expected: list[tuple[int, int]]) -> None:
    assert [split(count, parts, index) for index in range(parts)] == expected


@pytest.mark.parametrize(
    "tensor", [pool_tensor(2, 0, layout(head_dim=6)), pool_tensor(2, 0).float(), pool_tensor(2, 0).transpose(0, 1)]
)
def test_a_pool_must_be_what_its_layout_says(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError):
        KvPoolView((tensor,), layout())


def test_frames_carry_the_version_and_refuse_another() -> None:
    offer = Offer(3, Key("r", 1), 17)
    frame = encode(offer)
    assert decode(frame) == offer
    for bad in (b"", bytes((WIRE_VERSION + 1,)) + frame[1:], frame[:-1], frame[:1] + b"\xc1junk", frame[:1] + b"\x93"):
        with pytest.raises(TransferError) as caught:
            decode(bad)
        assert caught.value.reason == "protocol"


def test_a_checksum_catches_every_wrong_bit_of_a_frame() -> None:
    offer = Offer(3, Key("r", 1), 17)
    frame = encode(offer, checked=True)
    assert decode(frame) == offer
    for bit in range(8, 8 * len(frame)):
        wrong = bytearray(frame)
        wrong[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TransferError) as caught:
            decode(bytes(wrong))
        assert caught.value.reason == "checksum"
