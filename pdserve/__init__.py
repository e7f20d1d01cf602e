"""pdserve: large language models served with prefill and decode on separate workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pdserve.version import __version__

if TYPE_CHECKING:
    from pdserve.config import LlmArgs
    from pdserve.llm import LLM, SamplingParams

__all__ = ["LLM", "LlmArgs", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Load the Python API on first use: proxy and manager import this package and must stay free of torch."""
    if name in ("LLM", "SamplingParams"):
        from pdserve import llm

        return getattr(llm, name)
    if name == "LlmArgs":
        from pdserve.config import LlmArgs

        return LlmArgs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
