"""What the engine has to say to its clients, collected until the host takes it as a frame.

Owns the frame in the making and, through each sequence's `num_told`, which tokens its client has been told. Decides
nothing about when a request ends.
"""

from __future__ import annotations

from pdserve.engine.schedule.sequence import Sequence
from pdserve.errors import PdserveError
from pdserve.protocol import Finished, FinishReason, Key, OutputFrame, TokenDelta, TokenLogprob


class Outbox:
    """Deltas and endings. A sequence's tokens go out `stream_interval` at a time, the first and the last at once."""

    def __init__(self, stream_interval: int) -> None:
        self._stream_interval = stream_interval
        self._deltas: list[TokenDelta] = []
        self._finished: list[Finished] = []

    def __bool__(self) -> bool:
        return bool(self._deltas or self._finished)

    def token(self, sequence: Sequence, logprob: TokenLogprob | None, is_first: bool) -> None:
        """`sequence` has got its next token, with `logprob` if it was asked for."""
        if logprob is not None:
            sequence.untold_logprobs.append(logprob)
        if is_first or len(sequence.output_ids) - sequence.num_told >= self._stream_interval:
            self._tell(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason, now_s: float, error: PdserveError | None) -> None:
        """The one end of a request, after all its tokens."""
        if sequence.num_told < len(sequence.output_ids):
            self._tell(sequence)
        milestones = sequence.milestones
        timings, kv_bytes = milestones.timings(now_s), milestones.handoff_cost.nbytes
        info = None if error is None else error.to_info()
        self._finished.append(Finished(sequence.key, reason, sequence.usage(), timings, info, kv_bytes))

    def refuse(self, key: Key, error: PdserveError) -> None:
        """A request that never became a sequence, or is forgotten as one."""
        self._finished.append(Finished(key, "error", error=error.to_info()))

    def take(self) -> OutputFrame:
        frame = OutputFrame(self._deltas, self._finished)
        self._deltas, self._finished = [], []
        return frame

    def _tell(self, sequence: Sequence) -> None:
        start = sequence.num_told
        token_ids, logprobs = sequence.output_ids[start:], sequence.untold_logprobs
        self._deltas.append(TokenDelta(sequence.key, start, token_ids, logprobs or None, sequence.prompt_logprobs))
        sequence.num_told += len(token_ids)
        if logprobs:
            sequence.untold_logprobs = []
