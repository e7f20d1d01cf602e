"""Penalties on tokens that were there before: repetition, presence and frequency.

Owns a table on the device with a row for each request that has penalties: the distinct tokens of its history, and how
often each is in its output. A row is filled when its request is first seen; later steps send only what has changed
since, so a step costs its new tokens, not its histories. A request that is not seen again keeps its row until another
one needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pdserve.engine.layers.step_input import upload
from pdserve.protocol import Sampling

_FEWEST_SLOTS, _FEWEST_PLACES = 8, 256
# Room after a row's logits, where the places that a shorter history leaves empty point; keeps rows on 16 bytes.
_MARGIN = 16


class PenalizedRequest(Protocol):
    """What penalties depend on. The lists are the request's own, the same at every step, and only ever grow."""

    @property
    def sampling(self) -> Sampling: ...
    @property
    def prompt_ids(self) -> Sequence[int]: ...
    @property
    def output_ids(self) -> Sequence[int]: ...


def has_penalties(sampling: Sampling) -> bool:
    return bool(sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty)


class Penalties:
    """The penalties of one sampler's requests."""

    def __init__(self) -> None:
        self._table: _Table | None = None
        # Least recently used first, in slots 0, 1, ... An entry holds its request's lists, so no others have their ids.
        self._histories: dict[tuple[int, int, bool], _History] = {}
        self._step = 0

    def apply(self, logits: Tensor, requests: Sequence[PenalizedRequest]) -> Tensor:
        """A float32 copy of `logits` [n, vocab_size] with the penalties of `requests`, all of which have some.

        The repetition penalty divides positive and multiplies negative logits of every token of prompt and output
        (arXiv 1909.05858, §4.1); then presence and frequency penalties lower the output's (OpenAI API reference).
        """
        self._step += 1
        histories = [self._history(request) for request in requests]
        samplings = [request.sampling for request in requests]
        facts = [
            [history.slot for history in histories],
            [len(history.places) for history in histories],
            [sampling.repetition_penalty for sampling in samplings],
            [sampling.presence_penalty for sampling in samplings],
            [sampling.frequency_penalty for sampling in samplings],
        ]
        changes = [change for history in histories for change in history.take_changes()]
        parts = [np.array(facts, np.float64).ravel(), np.array(changes, np.float64).ravel()]
        sent_facts, sent_changes = torch.split(
            upload(np.concatenate(parts), logits.device), [len(part) for part in parts]
        )
        if self._table is None:
            self._table = _Table(logits.device)
        self._table.reserve(len(self._histories), max(len(history.places) for history in histories))
        self._table.update(sent_changes.view(-1, 4))
        return self._table.apply(logits, sent_facts.view(5, -1), max(len(history.places) for history in histories))

    def _history(self, request: PenalizedRequest) -> _History:
        """The request's history, up to date, now the most recently used."""
        counts_prompt = request.sampling.repetition_penalty != 1.0
        key = (id(request.prompt_ids), id(request.output_ids), counts_prompt)
        history = self._histories.pop(key, None)
        if history is None:
            history = _History(request.prompt_ids, request.output_ids, self._free_slot())
            if counts_prompt:
                history.add_prompt()
        history.last_used = self._step
        history.add_output()
        self._histories[key] = history
        return history

    def _free_slot(self) -> int:
        """The next slot, or that of the request that was not seen for longest if the table is full."""
        oldest = next(iter(self._histories), None)
        is_full = self._table is not None and len(self._histories) >= self._table.num_slots
        if oldest is None or not is_full or self._histories[oldest].last_used == self._step:
            return len(self._histories)
        return self._histories.pop(oldest).slot


@dataclass(slots=True)
class _History:
    """The distinct tokens of a request, each at a place of the table's row `slot`, and what the device doesn't know."""

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    slot: int
    last_used: int = 0
    places: dict[int, int] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    num_output: int = 0
    changed: set[int] = field(default_factory=set)

    def add_prompt(self) -> None:
        for token in self.prompt_ids:
            self._place(token)

    def add_output(self) -> None:
        """Count the output's tokens that are not counted yet."""
        for token in self.output_ids[self.num_output :]:
            place = self._place(token)
            self.counts[place] += 1
            self.changed.add(token)
        self.num_output = len(self.output_ids)

    def _place(self, token: int) -> int:
        place = self.places.setdefault(token, len(self.places))
        if place == len(self.counts):
            self.counts.append(0)
            self.changed.add(token)
        return place

    def take_changes(self) -> list[tuple[int, int, int, int]]:
        """(slot, place, token, times in the output) of what has changed since the last call."""
        changes = [(self.slot, self.places[token], token, self.counts[self.places[token]]) for token in self.changed]
        self.changed.clear()
        return changes


class _Table:
    """Token ids and their counts, [num_slots, num_places], on the device."""

    def __init__(self, device: torch.device) -> None:
        self._ids = torch.zeros((_FEWEST_SLOTS, _FEWEST_PLACES), dtype=torch.int64, device=device)
        self._counts = torch.zeros((_FEWEST_SLOTS, _FEWEST_PLACES), dtype=torch.float32, device=device)

    @property
    def num_slots(self) -> int:
        return self._ids.shape[0]

    def reserve(self, num_slots: int, num_places: int) -> None:
        """Double either dimension until it is as large as asked for; what is there stays."""
        old_slots, old_places = self._ids.shape
        shape = [old_slots, old_places]
        for axis, wanted in enumerate((num_slots, num_places)):
            while shape[axis] < wanted:
                shape[axis] *= 2
        if shape != [old_slots, old_places]:
            ids, counts = self._ids, self._counts
            self._ids, self._counts = ids.new_zeros(shape), counts.new_zeros(shape)
            self._ids[:old_slots, :old_places] = ids
            self._counts[:old_slots, :old_places] = counts

    def update(self, changes: Tensor) -> None:
        """Take over rows of (slot, place, token, times in the output)."""
        slots, places, tokens, counts = changes.unbind(1)
        at = (slots.long(), places.long())
        self._ids.index_put_(at, tokens.long())
        self._counts.index_put_(at, counts.float())

    def apply(self, logits: Tensor, facts: Tensor, num_places: int) -> Tensor:
        """Penalized logits, given (slot, places, repetition, presence, frequency) [5, n] of the rows."""
        num_rows, vocab_size = logits.shape
        slots, places = facts[:2].long().unbind(0)
        repetition, presence, frequency = facts[2:, :, None].float().unbind(0)
        is_used = torch.arange(num_places, device=logits.device) < places[:, None]
        ids = self._ids.index_select(0, slots)[:, :num_places].where(is_used, vocab_size)
        counts = self._counts.index_select(0, slots)[:, :num_places]
        width = vocab_size + _MARGIN
        penalized = torch.empty((num_rows, width), dtype=torch.float32, device=logits.device)
        penalized[:, :vocab_size] = logits
        at = torch.arange(num_rows, device=logits.device)[:, None] * width + ids
        values = penalized.view(-1)[at]
        values = torch.where(values > 0, values / repetition, values * repetition)
        values -= (presence + frequency * counts).where(counts > 0, 0.0)
        penalized.view(-1)[at] = values
        return penalized[:, :vocab_size]
