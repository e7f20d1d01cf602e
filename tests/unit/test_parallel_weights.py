"""Each rank's parameters are its part of what one process would hold, read or random, and nothing else is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.engine.models import weights
from pdserve.engine.models.config import ModelConfig
from pdserve.engine.models.mapping import Mapping, Shard
from pdserve.engine.models.parameters import Parameters, allocate, checkpoint_slots, num_bytes
from pdserve.errors import ConfigError
from pdserve.model_store import read_config
from tests.unit.tiny_models import CONFIGS, save

CPU = torch.device("cpu")
LAYOUTS = [(2, 1), (1, 2), (3, 3)]


def filled(config: ModelConfig, mapping: Mapping, folder: Path | None) -> tuple[Shard, Parameters]:
    """A rank's parameters, from `folder` or random."""
    shard = Shard.of(config, mapping)
    parameters = allocate(shard, torch.float32, CPU)
    for slot in checkpoint_slots(shard, parameters).values():
        if slot.tensor is not None:
            slot.tensor.fill_(float("nan"))
    if folder is None:
        weights.fill_randomly(shard, parameters)
    else:
        weights.load(folder, shard, parameters)
    return shard, parameters


@pytest.mark.parametrize("source", ["checkpoint", "random"])
@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_hold_parts_of_what_one_holds(name: str, source: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    config = ModelConfig.from_hf(read_config(tmp_path))
    folder = tmp_path if source == "checkpoint" else None
    whole = checkpoint_slots(*filled(config, Mapping(), folder))
    for tp_size, pp_size in LAYOUTS:
        held: dict[str, torch.Tensor] = {key: torch.zeros(slot.shape) for key, slot in whole.items()}
        for rank in range(tp_size * pp_size):
            shard, parameters = filled(config, Mapping(rank, tp_size, pp_size), folder)
            for key, slot in checkpoint_slots(shard, parameters).items():
                if slot.tensor is not None:
                    expected = whole[key].tensor
                    assert expected is not None
                    assert torch.equal(slot.tensor, expected[slot.index]), key
                    held[key][slot.index] = 1
            if config.tie_word_embeddings and shard.has_output:
                assert parameters.lm_head is not None
                table = whole["model.embed_tokens.weight"].tensor
                assert table is not None
                assert torch.equal(parameters.lm_head, table[shard.vocab.start : shard.vocab.stop])
        assert all(bool(each.all()) for each in held.values()), "every number is on some rank"


def test_a_bias_after_a_sum_is_added_once(tmp_path: Path) -> None:
    save("llama-mha-biases-tied", tmp_path)
    config = ModelConfig.from_hf(read_config(tmp_path))
    layers = [filled(config, Mapping(rank, 2), tmp_path)[1].layers[0] for rank in range(2)]
    assert [layer.o_bias is None for layer in layers] == [layer.down_bias is None for layer in layers] == [False, True]
    assert [layer.qkv_bias is None for layer in layers] == [False, False]


def test_a_rank_reads_its_part_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama", tmp_path)
    config = ModelConfig.from_hf(read_config(tmp_path))
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
    shard, parameters = filled(config, Mapping(1, 2, 2), tmp_path)
    assert sum(read_bytes) == num_bytes(shard, parameters)
    assert num_bytes(shard, parameters) < 0.45 * num_bytes(*filled(config, Mapping(), tmp_path))


def test_a_tensor_of_another_rank_is_missed_all_the_same(tmp_path: Path) -> None:
    """All ranks refuse a checkpoint alike, whoever would have read the tensor."""
    save("llama", tmp_path)
    data = read_config(tmp_path)
    config = ModelConfig.from_hf({**data, "num_hidden_layers": 4})
    for rank in range(2):
        with pytest.raises(ConfigError, match=r"lacks model\.layers\.3"):
            filled(config, Mapping(rank, 1, 2), tmp_path)
