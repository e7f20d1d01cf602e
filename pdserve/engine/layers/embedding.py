"""From token ids to the first hidden states, and from the last ones to logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from pdserve.engine.layers.builder import Builder
from pdserve.engine.layers.linear import Linear
from pdserve.engine.layers.step_input import StepInput
from pdserve.engine.layers.weight import Cut, Weight


class Embedding:
    """A row of the table for each token. Every rank of the first stage holds all of it."""

    def __init__(self, build: Builder, name: str, vocab_size: int, hidden_size: int) -> None:
        self.weight = Weight(f"{name}.weight", (vocab_size, hidden_size))
        self.table = build.tensor(self.weight)

    def __call__(self, step: StepInput) -> Tensor:
        """[num_tokens, hidden_size]."""
        return functional.embedding(step.token_ids, self.table)


class PositionedEmbedding(Embedding):
    """The sum of a token's row and of its position's, which is learned as well."""

    def __init__(
        self, build: Builder, name: str, vocab_size: int, hidden_size: int, *, positions: str, max_positions: int
    ) -> None:
        super().__init__(build, name, vocab_size, hidden_size)
        self._positions = build.tensor(Weight(f"{positions}.weight", (max_positions, hidden_size)))

    def __call__(self, step: StepInput) -> Tensor:
        return super().__call__(step).add_(functional.embedding(step.positions, self._positions))


class Head(Linear):
    """Logits of this rank's rows of the vocabulary.

    Args:
        name: of the matrix; None: it is `embedding`'s table, a view of it where that is on this rank.
    """

    def __init__(self, build: Builder, name: str | None, embedding: Embedding) -> None:
        vocab_size, hidden_size = embedding.weight.shape
        self.rows = build.mapping.vocab(vocab_size)
        if name is None and not embedding.table.is_meta:
            weight = embedding.table[self.rows.start : self.rows.stop]
        else:
            weight = build.empty(len(self.rows), hidden_size)
            stored = embedding.weight.name if name is None else f"{name}.weight"
            build.declare(Weight(stored, (vocab_size, hidden_size), Cut(0, (self.rows,))), weight)
        if name is None:
            build.ignored.append("lm_head.weight")
        super().__init__(build, weight, None)
