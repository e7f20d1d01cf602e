"""The engine's arguments: `LlmArgs` and the sections below it. Key names and meanings are TensorRT-LLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Section(BaseModel):
    """A section of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class KvCacheConfig(Section):
    """The paged KV cache of one worker.

    The pool of a GPU gets `free_gpu_memory_fraction` of what is free after the weights are loaded, or `max_tokens`
    tokens if those take less; of a CPU, `cpu_memory_bytes` (1 GiB if there is no `max_tokens` either) or `max_tokens`
    tokens, where both are given the smaller of both.
    With `enable_partial_reuse` a prompt also takes over what a cached block has in common with its next tokens, though
    the block goes on differently: by a copy, or, without `copy_on_partial_reuse`, by using up the block itself, if
    nobody else uses it.
    `dtype` fp8 keeps keys and values in 8 bits (float8_e4m3fn), without scales; auto, in the type of the model.
    Prompts that begin alike and arrive together compute their common blocks once. For a model with layers that attend
    over a window, whole blocks are reused only.
    `host_cache_size` bytes of host memory (for each GPU; the first one's share of a block counts) keep blocks that the
    pool has no room for; they are copied back when a prompt needs them (`onboard_blocks`: attention can't read them
    where they are). It is refused for a model with layers that attend over a window.
    """

    enable_block_reuse: bool = True
    max_tokens: int | None = Field(default=None, ge=1)
    free_gpu_memory_fraction: float = Field(default=0.9, gt=0, lt=1)
    cpu_memory_bytes: int | None = Field(default=None, ge=1 << 20)
    tokens_per_block: int = Field(default=32, ge=1, le=1024)
    enable_partial_reuse: bool = True
    copy_on_partial_reuse: bool = True
    dtype: Literal["auto", "fp8"] = "auto"
    host_cache_size: int | None = Field(default=None, ge=0)
    onboard_blocks: bool = True

    @field_validator("host_cache_size")
    @classmethod
    def _only_reused_blocks_are_kept(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("enable_block_reuse", True):
            raise ValueError("blocks are kept on the host to be reused; it needs enable_block_reuse")
        return value

    @field_validator("onboard_blocks")
    @classmethod
    def _host_blocks_must_come_back(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and info.data.get("host_cache_size"):
            raise ValueError("blocks in host memory can't be used where they are; allowed with a host_cache_size: true")
        return value


CapacitySchedulerPolicy = Literal["GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH"]
ContextChunkingPolicy = Literal["FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS"]


class SchedulerConfig(Section):
    """Who takes part in a step.

    `capacity_scheduler_policy` MAX_UTILIZATION starts a request as soon as there are blocks for its prompt, and sets
    the latest request back when blocks run out. GUARANTEED_NO_EVICT starts one only if KV blocks are left for all it
    may still need, so that a request that runs is never set back; without `max_tokens` it may need the rest of the
    context. STATIC_BATCH starts requests only when all those before have ended.
    `context_chunking_policy`: FIRST_COME_FIRST_SERVED gives a step's tokens to the oldest prompt first, and keeps one
    that fills half a step apart from those before it, which are done the sooner; EQUAL_PROGRESS gives them to all
    prompts equally, in units of `tokens_per_block`.
    While anybody decodes, or is about to, with KV under way, a step computes at most `max_mixed_prefill_tokens` tokens
    of prompts, so that a prompt delays nobody's next token by more than that (default: as many as fit into
    `max_num_tokens`). It needs chunked prefill: a longer prompt that can't be cut would wait for as long as that lasts.
    """

    capacity_scheduler_policy: CapacitySchedulerPolicy = "MAX_UTILIZATION"
    context_chunking_policy: ContextChunkingPolicy = "FIRST_COME_FIRST_SERVED"
    waiting_queue_policy: Literal["FCFS"] = "FCFS"
    max_mixed_prefill_tokens: int | None = Field(default=None, ge=1)

    @field_validator("waiting_queue_policy", mode="before")
    @classmethod
    def _queue_policy_in_any_case(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value


class CacheTransceiverConfig(Section):
    """How KV travels from context to generation workers.

    `backend` DEFAULT is UCX; NIXL takes pools in host memory only; LOOPBACK joins two transceivers of one process, for
    tests. `max_tokens_in_buffer` bounds the staging buffers of either side. A transfer that has not completed
    `kv_transfer_timeout_ms` after the last of its KV was computed and accepted fails; neither the prefill counts nor
    waiting for a place on the generation worker, which end with the request. `checksum` adds a checksum to each
    message, for debugging.
    With `direct_reads` a generation worker whose GPU reaches a context worker's memory, on the same host, reads KV from
    there, where both pools' blocks are alike; otherwise, and if it is false or `UCX_TLS` in the environment rules out
    `cuda_ipc`, KV goes through the staging buffers.
    """

    backend: Literal["DEFAULT", "UCX", "NIXL", "LOOPBACK"] = "DEFAULT"
    max_tokens_in_buffer: int = Field(default=8192, ge=1)
    kv_transfer_timeout_ms: int = Field(default=60_000, ge=1)
    checksum: bool = False
    direct_reads: bool = True

    @field_validator("backend", mode="before")
    @classmethod
    def _name_what_is_not_built(cls, value: Any) -> Any:
        if value in ("MOONCAKE", "MPI"):
            raise ValueError(f"{value} is not built into this version; allowed: DEFAULT, UCX, NIXL")
        return value


class CudaGraphConfig(Section):
    """CUDA graphs for decode. `batch_sizes` lists the sizes to capture (default: 1, 2, 4, multiples of 8) up to
    `max_batch_size` (default, and at most, the engine's); a size beyond stands for that. With `enable_padding` a batch
    between two sizes runs in the larger. The TORCH attention runs without."""

    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(default=None, min_length=1)
    max_batch_size: int | None = Field(default=None, ge=1)
    enable_padding: bool = True


class LlmArgs(Section):
    """What an engine is built from.

    `model` is a Hugging Face folder, a `.gguf` file, or `smollm2-135m-instruct`, the packaged demo model.
    `dtype` auto takes the checkpoint's own type, and bfloat16 for a float32 checkpoint on a GPU; on a CPU without
    bfloat16 arithmetic it takes float32.
    `max_queue_size` requests may wait: for blocks, for a place in the batch, and on a generation worker for their KV.
    One more is refused at once, as overloaded.
    `cuda_graph_config: null` runs decode without CUDA graphs. `disable_overlap_scheduler` looks at each step's tokens
    before the next step is launched; on a CPU, which computes as it launches, that is always so.
    The model is spread over `tensor_parallel_size` times `pipeline_parallel_size` GPUs of one host; `pp_partition`
    lists the layers of each pipeline stage (default: as equal as they can be).
    `max_batch_size` bounds the sequences in one step, `max_num_tokens` its tokens, and `max_seq_len` prompt plus
    output of one request (default: what the model was made for).
    While nothing runs, prompts wait up to `batch_wait_timeout_ms` for others, until there are `max_batch_size` of them.
    A request's tokens go out `stream_interval` at a time, the first and the last ones at once.
    A worker whose step takes longer than `hang_detection_timeout` seconds ends, and is started again; null: never.
    """

    model: str = Field(min_length=1)
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    load_format: Literal["AUTO", "DUMMY"] = "AUTO"
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)
    pp_partition: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    max_batch_size: int = Field(default=256, ge=1)
    max_num_tokens: int = Field(default=8192, ge=1)
    max_seq_len: int | None = Field(default=None, ge=2)
    max_queue_size: int = Field(default=4096, ge=1)
    enable_chunked_prefill: bool = True
    num_threads: int | None = Field(default=None, ge=1)
    attn_backend: Literal["AUTO", "TORCH", "TRITON"] = "AUTO"
    cuda_graph_config: CudaGraphConfig | None = CudaGraphConfig()
    disable_overlap_scheduler: bool = False
    torch_compile_config: None = None
    batch_wait_timeout_ms: float = Field(default=0, ge=0, allow_inf_nan=False)
    stream_interval: int = Field(default=1, ge=1)
    hang_detection_timeout: float | None = Field(default=300, ge=1, allow_inf_nan=False)
    scheduler_config: SchedulerConfig = SchedulerConfig()
    kv_cache_config: KvCacheConfig = KvCacheConfig()
    cache_transceiver_config: CacheTransceiverConfig = CacheTransceiverConfig()

    @field_validator("torch_compile_config", mode="before")
    @classmethod
    def _name_why_nothing_is_compiled(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("steps run fused kernels and CUDA graphs, which torch.compile does not see; allowed: null")
        return value

    @field_validator("pp_partition")
    @classmethod
    def _one_entry_for_each_stage(cls, value: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        stages = info.data.get("pipeline_parallel_size")
        if value is not None and stages is not None and len(value) != stages:
            raise ValueError(f"one number of layers for each of {stages} pipeline stages was expected")
        return value

    @field_validator("scheduler_config")
    @classmethod
    def _chunks_need_chunking(cls, value: SchedulerConfig, info: ValidationInfo) -> SchedulerConfig:
        if info.data.get("enable_chunked_prefill", True):
            return value
        if value.context_chunking_policy == "EQUAL_PROGRESS":
            raise ValueError("context_chunking_policy EQUAL_PROGRESS needs enable_chunked_prefill")
        if value.max_mixed_prefill_tokens is not None:
            raise ValueError("max_mixed_prefill_tokens needs enable_chunked_prefill; allowed without: null")
        return value

    @field_validator("load_format", mode="before")
    @classmethod
    def _load_format_in_any_case(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value
