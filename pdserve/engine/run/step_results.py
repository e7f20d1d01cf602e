"""The results of a launched step: on their way to the host, then as messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from pdserve.engine.run.sampler import Logprobs
from pdserve.engine.schedule.batch import BatchResult
from pdserve.protocol import TokenLogprob


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probabilities of the items `indices`: `num_rows[i]` consecutive rows of `chunks` belong to `indices[i]`."""

    indices: list[int]
    num_rows: list[int]
    num_top: list[int]
    chunks: list[Logprobs]

    def to_host(self) -> Scored:
        return Scored(self.indices, self.num_rows, self.num_top, [chunk.map(to_host) for chunk in self.chunks])

    def entries(self) -> dict[int, list[TokenLogprob]]:
        """By item; the chunks must be on the host."""
        tops = [top for top, rows in zip(self.num_top, self.num_rows, strict=True) for _ in range(rows)]
        remaining = iter(tops)
        flat = (entry for chunk in self.chunks for entry in chunk.entries(list(islice(remaining, len(chunk.ids)))))
        return {index: list(islice(flat, rows)) for index, rows in zip(self.indices, self.num_rows, strict=True)}


NOTHING_SCORED = Scored([], [], [], [])


def to_host(tensor: Tensor) -> Tensor:
    """`tensor` on the host, once the stream gets there; on a CUDA device the copy only starts here."""
    return tensor.to("cpu", non_blocking=True)


class DeviceStep:
    """A step on its way. The real `pdserve.engine.schedule.batch.LaunchedStep`.

    Args:
        sampled: the items that sampled, in the order of `tokens`.
        prompts: scores of prompt tokens.
        outputs: scores of `tokens`, for the items that want them.
        verify: called once the device is done; raises if what it computed means nothing.
    """

    def __init__(
        self,
        num_items: int,
        sampled: list[int],
        tokens: Tensor,
        prompts: Scored,
        outputs: Scored,
        verify: Callable[[], None],
    ) -> None:
        self._num_items = num_items
        self._verify = verify
        self._sampled = sampled
        self._tokens = to_host(tokens)
        self._prompts, self._outputs = prompts.to_host(), outputs.to_host()
        self._done = torch.cuda.current_stream(tokens.device).record_event() if tokens.is_cuda else None

    def results(self) -> list[BatchResult]:
        """See `LaunchedStep.results`; an error of the device is torch's."""
        try:
            if self._done is not None:
                self._done.synchronize()
        finally:
            self._verify()
        token_ids = {index: (token,) for index, token in zip(self._sampled, self._tokens.tolist(), strict=True)}
        prompts, outputs = self._prompts.entries(), self._outputs.entries()
        return [
            BatchResult(
                token_ids=token_ids.get(index, ()),
                logprobs=outputs.get(index, ()),
                prompt_logprobs=prompts.get(index),
            )
            for index in range(self._num_items)
        ]
