"""The border between scheduling and running: `BatchItem` and `BlockCopy` go to the runner, `BatchResult` comes back.

`Runner` is what the engine asks to run steps; `pdserve.engine.run.model_runner` has the real one. No torch here.
"""

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

    Attributes:
        token_ids: the tokens to compute, at positions `start`, `start` + 1, and so on.
        start: how many tokens come before. Their KV is in the blocks of `tables`.
        tables: one block table a cache group. Position p is in entry p // tokens_per_block of each; the tables have
            room for the new tokens.
        num_sampled: a token is drawn after each of the last `num_sampled` of `token_ids`; 0: none is drawn. The first
            of them is the sequence's own, the others are `drafts`.
        sampling: how tokens are drawn.
        prompt_ids, output_ids: the whole history without drafts, for penalties, `min_tokens` and the sampling key.
        next_prompt_token: the prompt token after the last of `token_ids`; None where the prompt ends.
        want_prompt_logprobs: score each prompt token that follows one of `token_ids`.
        previous: the item of the step launched just before this one that draws this item's only token. The host does
            not know that token yet: `token_ids` holds a stand-in, and `output_ids` lacks it. None: the token is given.
        export_key: the request whose KV goes to a peer: the runner tells its `exporter` as layers are computed. None:
            the KV stays here.
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
        """The guessed tokens at the end of `token_ids`.

        The draw after a draft is made as if all drafts up to it were output. It counts only if they were drawn, too.
        """
        return self.token_ids[len(self.token_ids) - self.num_sampled + 1 :] if self.num_sampled > 1 else ()


def confirmed(draws: Sequence[int], drafts: Sequence[int]) -> Sequence[int]:
    """The draws of an item that count: up to and with the first that differs from the draft in its place.

    Args:
        draws: one more than `drafts`; `draws[i]` was made where `drafts[i]` had been guessed.
    """
    for at, (draw, draft) in enumerate(zip(draws, drafts, strict=False)):
        if draw != draft:
            return draws[: at + 1]
    return draws


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """A copy of one whole block of cache group `group`, with all of the group's layers, from `source` to `target`.

    "duplicate" copies within the pool, "offload" from the pool to the host's blocks, "onboard" from the host's blocks
    to the pool. `source` and `target` are block numbers.
    """

    kind: Literal["duplicate", "offload", "onboard"]
    source: int
    target: int
    group: int = 0


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What one `BatchItem` has yielded.

    Attributes:
        token_ids: the draws that count: 1 to `num_sampled` of them, none for an item that drew nothing.
        logprobs: an entry for each of `token_ids`; empty if the request wants none.
        prompt_logprobs: entry i scores the prompt token that follows the item's `token_ids[i]`. Where the prompt ends
            with the item, its last token has no entry. None if the request wants none.
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

    Attributes:
        limits: what a step and a request may be.
        is_asynchronous: whether `launch` returns before the step has run.
        num_host_blocks: blocks of the pool in host memory.
        exporter: set by the engine. `launch` tells it how far the KV of items with an `export_key` is enqueued.
    """

    limits: EngineLimits
    is_asynchronous: bool
    num_host_blocks: int
    exporter: KvExporter | None

    def launch(self, items: Sequence[BatchItem], copies: Sequence[BlockCopy] = ()) -> LaunchedStep:
        """Start one step and return without waiting for it.

        Steps run in the order of their launches. The copies of a step are made before it, one after the other.

        Args:
            items: at most `limits.max_num_tokens` tokens together. There is at least one item or one copy.

        Raises:
            RunnerLost: no step can run any more.
            Exception: the device's error. Nothing is known to be computed or copied.
        """
        ...

    def probe(self) -> None:
        """Wait until whatever was launched is over, then run a step that belongs to no request.

        Raises if no step can succeed any more.
        """
        ...

    def close(self) -> None:
        """End whatever works for the runner; no step follows. May be called twice."""
        ...
