"""Nothing that a request may hold ends the engine or harms another request: what breaks a rule is refused by name."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from pdserve.engine.schedule.engine import Engine
from pdserve.protocol import GenerateRequest, Key, Sampling
from pdserve.sampling_rules import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS, SAMPLING_RULES
from tests.fakes.fake_runner import SMALL_LIMITS, FakeRunner, expected_output
from tests.unit.engine_bench import PROMPT, make, request, run

VOCAB = SMALL_LIMITS.vocab_size

BAD_SAMPLING: list[tuple[str, Any]] = [
    ("seed", -1),
    ("seed", 1 << 63),
    ("seed", 1.0),
    ("max_tokens", 0),
    ("max_tokens", None),
    ("max_tokens", True),
    ("min_tokens", -1),
    ("min_tokens", 7),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", 1e300),
    ("temperature", 10**400),
    ("temperature", "hot"),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_p", math.nan),
    ("top_k", -1),
    ("top_k", 1 << 31),
    ("top_k", 1.5),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 1e-300),
    ("repetition_penalty", math.inf),
    ("presence_penalty", 2.1),
    ("presence_penalty", math.nan),
    ("frequency_penalty", -2.1),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", (VOCAB,)),
    ("stop_token_ids", (2**70,)),
    ("stop_token_ids", (1.0,)),
    ("stop_token_ids", (3,) * (MAX_STOP_TOKEN_IDS + 1)),
    ("stop_token_ids", None),
    ("ignore_eos", None),
    ("logprobs", -3),
    ("logprobs", MAX_LOGPROBS + 1),
    ("logprobs", 2**70),
    ("logprobs", 1.0),
    ("prompt_logprobs", -1),
    ("prompt_logprobs", MAX_LOGPROBS + 1),
]

BAD_FIELDS: list[tuple[str, Any]] = [
    ("token_ids", [5, -1]),
    ("token_ids", [5, VOCAB]),
    ("token_ids", [5, 2**70]),
    ("token_ids", [5, True]),
    ("token_ids", [5, 1.0]),
    ("token_ids", [5, None]),
    ("token_ids", [5, "6"]),
    ("token_ids", [[5]]),
    ("token_ids", "5 6"),
    ("token_ids", []),
    ("token_ids", None),
    ("num_prompt_tokens", 0),
    ("num_prompt_tokens", len(PROMPT) + 1),
    ("num_prompt_tokens", 1.0),
    ("timeout_s", 0.0),
    ("timeout_s", math.nan),
    ("timeout_s", math.inf),
    ("timeout_s", "soon"),
    ("cache_salt", None),
    ("cache_salt", "\ud800"),
]


def check_that_only_it_is_refused(bad: GenerateRequest, field: str) -> None:
    """Beside a request that runs, and before one that comes."""
    engine, runner = make()
    good = request("good")
    engine.submit(good)
    engine.submit(bad)
    engine.submit(request("later"))
    client = run(engine)
    error = client.finished[bad.key].error
    assert error is not None
    assert (error.status, error.param, error.retryable) == (400, field, False)
    assert len(error.message) < 200
    expected = expected_output(PROMPT, good.sampling, SMALL_LIMITS)
    for name in ("good", "later"):
        assert (client.tokens(name), client.end(name).reason) == expected
    assert engine.failure is None
    assert not runner.mistakes
    assert engine.is_idle
    engine.check()


@pytest.mark.parametrize(("field", "value"), BAD_SAMPLING)
def test_a_sampling_field_at_fault_is_named(field: str, value: Any) -> None:
    check_that_only_it_is_refused(request("bad", **{field: value}), field)


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_a_field_at_fault_is_named(field: str, value: Any) -> None:
    check_that_only_it_is_refused(msgspec.structs.replace(request("bad"), **{field: value}), field)


@pytest.mark.parametrize(
    ("key", "field"),
    [
        (Key(5, 0), "request_id"),  # type: ignore[arg-type]
        (Key("\ud800", 0), "request_id"),
        (Key("bad", -1), "attempt"),
        (Key("bad", 1.5), "attempt"),  # type: ignore[arg-type]
    ],
)
def test_a_key_at_fault_is_refused(key: Key, field: str) -> None:
    check_that_only_it_is_refused(msgspec.structs.replace(request("bad"), key=key), field)


@pytest.mark.parametrize("phase", ["context", "generation"])
def test_every_phase_is_checked(phase: Any) -> None:
    check_that_only_it_is_refused(request("bad", phase=phase, logprobs=-3), "logprobs")


def test_what_is_just_allowed_is_served() -> None:
    engine, _ = make()
    extremes: list[dict[str, Any]] = [
        {"seed": 0, "temperature": 0.0, "logprobs": 0, "prompt_logprobs": 0},
        {"seed": (1 << 63) - 1, "temperature": 2, "top_p": 1, "top_k": (1 << 31) - 1, "min_p": 1},
        {"repetition_penalty": 10, "presence_penalty": -2, "frequency_penalty": 2, "min_tokens": 6, "max_tokens": 6},
        {"logprobs": MAX_LOGPROBS, "prompt_logprobs": MAX_LOGPROBS, "stop_token_ids": (0, VOCAB - 1)},
        {"max_tokens": 2**70},
    ]
    for number, each in enumerate(extremes):
        engine.submit(request(str(number), [0, VOCAB - 1], **each))
    client = run(engine)
    assert {client.end(str(number)).reason for number in range(len(extremes))} <= {"stop", "length"}


def test_every_field_of_sampling_has_a_rule() -> None:
    assert set(SAMPLING_RULES) == set(Sampling.__struct_fields__)


def test_the_first_wrong_token_of_a_long_prompt_is_found() -> None:
    engine = Engine(FakeRunner(msgspec.structs.replace(SMALL_LIMITS, max_seq_len=1 << 20, num_blocks=1 << 18)))
    engine.submit(request("bad", [5] * 131071 + [VOCAB]))
    error = engine.step().finished[0].error
    assert error is not None
    assert error.message == f"token id {VOCAB} is not in the vocabulary of {VOCAB} tokens"
