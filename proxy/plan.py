"""What a request asks for, in the terms that all endpoints share.

An endpoint's plan function makes a `Plan` from its own kind of body. It does no work that grows with the texts:
`intake` renders and tokenizes them, off the event loop, and only after the request has its places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pdserve.generation_defaults import GenerationDefaults
from pdserve.protocol import Sampling


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the model's chat template. `messages` makes what the template sees, `num_messages` of them, `tools`
    what it sees of the functions that the model may call; both are called in a thread where that is much. `variables`
    are further ones of the template."""

    num_messages: int
    messages: Callable[[], list[dict[str, Any]]]
    variables: Mapping[str, Any] | None = None
    tools: Callable[[], list[dict[str, Any]]] = list


class Prompt(NamedTuple):
    """One prompt as tokens. `text` is what the client wrote; None for a prompt of token ids, or if it is not needed."""

    token_ids: list[int]
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """See the module.

    Attributes:
        model: the name that the client gave.
        prompts: a conversation, which is one prompt; or texts, or lists of token ids.
        sampling: makes a choice's sampling from the model's defaults, its seed and its `max_tokens`.
        num_choices: for each prompt.
        max_tokens: of each choice; None means the model's own default, or the rest of the context.
        add_special_tokens: whether the tokenizer puts its own around a text.
        stream: whether tokens are sent as they come.
        stop: strings that end a choice's text.
        include_stop: whether what ends the text belongs to it.
        skip_special_tokens: whether special tokens are left out of the text, but for `shown_special_ids`.
        echo: whether a choice begins with its prompt's text.
        discard_output: for answers that consist of the prompt alone.
        prompt_param, limit_param: the fields to name in errors about the prompts and about lengths.
    """

    model: str
    prompts: Conversation | Sequence[str | list[int]]
    sampling: Callable[[GenerationDefaults, int, int], Sampling]
    num_choices: int = 1
    seed: int | None = None
    max_tokens: int | None = None
    cache_salt: str = ""
    add_special_tokens: bool = True
    stream: bool = False
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    shown_special_ids: frozenset[int] = frozenset()
    echo: bool = False
    discard_output: bool = False
    prompt_param: str = "prompt"
    limit_param: str = "max_tokens"

    @property
    def num_prompts(self) -> int:
        return 1 if isinstance(self.prompts, Conversation) else len(self.prompts)
