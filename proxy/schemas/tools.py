"""Tools and their calls in chat completions: what a request says of them, and what answers and events do."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import AfterValidator, BeforeValidator, Field

from proxy.parsers.calls import FUNCTION_NAME
from proxy.schemas.request import Request

MAX_TOOLS = 128
_NEEDS_GUIDANCE = "needs guided decoding, which is not available yet"

FunctionName = Annotated[str, Field(pattern=FUNCTION_NAME)]


def _not_strict(value: Any) -> Any:
    if value is True:
        raise ValueError(f"true {_NEEDS_GUIDANCE}; allowed: false, null")
    return value


def _left_to_the_model(value: Any) -> Any:
    if value == "required" or isinstance(value, dict):
        raise ValueError(f"to make the model call a function {_NEEDS_GUIDANCE}; allowed: auto, none")
    return value


ToolChoice = Annotated[Literal["auto", "none"], BeforeValidator(_left_to_the_model)]


class Function(Request):
    """`parameters` is a JSON Schema, which the template shows to the model."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[bool | None, BeforeValidator(_not_strict)] = None


class Tool(Request):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """What the chat template sees: the fields that the client gave."""
        function = self.function
        given = {
            field: getattr(function, field) for field in Function.model_fields if field in function.model_fields_set
        }
        return {"type": self.type, "function": given}


def read_arguments(text: str) -> dict[str, Any]:
    """A call's arguments; "" is none. Raises ValueError if they are no JSON object."""
    try:
        found = msgspec.json.decode(text) if text else {}
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"must be a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("must be a JSON object")
    return found


def _as_arguments(value: str) -> str:
    read_arguments(value)
    return value


class CalledFunction(Request):
    name: FunctionName
    arguments: Annotated[str, AfterValidator(_as_arguments)]


class ToolCallOfMessage(Request):
    """A call in an earlier message of the assistant."""

    id: str
    type: Literal["function"]
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """What the chat template sees: the arguments are an object."""
        function = {"name": self.function.name, "arguments": read_arguments(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


class ToolCallFunction(msgspec.Struct):
    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """`arguments` are the model's own words, which may be no valid JSON."""

    id: str
    type: Literal["function"]
    function: ToolCallFunction


class ToolCallFunctionDelta(msgspec.Struct):
    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct):
    """What is new of the call with this index; `id`, `type` and `name` stand in its first event."""

    index: int
    function: ToolCallFunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
