"""What a layer declares is what a rank takes of a checkpoint, and who owns it in the end."""

from __future__ import annotations

import weakref

import pytest
import torch

from pdserve.engine.layers.builder import Builder
from pdserve.engine.layers.linear import FusedLinear, Outputs, SummedLinear
from pdserve.engine.layers.weight import Cut, Share, Weight
from pdserve.engine.models import weights
from pdserve.engine.parallel.mapping import Mapping
from tests.unit.test_parallel_weights import Alone

CPU = torch.device("cpu")
STORED = torch.arange(24.0).view(4, 6)


def taken(cut: Cut | None, **how: object) -> list[list[float]]:
    return Share(Weight("w", (4, 6), cut, **how), None).take(STORED).tolist()


def test_a_part_is_cut_where_the_checkpoint_has_it() -> None:
    assert taken(None) == STORED.tolist()
    assert taken(Cut(0, (range(1, 3),))) == STORED[1:3].tolist()
    assert taken(Cut(1, (range(1), range(2, 4)))) == STORED[:, [0, 2, 3]].tolist()
    assert taken(Cut(1, (range(1), range(2, 4))), convert=torch.t) == STORED[:, [0, 2, 3]].T.tolist()


def test_neighbouring_parts_are_read_at_once() -> None:
    share = Share(Weight("w", (4, 6), Cut(1, (range(2), range(2, 4), range(5, 6)))), None)
    assert share.indices == [(slice(None), slice(0, 4)), (slice(None), slice(5, 6))]


@pytest.mark.parametrize(
    ("weight", "is_whole"),
    [
        (Weight("w", (4, 6)), True),
        (Weight("w", (4, 6), Cut(0, (range(4),))), True),
        (Weight("w", (4, 6), Cut(0, (range(3),))), False),
        (Weight("w", (4, 6), convert=torch.t), False),
    ],
)
def test_what_is_whole_is_read_as_it_is(weight: Weight, is_whole: bool) -> None:
    assert Share(weight, torch.empty(4, 6)).is_whole == is_whole


@pytest.mark.parametrize("transposed", [False, True])
def test_ranks_multiply_what_one_would(transposed: bool) -> None:
    """Columns of one product, and the sum of the next, over ranks that hold uneven parts."""

    def product(build: Builder) -> tuple[torch.Tensor, torch.Tensor]:
        columns = build.mapping.columns(10)
        up = FusedLinear(build, [Outputs("up", 10, (columns,))], 6, bias=True, transposed=transposed)
        down = SummedLinear(build, "down", 3, 10, columns, bias=True, transposed=transposed)
        weights.fill_randomly(build)
        for name in ("up.bias", "down.bias"):
            bias = build.shares[name]
            if bias.tensor is not None:
                bias.tensor.copy_(bias.take(torch.arange(10.0)[: bias.weight.shape[0]]))
        build.finish()
        hidden = up(STORED)
        return hidden, down(hidden)

    expected = product(Builder(torch.float32, CPU))
    parts = [product(Builder(torch.float32, CPU, Alone(Mapping(rank, 3)))) for rank in range(3)]
    torch.testing.assert_close(torch.cat([hidden for hidden, _ in parts], 1), expected[0])
    torch.testing.assert_close(sum(summand for _, summand in parts), expected[1])


def test_a_weight_is_kept_by_one_layer() -> None:
    build = Builder(torch.float32, CPU)
    build.tensor(Weight("w", (2,)))
    with pytest.raises(AssertionError, match="w is kept twice"):
        build.tensor(Weight("w", (2,)))


def test_what_belongs_to_another_stage_is_declared_and_takes_no_memory() -> None:
    build = Builder(torch.float32, CPU, Alone(Mapping(0, 1, 2)))
    for index, layer in enumerate(build.layers(3)):
        layer.tensor(Weight(f"{index}", (1 << 40 if index == 2 else 2,)))
    assert {name: share.tensor is not None for name, share in build.shares.items()} == {
        "0": True,
        "1": True,
        "2": False,
    }
    assert build.num_bytes == 2 * 2 * 4


def test_the_layers_alone_own_what_was_filled() -> None:
    build = Builder(torch.float32, CPU)
    linears = [
        FusedLinear(each, [Outputs(f"{index}.a", 8, (range(8),)), Outputs(f"{index}.b", 8, (range(8),))], 8, bias=False)
        for index, each in enumerate(build.layers(2))
    ]
    plain = [weakref.ref(linear._weight) for linear in linears]
    build.finish()
    assert not build.shares
    for linear, filled in zip(linears, plain, strict=True):
        assert filled() is (None if linear._is_packed else linear._weight), "a repacked matrix exists once"
