"""The requests that an engine has: the open ones, the attempts that have ended, and the deadlines.

The engine calls it. It knows nothing of blocks or batches. `check_limits` refuses requests that can never run here.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from pdserve.engine.schedule.sequence import Sequence
from pdserve.errors import Aborted, LimitExceeded, RequestError
from pdserve.protocol import EngineLimits, GenerateRequest, Key

# So many ended requests are remembered, so that late messages of their attempts are recognised.
_REMEMBERED_REQUESTS = 65536
_DEADLINE_SLACK = 1024


class RequestTable:
    """Live requests by id, at most one attempt of each."""

    def __init__(self) -> None:
        self._live: dict[str, Sequence] = {}
        self._ended: OrderedDict[str, int] = OrderedDict()
        self._deadlines: list[tuple[float, Key]] = []

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._live.values())

    def find(self, key: Key) -> Sequence | None:
        """The sequence of exactly this attempt, if it is open."""
        sequence = self._live.get(key.request_id)
        return sequence if sequence is not None and sequence.key == key else None

    def is_outdated(self, key: Key) -> bool:
        """Whether this attempt, or a newer one, was seen before."""
        live = self._live.get(key.request_id)
        newest = self._ended.get(key.request_id, -1) if live is None else live.key.attempt
        return key.attempt <= newest

    def supersede(self, key: Key) -> Sequence | None:
        """The live older attempt that `key` replaces, if there is one.

        Raises:
            RequestError: this very attempt was submitted before.
            Aborted: a newer attempt was.
        """
        live = self._live.get(key.request_id)
        newest = self._ended.get(key.request_id, -1) if live is None else live.key.attempt
        if key.attempt == newest:
            raise RequestError(f"attempt {key.attempt} of this request was submitted before", "key")
        if key.attempt < newest:
            raise Aborted(f"attempt {newest} of this request replaced attempt {key.attempt}", "key")
        return live

    def add(self, sequence: Sequence) -> None:
        self._live[sequence.key.request_id] = sequence
        heapq.heappush(self._deadlines, (sequence.deadline_s, sequence.key))
        # Requests mostly end long before their deadlines: without this the heap would grow with throughput x timeout.
        if len(self._deadlines) > 2 * len(self._live) + _DEADLINE_SLACK:
            self._deadlines = [(each.deadline_s, each.key) for each in self]
            heapq.heapify(self._deadlines)

    def end(self, key: Key) -> None:
        """The attempt has its `Finished`."""
        if self.find(key) is not None:
            del self._live[key.request_id]
        if key.attempt > self._ended.get(key.request_id, -1):
            self._ended[key.request_id] = key.attempt
        if len(self._ended) > _REMEMBERED_REQUESTS:
            self._ended.popitem(last=False)

    def expired(self, now_s: float) -> Iterable[Sequence]:
        """Yield the open sequences whose deadline has passed. The caller ends them."""
        while self._deadlines and self._deadlines[0][0] <= now_s:
            sequence = self.find(heapq.heappop(self._deadlines)[1])
            if sequence is not None:
                yield sequence

    def next_deadline_s(self) -> float | None:
        """The earliest deadline of an open sequence; None if none is open."""
        while self._deadlines and self.find(self._deadlines[0][1]) is None:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None


def check_limits(request: GenerateRequest, limits: EngineLimits, enable_chunked_prefill: bool) -> None:
    """Raises `LimitExceeded`, which names the limit, if the request can never run here."""
    num_tokens = len(request.token_ids)
    if num_tokens >= limits.max_seq_len:
        raise LimitExceeded(
            f"a prompt of {num_tokens} tokens leaves no room for output: max_seq_len is {limits.max_seq_len}",
            "max_seq_len",
        )
    num_blocks = min(group.num_blocks for group in limits.cache_groups)
    if num_tokens > num_blocks * limits.tokens_per_block:
        raise LimitExceeded(
            f"a prompt of {num_tokens} tokens does not fit into the KV cache of {num_blocks} blocks "
            f"of {limits.tokens_per_block} tokens",
            "num_blocks",
        )
    too_long = request.num_prompt_tokens > limits.max_num_tokens
    if too_long and not enable_chunked_prefill and request.phase != "generation":
        raise LimitExceeded(
            f"a prompt of {request.num_prompt_tokens} tokens exceeds max_num_tokens, {limits.max_num_tokens}, "
            "and enable_chunked_prefill is off",
            "max_num_tokens",
        )
