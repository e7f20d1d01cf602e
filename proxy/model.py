"""The model this proxy serves: its name, tokenizer, chat template and sampling defaults. Immutable after loading."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdserve.errors import ModelNotFound, RequestError
from pdserve.generation_defaults import GenerationDefaults
from pdserve.text.tokenizer import Tokenizer
from proxy.chat_template import ChatTemplate
from proxy.parsers.calls import ToolFormat
from proxy.parsers.reasoning import ReasoningFormat


@dataclass(frozen=True, slots=True)
class ServedModel:
    """`tokenizer` is None for a model without one, or when it is switched off: prompts are token ids then and answers
    carry no text. `tools` and `reasoning` say how the model writes calls and reasoning, None if that is not looked for.
    `vocab_size` is None if the model folder doesn't tell, `fingerprint` if it holds no weights."""

    name: str
    tokenizer: Tokenizer | None = None
    template: ChatTemplate | None = None
    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    vocab_size: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    fingerprint: str | None = None
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    created: int = field(default_factory=lambda: int(time.time()))

    def check_name(self, name: str) -> None:
        """Raises ModelNotFound for another model's name."""
        if name != self.name:
            raise ModelNotFound(f"the model {name!r} does not exist; this server has {self.name!r}", "model")

    def marker_ids(self, with_tools: bool) -> frozenset[int]:
        """The special tokens that mark reasoning and, `with_tools`, calls."""
        formats = [self.reasoning, self.tools if with_tools else None]
        markers = [marker for each in formats if each is not None for marker in each.markers]
        return frozenset() if self.tokenizer is None or not markers else self.tokenizer.special_ids(markers)

    def check_vocabulary(self, token_ids: Sequence[int], param: str) -> None:
        """Raises RequestError if one of `token_ids` is no token."""
        if self.vocab_size is not None and token_ids and max(token_ids) >= self.vocab_size:
            raise RequestError(
                f"{param}: token id {max(token_ids)} is out of the vocabulary of {self.vocab_size} tokens", param
            )

    def need_tokenizer(self, param: str) -> Tokenizer:
        """Raises RequestError, naming the field that can't be served without a tokenizer."""
        if self.tokenizer is None:
            raise RequestError(f"{param}: this server has no tokenizer; only token ids can be served", param)
        return self.tokenizer
