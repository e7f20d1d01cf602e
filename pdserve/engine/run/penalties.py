"""Penalties on tokens that were there before: repetition, presence and frequency.

Owns a table on the device with a row for each request that has penalties: the distinct tokens of its history, and how
often each is in its output. A row is filled when its request is first seen; later steps send only what has changed
since, so a step costs its new tokens, not its histories. A request that is not seen again keeps its row until another
one needs it. Drafts are no part of a history: what they add to it is sent beside, for the rows that come after them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pdserve.engine.layers.step_input import upload
from pdserve.engine.schedule.batch import BatchItem
from pdserve.protocol import Sampling

_FEWEST_ROWS, _FEWEST_PLACES = 8, 256
# Room after a row's logits, where the places that a shorter history leaves empty point; keeps rows on 16 bytes.
_MARGIN = 16


def has_penalties(sampling: Sampling) -> bool:
    return bool(sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty)


class Penalties:
    """The penalties of one sampler's requests."""

    def __init__(self) -> None:
        self._table: _Table | None = None
        # Least recently used first, in rows 0, 1, ... An entry holds its request's lists, so no others have their ids.
        self._histories: dict[tuple[int, int, bool], _History] = {}
        self._step = 0

    def apply(self, logits: Tensor, items: Sequence[BatchItem], num_drafts: Sequence[int]) -> Tensor:
        """A float32 copy of `logits` [n, vocab_size] with the penalties of `items`, all of which have some; in each row
        the first `num_drafts` of its item's drafts count as output.

        The repetition penalty divides positive and multiplies negative logits of every token of prompt and output
        (arXiv 1909.05858, §4.1); then presence and frequency penalties lower the output's (OpenAI API reference).
        """
        self._step += 1
        histories = [self._history(item) for item in items]
        samplings = [item.sampling for item in items]
        facts = [
            [history.table_row for history in histories],
            [len(history.places) for history in histories],
            [sampling.repetition_penalty for sampling in samplings],
            [sampling.presence_penalty for sampling in samplings],
            [sampling.frequency_penalty for sampling in samplings],
        ]
        changes = [change for history in histories for change in history.take_changes()]
        drafted = [
            (row, token, count)
            for row, (history, item, num) in enumerate(zip(histories, items, num_drafts, strict=True))
            for token, count in (history.counts_after(item.drafts[:num]) if num else ())
        ]
        parts = [np.array(each, np.float64).ravel() for each in (facts, changes, drafted)]
        sent = torch.split(upload(np.concatenate(parts), logits.device), [len(part) for part in parts])
        if self._table is None:
            self._table = _Table(logits.device)
        num_places = max(len(history.places) for history in histories)
        self._table.reserve(len(self._histories), num_places)
        self._table.update(sent[1].view(-1, 4))
        return self._table.apply(logits, sent[0].view(5, -1), num_places, sent[2].view(-1, 3))

    def _history(self, item: BatchItem) -> _History:
        """The history of the item's request, up to date, now the most recently used."""
        counts_prompt = item.sampling.repetition_penalty != 1.0
        key = (id(item.prompt_ids), id(item.output_ids), counts_prompt)
        history = self._histories.pop(key, None)
        if history is None:
            history = _History(item.prompt_ids, item.output_ids, self._free_row())
            if counts_prompt:
                history.add_prompt()
        history.last_used = self._step
        history.add_output()
        self._histories[key] = history
        return history

    def _free_row(self) -> int:
        """The next row, or that of the request that was not seen for longest if the table is full."""
        oldest = next(iter(self._histories), None)
        is_full = self._table is not None and len(self._histories) >= self._table.num_rows
        if oldest is None or not is_full or self._histories[oldest].last_used == self._step:
            return len(self._histories)
        return self._histories.pop(oldest).table_row


@dataclass(slots=True)
class _History:
    """The distinct tokens of a request, each at a place of `table_row`, and what the device doesn't know.

    The lists are the request's own, the same at every step, and only ever grow.
    """

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    table_row: int
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

    def counts_after(self, drafts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Each of `drafts`, and how often it would be in the output with them."""
        for token, times in Counter(drafts).items():
            yield token, times + (self.counts[self.places[token]] if token in self.places else 0)

    def take_changes(self) -> list[tuple[int, int, int, int]]:
        """(table row, place, token, times in the output) of what has changed since the last call."""
        changes = [
            (self.table_row, self.places[token], token, self.counts[self.places[token]]) for token in self.changed
        ]
        self.changed.clear()
        return changes


class _Table:
    """Token ids and their counts, [num_rows, num_places], on the device."""

    def __init__(self, device: torch.device) -> None:
        self._ids = torch.zeros((_FEWEST_ROWS, _FEWEST_PLACES), dtype=torch.int64, device=device)
        self._counts = torch.zeros((_FEWEST_ROWS, _FEWEST_PLACES), dtype=torch.float32, device=device)

    @property
    def num_rows(self) -> int:
        return self._ids.shape[0]

    def reserve(self, num_rows: int, num_places: int) -> None:
        """Double either dimension until it is as large as asked for; what is there stays."""
        old_rows, old_places = self._ids.shape
        shape = [old_rows, old_places]
        for axis, wanted in enumerate((num_rows, num_places)):
            while shape[axis] < wanted:
                shape[axis] *= 2
        if shape != [old_rows, old_places]:
            ids, counts = self._ids, self._counts
            self._ids, self._counts = ids.new_zeros(shape), counts.new_zeros(shape)
            self._ids[:old_rows, :old_places] = ids
            self._counts[:old_rows, :old_places] = counts

    def update(self, changes: Tensor) -> None:
        """Take over rows of (table row, place, token, times in the output)."""
        table_rows, places, tokens, counts = changes.unbind(1)
        at = (table_rows.long(), places.long())
        self._ids.index_put_(at, tokens.long())
        self._counts.index_put_(at, counts.float())

    def apply(self, logits: Tensor, facts: Tensor, num_places: int, drafted: Tensor) -> Tensor:
        """Penalized logits, given (table row, places, repetition, presence, frequency) [5, n] of the rows; (row, token,
        times in the output) of each of `drafted` holds instead of what the table says."""
        num_rows, vocab_size = logits.shape
        table_rows, places = facts[:2].long().unbind(0)
        penalties = facts[2:, :, None].float()
        is_used = torch.arange(num_places, device=logits.device) < places[:, None]
        ids = self._ids.index_select(0, table_rows)[:, :num_places].where(is_used, vocab_size)
        counts = self._counts.index_select(0, table_rows)[:, :num_places]
        width = vocab_size + _MARGIN
        penalized = torch.empty((num_rows, width), dtype=torch.float32, device=logits.device)
        penalized[:, :vocab_size] = logits
        at = torch.arange(num_rows, device=logits.device)[:, None] * width + ids
        penalized.view(-1)[at] = _penalize(penalized.view(-1)[at], counts, penalties)
        if len(drafted):
            rows, tokens = drafted[:, :2].long().unbind(1)
            values = logits[rows, tokens].float()[:, None]
            own = penalties.index_select(1, rows)
            penalized[rows, tokens] = _penalize(values, drafted[:, 2:].float(), own)[:, 0]
        return penalized[:, :vocab_size]


def _penalize(values: Tensor, counts: Tensor, penalties: Tensor) -> Tensor:
    """Logits `values` [n, k] of tokens that were there before, `counts` times in the output, under (repetition,
    presence, frequency) [3, n, 1]."""
    repetition, presence, frequency = penalties.unbind(0)
    values = torch.where(values > 0, values / repetition, values * repetition)
    return values - (presence + frequency * counts).where(counts > 0, 0.0)
