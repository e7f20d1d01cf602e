"""Fields that clients send and this server does not have: which of their values ask for nothing.

One table for each place. A field named there may be null or have one of its values, which mean the same as leaving it
out; anything else is refused by the field's name. `ANY` stands for hints, which never change an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, WithJsonSchema, create_model

from proxy.schemas.request import Request

ANY: Final = object()

Table = Mapping[str, Sequence[Any]]

OF_BOTH: Table = {
    "allowed_token_ids": [],
    "bad_words": [[]],
    "detokenize": [True],
    "disaggregated_params": [],
    "early_stopping": [False],
    "guided_choice": [],
    "guided_decoding_backend": [],
    "guided_grammar": [],
    "guided_json": [],
    "guided_regex": [],
    "kv_transfer_params": [],
    "length_penalty": [1.0],
    "logit_bias": [{}],
    "logits_processors": [[]],
    "lora_request": [],
    "no_repeat_ngram_size": [0],
    "priority": [0],
    "prompt_cache_retention": [ANY],
    "prompt_logprobs": [],
    "response_format": [{"type": "text"}],
    "return_tokens_as_token_ids": [False],
    "spaces_between_special_tokens": [True],
    "structured_outputs": [],
    "truncate_prompt_tokens": [],
    "use_beam_search": [False],
}
"""OpenAI's, and those that vLLM and TensorRT-LLM add."""

OF_COMPLETIONS: Table = {"prompt_embeds": [], "suffix": [""]}

OF_CHAT: Table = {
    "add_generation_prompt": [True],
    "audio": [],
    "chat_template": [],
    "continue_final_message": [False],
    "documents": [[]],
    "echo": [False],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "mm_processor_kwargs": [{}],
    "modalities": [["text"]],
    "prediction": [],
    "reasoning_effort": [],
    "verbosity": ["medium"],
    "web_search_options": [],
}

OF_MESSAGES: Table = {
    "annotations": [[]],
    "audio": [],
    "cache_control": [ANY],
    "function_call": [],
    "reasoning": [""],
    "refusal": [],
}

OF_TOKENIZE: Table = {
    "chat_template": [],
    "continue_final_message": [False],
    "mm_processor_kwargs": [{}],
    "tools": [[]],
}

OF_TEXT_PARTS: Table = {"annotations": [[]], "cache_control": [ANY]}


def asks_for_nothing(value: Any, neutral: Sequence[Any]) -> bool:
    """Whether `value` is null or one of a table's `neutral` values."""
    return value is None or any(allowed is ANY or _same(value, allowed) for allowed in neutral)


def fields(name: str, table: Table) -> type[Request]:
    """A base class with the fields of `table`; each is None after validation."""
    found: dict[str, Any] = {field: (_field(neutral), None) for field, neutral in table.items()}
    return create_model(name, __base__=Request, **found)


def _field(neutral: Sequence[Any]) -> Any:
    def check(value: Any) -> None:
        if not asks_for_nothing(value, neutral):
            raise ValueError("not supported by this server")

    annotated = Annotated[Any, BeforeValidator(check)]
    return annotated if ANY in neutral else Annotated[annotated, WithJsonSchema({"enum": [None, *neutral]})]


def _same(value: Any, allowed: Any) -> bool:
    """Equal, and of one JSON type: 1 and 1.0 are the same number, true is none."""
    return isinstance(value, bool) == isinstance(allowed, bool) and bool(value == allowed)
