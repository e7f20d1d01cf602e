"""Each rank's parameters are its part of what one process would hold, read or random, and nothing else is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.engine.layers.builder import Builder
from pdserve.engine.layers.weight import Share
from pdserve.engine.models import weights
from pdserve.engine.models.decoder import Decoder
from pdserve.engine.models.registry import describe
from pdserve.engine.parallel.group import SingleRank
from pdserve.engine.parallel.mapping import Mapping
from pdserve.errors import ConfigError
from pdserve.model_store import read_config
from tests.unit.tiny_models import CONFIGS, save

CPU = torch.device("cpu")
LAYOUTS = [(2, 1), (1, 2), (3, 3)]


class Alone(SingleRank):
    """Speaks for one rank of several, in a test that has no others."""

    def __init__(self, mapping: Mapping) -> None:
        self.mapping = mapping


def filled(data: dict[str, Any], mapping: Mapping, folder: Path | None) -> tuple[Decoder, Builder]:
    """A rank's share of the model that `data` describes, from `folder` or random."""
    build = Builder(torch.float32, CPU, Alone(mapping))
    decoder = describe(data).build(build)
    for share in build.shares.values():
        if share.tensor is not None:
            share.tensor.fill_(float("nan"))
    if folder is None:
        weights.fill_randomly(build)
    else:
        weights.load(folder, build)
    return decoder, build


def stored(share: Share) -> torch.Tensor:
    """A whole weight as a checkpoint holds it."""
    assert share.tensor is not None
    return share.tensor if share.weight.convert is None else share.weight.convert(share.tensor)


@pytest.mark.parametrize("source", ["checkpoint", "random"])
@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_hold_parts_of_what_one_holds(name: str, source: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    data = read_config(tmp_path)
    folder = tmp_path if source == "checkpoint" else None
    whole = {key: stored(share) for key, share in filled(data, Mapping(), folder)[1].shares.items()}
    for tp_size, pp_size in LAYOUTS:
        held = {key: torch.zeros_like(tensor) for key, tensor in whole.items()}
        for rank in range(tp_size * pp_size):
            mapping = Mapping(rank, tp_size, pp_size)
            decoder, build = filled(data, mapping, folder)
            assert build.shares.keys() == whole.keys()
            for key, share in build.shares.items():
                if share.tensor is not None:
                    assert torch.equal(share.tensor, share.take(whole[key])), key
                    for index in share.indices:
                        held[key][index] = 1
            if describe(data).tie_word_embeddings and mapping.is_last_stage:
                table = next(
                    tensor for key, tensor in whole.items() if key.endswith(("embed_tokens.weight", "wte.weight"))
                )
                rows = mapping.vocab(len(table))
                assert decoder._head is not None
                assert torch.equal(decoder._head._weight, table[rows.start : rows.stop])
        assert all(bool(each.all()) for each in held.values()), "every number is on some rank"


@pytest.mark.parametrize(
    ("name", "after_a_sum", "others"),
    [
        ("llama-mha-biases-tied", ("o_proj.bias", "down_proj.bias"), ("q_proj.bias", "up_proj.bias")),
        ("gpt2", ("c_proj.bias",), ("c_attn.bias", "c_fc.bias")),
    ],
)
def test_a_bias_after_a_sum_is_added_once(
    name: str, after_a_sum: tuple[str, ...], others: tuple[str, ...], tmp_path: Path
) -> None:
    save(name, tmp_path)
    for rank in range(2):
        shares = filled(read_config(tmp_path), Mapping(rank, 2), tmp_path)[1].shares
        held = {key for key, share in shares.items() if share.tensor is not None}
        assert {key for key in shares if key.endswith(after_a_sum)} & held == (
            {key for key in shares if key.endswith(after_a_sum)} if rank == 0 else set()
        )
        assert {key for key in shares if key.endswith(others)} <= held


def test_a_rank_reads_its_part_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama", tmp_path)
    data = read_config(tmp_path)
    read_bytes = []
    opened = weights.safe_open

    class Counted:
        """A file that notes what is read of it."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._file = opened(*args, **kwargs)

        def __enter__(self) -> Counted:
            self._inner = self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def keys(self) -> Any:
            return self._inner.keys()

        def get_tensor(self, name: str) -> torch.Tensor:
            read_bytes.append(self._inner.get_tensor(name).nbytes)
            return self._inner.get_tensor(name)

        def get_slice(self, name: str) -> Any:
            return CountedSlice(self._inner.get_slice(name))

    class CountedSlice:
        def __init__(self, inner: Any) -> None:
            self._inner = inner
            self.get_shape = inner.get_shape

        def __getitem__(self, index: Any) -> torch.Tensor:
            read_bytes.append(self._inner[index].nbytes)
            return self._inner[index]

    monkeypatch.setattr(weights, "safe_open", Counted)
    _, build = filled(data, Mapping(1, 2, 2), tmp_path)
    assert sum(read_bytes) == build.num_bytes
    assert build.num_bytes < 0.45 * filled(data, Mapping(), tmp_path)[1].num_bytes


def test_a_tensor_of_another_rank_is_missed_all_the_same(tmp_path: Path) -> None:
    """All ranks refuse a checkpoint alike, whoever would have read the tensor."""
    save("llama", tmp_path)
    data = {**read_config(tmp_path), "num_hidden_layers": 4}
    for rank in range(2):
        with pytest.raises(ConfigError, match=r"lacks model\.layers\.3"):
            filled(data, Mapping(rank, 1, 2), tmp_path)
