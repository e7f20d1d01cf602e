"""The API's description: valid OpenAPI, of every row, with the schemas and errors that are in use."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import ValidationError

from pdserve.errors import PdserveError, RequestError
from pdserve.openapi import document
from proxy.endpoints import ENDPOINTS
from proxy.routes.endpoint import ERRORS
from proxy.routes.operations import Operations
from proxy.routes.tokens import Tokens
from proxy.schemas import neutral
from proxy.schemas.tokens import TokenizeRequest


class Nothing:
    """Stands for the service; no handler is called."""

    def __getattr__(self, name: str) -> Any:
        return self


OPERATIONS = [operation for operation, _ in Operations(Nothing()).routes()]  # type: ignore[arg-type]
TOKENS = [operation for operation, _ in Tokens(Nothing()).routes()]  # type: ignore[arg-type]
DOCUMENT = document("proxy", [*(row.operation for row in ENDPOINTS), *TOKENS, *OPERATIONS])


def body_schema(path: str) -> dict[str, Any]:
    schema = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return {**schema, "components": DOCUMENT["components"]}


def test_it_is_valid_openapi_3_1() -> None:
    assert DOCUMENT["openapi"].startswith("3.1")
    assert [error.message for error in OpenAPIV31SpecValidator(DOCUMENT).iter_errors()] == []


def test_every_row_is_described() -> None:
    posted = [path for path, methods in DOCUMENT["paths"].items() if "post" in methods]
    assert posted == [row.path for row in (*ENDPOINTS, *TOKENS)]
    expected = [row.path.replace(":.+", "") for row in OPERATIONS]
    assert [path for path, methods in DOCUMENT["paths"].items() if "get" in methods] == expected
    parameters = DOCUMENT["paths"]["/v1/models/{model}"]["get"]["parameters"]
    assert [(each["name"], each["in"]) for each in parameters] == [("model", "path")]


@pytest.mark.parametrize("row", ENDPOINTS, ids=lambda row: row.path)
def test_every_error_has_its_status_and_code(row: Any) -> None:
    responses = DOCUMENT["paths"][row.path]["post"]["responses"]
    for error in ERRORS:
        response = responses[str(error.status)]
        assert error.code in response["description"]
        assert ("headers" in response) >= (error.retry_after_s is not None)
    assert set(responses) == {"200", "default", *(str(error.status) for error in ERRORS)}


def test_an_error_is_described_as_it_is_answered() -> None:
    schema = {"$ref": "#/components/schemas/ErrorAnswer", "components": DOCUMENT["components"]}
    check = jsonschema.Draft202012Validator(schema).validate
    check(PdserveError("no").to_openai())
    check(PdserveError("no", "field").to_openai())
    with pytest.raises(jsonschema.ValidationError):
        check({"error": {"message": "no"}})


@pytest.mark.parametrize("row", ENDPOINTS, ids=lambda row: row.path)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.5),
        ("temperature", "1"),
        ("n", 0),
        ("stop", 3),
        ("stop", "x"),
        ("stop", ["x", "y"]),
        ("stop", ["x"] * 17),
        ("stop", ["x", ""]),
        ("stop", []),
        ("stop", ""),
        ("stop", None),
        ("stop_token_ids", [3, -1]),
        ("stop_token_ids", [3]),
        ("stop_token_ids", None),
        ("seed", 2**63),
        ("seed", -5),
        ("logit_bias", {"1": 5}),
        ("logit_bias", {}),
        ("priority", 1),
        ("cache_salt", "tenant"),
        ("no_such_field", None),
        ("stream_options", {"include_usage": True}),
        ("stream_options", {"no_such_option": True}),
        ("prompt_cache_retention", "24h"),
    ],
)
def test_schema_and_model_agree_on_a_body(row: Any, field: str, value: Any) -> None:
    own = {"prompt": "p"} if row.path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    body = {"model": "m", **own, field: value}
    assert jsonschema.Draft202012Validator(body_schema(row.path)).is_valid(body) == is_valid(row.schema, body)


@pytest.mark.parametrize(
    "prompt",
    [
        "a",
        ["a"],
        [],
        [""],
        ["a"] * 2049,
        [[1]] * 2049,
        [1] * 2049,
        [1, 2],
        [[1], [2]],
        3,
        None,
        [1, "a"],
        [[1.5]],
        [-1],
        {"a": 1},
    ],
)
def test_schema_and_model_agree_on_prompts(prompt: Any) -> None:
    row = next(row for row in ENDPOINTS if row.path == "/v1/completions")
    body = {"model": "m", "prompt": prompt}
    assert jsonschema.Draft202012Validator(body_schema(row.path)).is_valid(body) == is_valid(row.schema, body)


@pytest.mark.parametrize(
    "content", ["a", [{"type": "text", "text": "a"}], [{"type": "image_url"}], [{"type": "text"}], 3, [3]]
)
def test_schema_and_model_agree_on_messages(content: Any) -> None:
    row = next(row for row in ENDPOINTS if row.path == "/v1/chat/completions")
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    assert jsonschema.Draft202012Validator(body_schema(row.path)).is_valid(body) == is_valid(row.schema, body)


def test_fields_that_are_not_served_are_described_with_the_values_that_ask_for_nothing() -> None:
    properties = DOCUMENT["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    for field, values in (neutral.OF_BOTH | neutral.OF_CHAT).items():
        if neutral.ANY in values:
            assert "enum" not in properties[field]
        else:
            assert properties[field]["enum"] == [None, *values]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a"},
        {"prompt": "a", "messages": None},
        {"prompt": None},
        {},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}], "prompt": "a"},
        {"messages": []},
        {"prompt": ["a"]},
        {"prompt": "a", "tools": [{}]},
        {"prompt": "a", "tools": []},
        {"prompt": "a", "add_generation_prompt": True},
        {"prompt": "a", "chat_template_kwargs": {}},
        {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {}},
        {"prompt": None, "messages": [{"role": "user", "content": "a"}]},
        {
            "messages": [{"role": "user", "content": "a"}],
            "add_generation_prompt": False,
            "chat_template_kwargs": {"a": 1},
        },
    ],
)
def test_schema_and_model_agree_on_what_is_tokenized(body: dict[str, Any]) -> None:
    assert jsonschema.Draft202012Validator(body_schema("/tokenize")).is_valid(body) == is_valid(TokenizeRequest, body)


def is_valid(schema: Any, body: dict[str, Any]) -> bool:
    try:
        schema.model_validate(body)
    except (ValidationError, RequestError):
        return False
    return True
