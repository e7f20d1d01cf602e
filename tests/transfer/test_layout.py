"""Two pools are joined only when every field agrees, and the error names the one that doesn't."""

from __future__ import annotations

import pytest
import torch

from kv_transfer.layout import KvLayout, KvPoolView
from kv_transfer.wire import WIRE_VERSION, Offer, decode, encode
from pdserve.errors import TransferError
from pdserve.protocol import Key
from tests.transfer.harness import layout, pool_tensor

CHANGES = {
    "model": "another",
    "num_layers": 4,
    "kv_factor": 1,
    "num_kv_heads": 1,
    "tokens_per_block": 8,
    "head_dim": 6,
    "dtype": "bfloat16",
    "tp_size": 2,
    "tp_rank": 1,
    "pp_size": 2,
    "pp_rank": 1,
}


def test_every_field_is_covered() -> None:
    assert set(CHANGES) == set(KvLayout.__struct_fields__)


@pytest.mark.parametrize("field", CHANGES)
def test_a_difference_is_named_and_changes_the_hash(field: str) -> None:
    ours, theirs = layout(), layout(**{field: CHANGES[field]})
    mismatch = ours.compare(theirs)
    assert mismatch is not None
    assert mismatch.param == field
    assert mismatch.reason == "layout"
    assert ours.hash() != theirs.hash()


def test_equal_layouts_fit() -> None:
    assert layout().compare(layout()) is None
    assert layout().hash() == layout().hash()


@pytest.mark.parametrize(
    "tensor", [pool_tensor(2, 0, layout(head_dim=6)), pool_tensor(2, 0).float(), pool_tensor(2, 0).transpose(0, 1)]
)
def test_a_pool_must_be_what_its_layout_says(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError):
        KvPoolView(tensor, layout())


def test_frames_carry_the_version_and_refuse_another() -> None:
    offer = Offer(3, Key("r", 1), 17)
    frame = encode(offer)
    assert decode(frame) == offer
    for bad in (b"", bytes((WIRE_VERSION + 1,)) + frame[1:], frame[:-1], frame[:1] + b"\xc1junk", frame[:1] + b"\x93"):
        with pytest.raises(TransferError) as caught:
            decode(bad)
        assert caught.value.reason == "protocol"
