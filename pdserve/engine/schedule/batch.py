"""What the scheduler asks of the model runner for one step, and what it gets back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pdserve.errors import EngineError
from pdserve.handoff import KvExporter
from pdserve.protocol import EngineLimits, Key, Sampling, TokenLogprob


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One sequence's share of a step.

    `token_ids` are computed at positions `start`, `start` + 1, ...; KV of everything before `start` is already in the
    blocks of `tables`, one table a cache group, which also have room for the new tokens (position `p` lives in block
    `p // tokens_per_block` of each). `prompt_ids` and `output_ids` are the whole history, for penalties, `min_tokens`
    and the sampling key, where a token is drawn.

    After each of the last `num_sampled` tokens one is drawn. All but the first of these tokens are `drafts`: each
    was guessed ahead of the draw after the token before it, and stands in no history. The draw after a draft is made as
    if the drafts up to it were output, and counts only if they were drawn, too.

    `want_prompt_logprobs` asks for the log-probability of each prompt token that follows one of `token_ids`;
    `next_prompt_token` is the prompt token after the last of them, None where the prompt ends.

    `export_key` is set where the KV goes to a peer: the runner tells its `exporter` of it, layers by layers.
    `previous`: the only token is the one that item number `previous` of the step launched just before this one samples,
    and not known on the host yet; what stands in `token_ids` means nothing, and `output_ids` lacks that token.
    """

    token_ids: Sequence[int]
    start: int
    tables: Sequence[Sequence[int]]
    num_sampled: int
    sampling: Sampling
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()
    next_prompt_token: int | None = None
    want_prompt_logprobs: bool = False
    previous: int | None = None
    export_key: Key | None = None

    @property
    def drafts(self) -> Sequence[int]:
        """The drafts at the end of `token_ids`."""
        return self.token_ids[len(self.token_ids) - self.num_sampled + 1 :] if self.num_sampled > 1 else ()


def confirmed(draws: Sequence[int], drafts: Sequence[int]) -> Sequence[int]:
    """Which of an item's `draws`, one more than `drafts`, count: up to the first that is not the draft in its place."""
    for at, (draw, draft) in enumerate(zip(draws, drafts, strict=False)):
        if draw != draft:
            return draws[: at + 1]
    return draws


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """One block's KV in cache group `group`, all of the group's layers, copied whole.

    "duplicate" goes from the pool's block `source` to its block `target`, "offload" from the pool to the host's blocks,
    "onboard" from the host's blocks to the pool.
    """

    kind: Literal["duplicate", "offload", "onboard"]
    source: int
    target: int
    group: int = 0


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What the runner has to say of one `BatchItem`.

    `token_ids` are the draws that count, from 1 to `num_sampled`, none for an item that did not sample; `logprobs`,
    where they were asked for, has an entry for each. `prompt_logprobs[i]` scores the token that follows the item's
    `token_ids[i]` in the prompt; it has one entry less when `next_prompt_token` is None.
    """

    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()
    prompt_logprobs: list[TokenLogprob] | None = None


class RunnerLost(EngineError):
    """The runner can't run this step or any other: its host must end."""


class LaunchedStep(Protocol):
    """A step that the device runs or has run."""

    def results(self) -> list[BatchResult]:
        """Wait for the step; results stand in the order of its items. Raises `RunnerLost`, or the device's error."""
        ...


class Runner(Protocol):
    """The part of the engine that owns the model and the KV pool. `ModelRunner` is the real one.

    `is_asynchronous`: whether `launch` returns before the step has run. `num_host_blocks`: how many blocks there are in
    the second pool, in host memory. `exporter` is set by the engine, and told of the KV that goes to peers, as it is
    launched.
    """

    limits: EngineLimits
    is_asynchronous: bool
    num_host_blocks: int
    exporter: KvExporter | None

    def launch(self, items: Sequence[BatchItem], copies: Sequence[BlockCopy] = ()) -> LaunchedStep:
        """Start one step and return without waiting for it: at most `limits.max_num_tokens` tokens.

        Steps run in the order of their launches, each after whatever was launched before. The step's `copies` are made
        first, one after the other. There is at least one item or one copy. Raises `RunnerLost`, or the device's error.
        """
        ...

    def probe(self) -> None:
        """Wait until whatever was launched is over, then run a step of no request's. Raises if no step can succeed."""
        ...

    def close(self) -> None:
        """End whatever works for the runner; no step follows. May be called twice."""
        ...
