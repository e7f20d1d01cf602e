"""The engine's arguments: `LlmArgs` and the sections below it. Key names and meanings are TensorRT-LLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Section(BaseModel):
    """A section of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class KvCacheConfig(Section):
    """The paged KV cache of one worker."""

    enable_block_reuse: bool = Field(
        default=True, description="prompts with a prefix in common share its blocks, also those that arrive together"
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="tokens of the pool, if that is less than what the memory allows"
    )
    free_gpu_memory_fraction: float = Field(
        default=0.9, gt=0, lt=1, description="the pool's share of the GPU memory that is free with the weights loaded"
    )
    cpu_memory_bytes: int | None = Field(
        default=None, ge=1 << 20, description="memory of the pool on a CPU; 1 GiB without max_tokens either"
    )
    tokens_per_block: int = Field(default=32, ge=1, le=1024, description="tokens of a block")
    enable_partial_reuse: bool = Field(
        default=True,
        description="a prompt also takes what a cached block has in common with its next tokens; not with windows",
    )
    copy_on_partial_reuse: bool = Field(
        default=True, description="it takes a copy; if false, the block itself, unless others use that"
    )
    dtype: Literal["auto", "fp8"] = Field(
        default="auto", description="auto: the model's type; fp8: 8 bits (float8_e4m3fn) without scales"
    )
    host_cache_size: int | None = Field(
        default=None,
        ge=0,
        description="bytes of host memory, for each GPU, that keep blocks for which the pool has no room; refused for "
        "layers that attend over a window",
    )
    onboard_blocks: bool = Field(
        default=True, description="blocks in host memory are copied back when a prompt needs them"
    )

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
    """Who takes part in a step."""

    capacity_scheduler_policy: CapacitySchedulerPolicy = Field(
        default="MAX_UTILIZATION",
        description="MAX_UTILIZATION starts a request when there are blocks for its prompt, and sets the latest back "
        "when they run out; GUARANTEED_NO_EVICT, when there are blocks for all that it may need; STATIC_BATCH, when "
        "all those before it have ended",
    )
    context_chunking_policy: ContextChunkingPolicy = Field(
        default="FIRST_COME_FIRST_SERVED",
        description="FIRST_COME_FIRST_SERVED gives a step's tokens to the oldest prompt first, and keeps a prompt that "
        "fills half a step apart from those before it; EQUAL_PROGRESS gives all prompts the same number of blocks",
    )
    waiting_queue_policy: Literal["FCFS"] = Field(default="FCFS", description="first come, first served")
    max_mixed_prefill_tokens: int | None = Field(
        default=None,
        ge=1,
        description="prompt tokens of a step in which others decode or are about to; null: as many as max_num_tokens "
        "allows. Needs enable_chunked_prefill",
    )

    @field_validator("waiting_queue_policy", mode="before")
    @classmethod
    def _queue_policy_in_any_case(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value


class CacheTransceiverConfig(Section):
    """How KV travels from context to generation workers."""

    backend: Literal["DEFAULT", "UCX", "NIXL", "LOOPBACK"] = Field(
        default="DEFAULT",
        description="DEFAULT is UCX; NIXL takes pools in host memory only; LOOPBACK joins two ends of one process, for "
        "tests",
    )
    max_tokens_in_buffer: int = Field(default=8192, ge=1, description="tokens that either side's staging buffers hold")
    kv_transfer_timeout_ms: int = Field(
        default=60_000,
        ge=1,
        description="how long a transfer may take once all of its KV is computed and the receiver has a place for it",
    )
    checksum: bool = Field(default=False, description="add a checksum to each message, for debugging")
    direct_reads: bool = Field(
        default=True,
        description="read KV where it is if one GPU reaches the other's memory and both pools' blocks are alike; if "
        "false, or if UCX_TLS rules out cuda_ipc, use the staging buffers",
    )

    @field_validator("backend", mode="before")
    @classmethod
    def _name_what_is_not_built(cls, value: Any) -> Any:
        if value in ("MOONCAKE", "MPI"):
            raise ValueError(f"{value} is not built into this version; allowed: DEFAULT, UCX, NIXL")
        return value


class CudaGraphConfig(Section):
    """CUDA graphs for decode. The TORCH attention runs without."""

    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None, min_length=1, description="sizes to capture; null: 1, 2, 4 and multiples of 8"
    )
    max_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="the largest size; a size in batch_sizes beyond it stands for it; null: the engine's",
    )
    enable_padding: bool = Field(default=True, description="a batch between two sizes runs in the larger")


class LlmArgs(Section):
    """What an engine is built from."""

    model: str = Field(
        min_length=1,
        description="a Hugging Face folder, a .gguf file, or smollm2-135m-instruct, the packaged demo model",
    )
    tokenizer: str | None = Field(default=None, description="folder of the tokenizer; null: the model's")
    skip_tokenizer_init: bool = Field(default=False, description="take and return token ids, without a tokenizer")
    load_format: Literal["AUTO", "DUMMY"] = Field(default="AUTO", description="DUMMY: random weights")
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        default="auto",
        description="auto: the checkpoint's; bfloat16 for a float32 checkpoint on a GPU; float32 on a CPU without "
        "bfloat16 arithmetic",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU where there is one")
    tensor_parallel_size: int = Field(default=1, ge=1, description="GPUs that share each layer")
    pipeline_parallel_size: int = Field(default=1, ge=1, description="stages of layers, each on GPUs of its own")
    pp_partition: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None, description="layers of each pipeline stage; null: as equal as they can be"
    )
    max_batch_size: int = Field(default=256, ge=1, description="sequences of a step")
    max_num_tokens: int = Field(default=8192, ge=1, description="tokens of a step")
    max_seq_len: int | None = Field(
        default=None, ge=2, description="prompt and output tokens of a request; null: what the model is made for"
    )
    max_queue_size: int = Field(
        default=4096,
        ge=1,
        description="requests that wait for blocks, for a place in the batch or for their KV; one more is refused",
    )
    enable_chunked_prefill: bool = Field(default=True, description="a prompt may be computed in several steps")
    num_threads: int | None = Field(default=None, ge=1, description="threads of a CPU; null: as many as torch takes")
    attn_backend: Literal["AUTO", "TORCH", "TRITON"] = Field(default="AUTO", description="kernels of the attention")
    cuda_graph_config: CudaGraphConfig | None = CudaGraphConfig()
    disable_overlap_scheduler: bool = Field(
        default=False, description="look at a step's tokens before the next is launched; always so on a CPU"
    )
    torch_compile_config: None = Field(default=None, description="null; steps run fused kernels and CUDA graphs")
    batch_wait_timeout_ms: float = Field(
        default=0,
        ge=0,
        allow_inf_nan=False,
        description="how long prompts wait, while nothing runs, for max_batch_size of them to be there",
    )
    stream_interval: int = Field(
        default=1, ge=1, description="tokens of a message to the client; the first and the last go at once"
    )
    hang_detection_timeout: float | None = Field(
        default=300,
        ge=1,
        allow_inf_nan=False,
        description="seconds after which a step is held to hang and its worker started again; null: never",
    )
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
