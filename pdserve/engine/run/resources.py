"""What the arguments ask of the hardware: device, number type, lengths, attention backend, memory of a step."""

from __future__ import annotations

import importlib.util
import logging
import platform

import torch

from pd_kernels import paged_attention
from pdserve.config import CudaGraphConfig, LlmArgs
from pdserve.engine.models.config import ModelConfig
from pdserve.engine.models.decoder import Decoder
from pdserve.engine.parallel.mapping import Mapping
from pdserve.errors import ConfigError

log = logging.getLogger(__name__)


def choose_device(args: LlmArgs, mapping: Mapping | None = None) -> torch.device:
    """The device that `args.device` names; auto is a GPU if there is one. Of several ranks each gets a GPU of its own.

    Raises:
        ConfigError: there is no GPU, or there are fewer than ranks.
    """
    mapping = mapping or Mapping()
    if args.device == "cpu" or (args.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device: cuda asked for, but torch finds no CUDA GPU; allowed here: cpu", "device")
    if mapping.world_size == 1:
        return torch.device("cuda", torch.cuda.current_device())
    if mapping.world_size > torch.cuda.device_count():
        raise ConfigError(
            f"tensor_parallel_size: {mapping.tp_size} x {mapping.pp_size} pipeline stages need {mapping.world_size} "
            f"GPUs, torch finds {torch.cuda.device_count()}",
            "tensor_parallel_size" if mapping.tp_size > 1 else "pipeline_parallel_size",
        )
    return torch.device("cuda", mapping.rank)


def choose_dtype(args: LlmArgs, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The type of weights, activations and KV.

    Auto is the checkpoint's, with two exceptions: a float32 checkpoint runs in bfloat16 on a GPU, and on a CPU a
    16-bit type is taken only if the processor computes in it.
    """
    if args.dtype != "auto":
        return _dtype(args.dtype)
    saved = _dtype(config.checkpoint_dtype)
    if device.type == "cuda":
        return torch.bfloat16 if saved == torch.float32 else saved
    return saved if _computes_in(saved) else torch.float32


def choose_kv_dtype(args: LlmArgs, dtype: torch.dtype) -> torch.dtype:
    """The type of the KV cache of a model that computes in `dtype`. Raises ConfigError."""
    if args.kv_cache_config.dtype == "auto":
        return dtype
    if dtype != torch.bfloat16:
        computed = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"kv_cache_config.dtype: fp8 needs a model in bfloat16, this one runs in {computed}; allowed: auto",
            "kv_cache_config.dtype",
        )
    return torch.float8_e4m3fn


def choose_max_seq_len(args: LlmArgs, config: ModelConfig) -> int:
    """`max_seq_len`, by default what the model was made for. Raises ConfigError if it is more than that."""
    longest = config.max_positions
    max_seq_len = args.max_seq_len or longest
    if max_seq_len > longest:
        scaled = "" if config.scaling == "default" else f" with its {config.scaling} rope scaling"
        raise ConfigError(
            f"max_seq_len: the model was made for at most {longest}{scaled}, got {max_seq_len}",
            "max_seq_len",
        )
    if config.sliding_window is not None and max_seq_len > config.sliding_window:
        raise ConfigError(
            f"max_seq_len: the model attends over a sliding_window of {config.sliding_window} tokens, and longer "
            f"sequences are not supported; allowed: up to {config.sliding_window}, got {max_seq_len}",
            "max_seq_len",
        )
    return max_seq_len


def choose_attention(args: LlmArgs, device: torch.device) -> paged_attention.Backend:
    """The attention implementation; AUTO is Triton on a GPU and torch elsewhere. Raises ConfigError."""
    if args.attn_backend == "TORCH" or (args.attn_backend == "AUTO" and device.type == "cpu"):
        return "torch"
    if device.type == "cpu":
        raise ConfigError("attn_backend: TRITON needs a GPU; allowed on a CPU: AUTO, TORCH", "attn_backend")
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("attn_backend: TRITON needs the triton package, which is not installed", "attn_backend")
    return "triton"


def choose_graphs(args: LlmArgs, device: torch.device) -> CudaGraphConfig | None:
    """How decode steps are captured as CUDA graphs; None where they are not.

    The torch attention is never captured: its launches are cut to lengths that the host knows, and a graph would keep
    those of its capture.
    """
    config = args.cuda_graph_config
    if config is None or device.type != "cuda":
        return None
    if choose_attention(args, device) == "torch":
        log.info("attn_backend TORCH runs without CUDA graphs, whatever cuda_graph_config says")
        return None
    for name, size in (
        ("batch_sizes", max(config.batch_sizes or (0,))),
        ("max_batch_size", config.max_batch_size or 0),
    ):
        if size > args.max_batch_size:
            key = f"cuda_graph_config.{name}"
            log.info("%s: %d is more than max_batch_size, %d, which is captured", key, size, args.max_batch_size)
    return config


def activation_bytes(args: LlmArgs, model: Decoder, config: ModelConfig) -> int:
    """Upper bound of what one step allocates on a rank besides weights and KV.

    On the rank that samples, the sampler's copies of all logits (float32, with a float64 sum and a sort) come to what
    the model itself takes.
    """
    step_bytes = model.step_bytes(args.max_num_tokens, args.max_batch_size, choose_max_seq_len(args, config))
    sampler_bytes = config.vocab_size * 32 if model.is_first_rank else 0
    return step_bytes + 2 * args.max_batch_size * sampler_bytes


def _dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _computes_in(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for `dtype`; emulated ones are slower than float32."""
    if dtype == torch.float32:
        return True
    if not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16 and platform.machine() in ("x86_64", "AMD64"):
        # oneDNN says yes already where it only emulates.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
