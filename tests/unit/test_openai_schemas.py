"""The request models: what is accepted, what is refused, and by which name."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage
from pydantic import ValidationError

from pdserve.errors import RequestError
from pdserve.generation_defaults import GenerationDefaults
from pdserve.sampling_params import SamplingParams
from pdserve.seeds import choice_seeds
from proxy.sampling import to_sampling
from proxy.schemas import neutral
from proxy.schemas.chat import MAX_MESSAGES, ChatCompletionRequest
from proxy.schemas.completions import CompletionRequest

USER = [{"role": "user", "content": "hi"}]


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "p", **fields})


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"model": "m", "messages": USER, **fields})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_all_forms_of_a_prompt(prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt=prompt).prompt == prompts


@pytest.mark.parametrize("prompt", [None, [], {}, 3, [True], [1, "a"], ["a", [1]], [[1.0]], [-1], [[1], -1]])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        completion(prompt=prompt)
    assert caught.value.errors()[0]["loc"] == ("prompt",)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("max_tokens", 5.0),
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("temperature", float("nan")),
        ("top_p", 1.01),
        ("top_p", float("inf")),
        ("n", 0),
        ("n", 1000),
        ("seed", 2**63),
        ("logprobs", 6),
        ("logprobs", True),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", 3),
        ("stop_token_ids", [True]),
        ("stream", 1),
        ("echo", "yes"),
        ("suffix", "x"),
        ("logit_bias", {"1": 5}),
        ("no_such_field", None),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("top_k", -2),
        ("min_p", 1.1),
    ],
)
def test_a_bad_value_is_refused_by_the_fields_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        completion(**{field: value})
    assert caught.value.errors()[0]["loc"][0] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("functions", [{}]),
        ("modalities", ["audio"]),
        ("reasoning_effort", "low"),
        ("messages", []),
        ("messages", "hi"),
        ("top_logprobs", 21),
        ("max_completion_tokens", 0),
    ],
)
def test_chat_refuses_what_it_cannot_do(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        chat(**{field: value})
    assert caught.value.errors()[0]["loc"][0] == field


@pytest.mark.parametrize(
    "message",
    [
        {"role": "robot", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": 3},
        {"role": "user", "content": "x", "mood": "good"},
        {"role": "assistant", "tool_calls": [{}]},
    ],
)
def test_bad_messages_are_refused_with_their_place(message: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        chat(messages=[*USER, message])
    assert caught.value.errors()[0]["loc"][:2] == ("messages", 1)


def test_what_asks_for_nothing_is_accepted() -> None:
    everything = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "logit_bias": {}}
    assert (
        chat(**everything, tools=[], tool_choice="none", response_format={"type": "text"}, n=None, stop=None).stop == ()
    )
    assert completion(**everything, suffix="", best_of=1, stop="x").stop == ("x",)


@pytest.mark.parametrize("table", [neutral.OF_BOTH, neutral.OF_CHAT, neutral.OF_COMPLETIONS])
def test_neutral_values_pass_and_others_are_refused_by_name(table: neutral.Table) -> None:
    make = completion if table is neutral.OF_COMPLETIONS else chat
    for field, values in table.items():
        for value in (None, *values):
            make(**{field: {"any": "hint"} if value is neutral.ANY else value})
        if neutral.ANY not in values:
            with pytest.raises(ValidationError) as caught:
                make(**{field: "something else"})
            assert caught.value.errors()[0]["loc"] == (field,)
            assert "not supported" in caught.value.errors()[0]["msg"]


def test_numbers_are_neutral_in_either_form_and_booleans_are_no_numbers() -> None:
    chat(length_penalty=1, priority=0.0, use_beam_search=False)
    for field, value in (("length_penalty", True), ("priority", False), ("use_beam_search", 0)):
        with pytest.raises(ValidationError):
            chat(**{field: value})


@pytest.mark.parametrize("make", [chat, completion])
def test_best_of_may_say_what_n_says(make: Any) -> None:
    make(best_of=1)
    make(best_of=3, n=3)
    with pytest.raises(RequestError) as caught:
        make(best_of=2)
    assert caught.value.param == "best_of"


def test_hints_in_messages_and_parts_pass() -> None:
    hint = {"type": "ephemeral"}
    part = {"type": "text", "text": "a", "cache_control": hint}
    message = {"role": "user", "content": [part], "cache_control": hint}
    assert chat(messages=[message]).messages[0].for_template() == {"role": "user", "content": "a"}


def test_an_assistants_message_comes_back_as_openais_client_returns_it() -> None:
    returned = ChatCompletionMessage(role="assistant", content="Hello.").model_dump()
    assert None in returned.values()
    assert chat(messages=[*USER, returned, *USER]).messages[1].for_template() == {
        "role": "assistant",
        "content": "Hello.",
    }


def test_messages_are_counted_before_they_are_looked_at() -> None:
    with pytest.raises(ValidationError) as caught:
        chat(messages=[{}] * (MAX_MESSAGES + 1))
    assert [error["loc"] for error in caught.value.errors()] == [("messages",)]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].for_template()["content"] == "a\nb"


def test_fields_that_must_agree_are_named() -> None:
    with pytest.raises(RequestError) as caught:
        completion(best_of=3, n=2)
    assert caught.value.param == "best_of"
    with pytest.raises(RequestError) as caught:
        chat(top_logprobs=2)
    assert caught.value.param == "top_logprobs"


def test_seeds_are_63_bits_distinct_and_repeatable() -> None:
    assert choice_seeds(7, 4) == choice_seeds(7, 4)
    assert choice_seeds(7, 4)[0] == 7
    assert len(set(choice_seeds(7, 128))) == 128
    assert choice_seeds(7, 2) == choice_seeds(7, 4)[:2]
    assert all(0 <= seed < 2**63 for seed in [*choice_seeds(-5, 3), *choice_seeds(None, 3)])
    assert choice_seeds(None, 1) != choice_seeds(None, 1)
    assert not set(choice_seeds(7, 8)) & set(choice_seeds(8, 8))
    params = SamplingParams(seed=7, n=4)
    assert [params.to_sampling(0, choice).seed for choice in range(4)] == choice_seeds(7, 4), "one rule for both fronts"


def test_the_models_defaults_stand_in_for_what_is_left_out() -> None:
    defaults = GenerationDefaults(temperature=0.6, top_p=0.9, top_k=40)
    left_out = to_sampling(completion(), defaults, 1, 10)
    assert (left_out.temperature, left_out.top_p, left_out.top_k) == (0.6, 0.9, 40)
    given = to_sampling(completion(temperature=0, top_p=1, top_k=-1), defaults, 1, 10)
    assert (given.temperature, given.top_p, given.top_k) == (0.0, 1.0, 0)
    plain = to_sampling(completion(), GenerationDefaults(), 1, 10)
    assert (plain.temperature, plain.top_p, plain.top_k) == (1.0, 1.0, 0)


def test_an_empty_nucleus_is_greedy() -> None:
    sampling = to_sampling(completion(top_p=0), GenerationDefaults(), 1, 10)
    assert (sampling.top_p, sampling.top_k) == (1.0, 1)
