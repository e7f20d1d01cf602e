"""Calls of Llama 3.1 and later: the whole answer is `{"name": ..., "parameters": {...}}`, or several with `;` between.

`<|python_tag|>` may stand in front. An answer that begins in another way has no calls.
"""

from __future__ import annotations

from proxy.parsers.calls import ToolFormat, read_call
from proxy.parsers.scanner import Scanner, Wait

_TAG = "<|python_tag|>"


def _read(text: Scanner) -> Wait[None]:
    yield from text.space()
    yield from text.accept(_TAG)
    while True:
        yield from text.space()
        yield from read_call(text)
        yield from text.space()
        if not (yield from text.accept(";")):
            return


def _fits(template: str) -> bool:
    """By the role that results have, and the key of arguments; not all of them know the tag."""
    return "ipython" in template and '{"name": "' in template and '"parameters": ' in template


FORMAT = ToolFormat((_TAG,), _fits, _read)
