"""The endpoints that generate, one row each.

To add one, write its schema in `proxy/schemas/`, its plan and formatter in `proxy/routes/`, and a row here. Nothing
else knows which endpoints there are: `proxy/routes/endpoint.py` serves every row the same way.
"""

from __future__ import annotations

from typing import Any

from proxy.routes.chat import ChatFormatter, plan_chat
from proxy.routes.completions import CompletionFormatter, plan_completion
from proxy.routes.endpoint import Endpoint
from proxy.schemas.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest
from proxy.schemas.completions import Completion, CompletionRequest

ENDPOINTS: tuple[Endpoint[Any], ...] = (
    Endpoint(
        path="/v1/chat/completions",
        summary="Answer a conversation; with `stream`, in events",
        id_prefix="chatcmpl",
        schema=ChatCompletionRequest,
        plan=plan_chat,
        formatter=ChatFormatter,
        reply=ChatCompletion,
        event=ChatCompletionChunk,
    ),
    Endpoint(
        path="/v1/completions",
        summary="Continue one prompt or many; with `stream`, in events",
        id_prefix="cmpl",
        schema=CompletionRequest,
        plan=plan_completion,
        formatter=CompletionFormatter,
        reply=Completion,
        event=Completion,
    ),
)
