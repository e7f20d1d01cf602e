"""The decoder's parameters, fused for speed, and which part of each of a checkpoint's tensors goes where in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdserve.engine.models.config import ModelConfig
from pdserve.engine.models.mapping import Shard

_WHOLE = slice(None)


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """One layer. Queries, keys and values are one matrix, gate and up projection another.

    None: the family has none, or, for a bias that follows a sum over ranks, another rank adds it.
    """

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    post_attention_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Parameters:
    """One rank's share of the model. `embedding` is the first stage's, `final_norm` and `lm_head` are the last one's.

    `lm_head` is the rows that are this rank's; with tied embeddings they are a view of `embedding`, where that exists.
    """

    embedding: Tensor | None
    layers: list[LayerParameters]
    final_norm: Tensor | None
    lm_head: Tensor | None


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a checkpoint's tensor of the given `shape` goes: its part `index` fills `tensor`.

    `tensor` is None where this rank holds nothing of it.
    """

    shape: tuple[int, ...]
    index: tuple[slice, ...]
    tensor: Tensor | None

    @property
    def takes_all(self) -> bool:
        return self.tensor is not None and self.tensor.shape == self.shape


def allocate(shard: Shard, dtype: torch.dtype, device: torch.device) -> Parameters:
    """Parameters of `shard`'s shapes, not filled in."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def layer() -> LayerParameters:
        own = shard.config
        hidden, intermediate = own.hidden_size, own.intermediate_size
        qkv_size = own.q_size + 2 * own.kv_size
        return LayerParameters(
            input_norm=empty(hidden),
            qkv=empty(qkv_size, hidden),
            qkv_bias=empty(qkv_size) if own.qkv_bias else None,
            q_norm=empty(own.head_dim) if own.qk_norm else None,
            k_norm=empty(own.head_dim) if own.qk_norm else None,
            o=empty(hidden, own.q_size),
            o_bias=empty(hidden) if own.o_bias and shard.adds_bias else None,
            post_attention_norm=empty(hidden),
            gate_up=empty(2 * intermediate, hidden),
            gate_up_bias=empty(2 * intermediate) if own.mlp_bias else None,
            down=empty(hidden, intermediate),
            down_bias=empty(hidden) if own.mlp_bias and shard.adds_bias else None,
        )

    whole = shard.whole
    embedding = empty(whole.vocab_size, whole.hidden_size) if shard.has_embedding else None
    lm_head = None
    if shard.has_output:
        shared = embedding if whole.tie_word_embeddings else None
        rows = slice(shard.vocab.start, shard.vocab.stop)
        lm_head = empty(len(shard.vocab), whole.hidden_size) if shared is None else shared[rows]
    return Parameters(
        embedding=embedding,
        layers=[layer() for _ in shard.layers],
        final_norm=empty(whole.hidden_size) if shard.has_output else None,
        lm_head=lm_head,
    )


def num_bytes(shard: Shard, parameters: Parameters) -> int:
    """Memory that `parameters` take."""
    slots = checkpoint_slots(shard, parameters).values()
    return sum(slot.tensor.nbytes for slot in slots if slot.tensor is not None)


def checkpoint_slots(shard: Shard, parameters: Parameters) -> dict[str, Slot]:
    """Every tensor that a Hugging Face checkpoint of the whole model must hold, by name, and where it goes."""
    whole = shard.whole
    table, rows = (whole.vocab_size, whole.hidden_size), (_slice(shard.vocab), _WHOLE)
    slots = {
        "model.embed_tokens.weight": Slot(table, (_WHOLE, _WHOLE), parameters.embedding),
        "model.norm.weight": Slot((whole.hidden_size,), (_WHOLE,), parameters.final_norm),
    }
    if not whole.tie_word_embeddings:
        slots["lm_head.weight"] = Slot(table, rows, parameters.lm_head)
    elif parameters.embedding is None:
        slots["model.embed_tokens.weight"] = Slot(table, rows, parameters.lm_head)
    for index in range(whole.num_layers):
        own = _own_tensors(shard.config, parameters.layers[index - shard.layers[0]]) if index in shard.layers else {}
        slots |= {
            f"model.layers.{index}.{name}": Slot(shape, part, own.get(name))
            for name, (shape, part) in _layer_parts(shard).items()
        }
    return slots


def _layer_parts(shard: Shard) -> dict[str, tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Every tensor of a layer: its shape in the checkpoint, and the part of it that is `shard`'s."""
    whole, hidden = shard.whole, shard.whole.hidden_size
    queries, keys = _slice(shard.heads, whole.head_dim), _slice(shard.kv_heads, whole.head_dim)
    columns = _slice(shard.intermediate)
    projections = (
        ("self_attn.q_proj", (whole.q_size, hidden), (queries, _WHOLE), whole.qkv_bias),
        ("self_attn.k_proj", (whole.kv_size, hidden), (keys, _WHOLE), whole.qkv_bias),
        ("self_attn.v_proj", (whole.kv_size, hidden), (keys, _WHOLE), whole.qkv_bias),
        ("self_attn.o_proj", (hidden, whole.q_size), (_WHOLE, queries), whole.o_bias),
        ("mlp.gate_proj", (whole.intermediate_size, hidden), (columns, _WHOLE), whole.mlp_bias),
        ("mlp.up_proj", (whole.intermediate_size, hidden), (columns, _WHOLE), whole.mlp_bias),
        ("mlp.down_proj", (hidden, whole.intermediate_size), (_WHOLE, columns), whole.mlp_bias),
    )
    norms = [("input_layernorm", hidden), ("post_attention_layernorm", hidden)]
    if whole.qk_norm:
        norms += [("self_attn.q_norm", whole.head_dim), ("self_attn.k_norm", whole.head_dim)]
    parts: dict[str, tuple[tuple[int, ...], tuple[slice, ...]]] = {}
    for name, size in norms:
        parts[f"{name}.weight"] = (size,), (_WHOLE,)
    for name, shape, part, has_bias in projections:
        parts[f"{name}.weight"] = shape, part
        if has_bias:
            parts[f"{name}.bias"] = shape[:1], part[:1]
    return parts


def _own_tensors(config: ModelConfig, layer: LayerParameters) -> dict[str, Tensor]:
    """What a rank has of a layer, by the checkpoint's names."""
    optional = {
        "input_layernorm.weight": layer.input_norm,
        "post_attention_layernorm.weight": layer.post_attention_norm,
        "self_attn.q_norm.weight": layer.q_norm,
        "self_attn.k_norm.weight": layer.k_norm,
        "self_attn.o_proj.weight": layer.o,
        "self_attn.o_proj.bias": layer.o_bias,
        "mlp.down_proj.weight": layer.down,
        "mlp.down_proj.bias": layer.down_bias,
    }
    own = {name: tensor for name, tensor in optional.items() if tensor is not None}
    for kind, qkv, gate_up in (("weight", layer.qkv, layer.gate_up), ("bias", layer.qkv_bias, layer.gate_up_bias)):
        if qkv is not None:
            parts = torch.tensor_split(qkv, (config.q_size, config.q_size + config.kv_size))
            own |= {f"self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
        if gate_up is not None:
            gate, up = gate_up.chunk(2)
            own |= {f"mlp.gate_proj.{kind}": gate, f"mlp.up_proj.{kind}": up}
    return own


def _slice(span: range, width: int = 1) -> slice:
    """The rows or columns of `span`, each `width` wide."""
    return slice(span.start * width, span.stop * width)
