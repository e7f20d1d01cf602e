"""Which messages a chat template writes out, and under which role.

A template that does not know a role may silently leave its messages out. `TemplateRoles` finds that by rendering
messages of the same roles, with marks as their contents, and looking which marks come out. The answer depends only on
the sequence of roles and on the template's variables, so it is kept. Safe in any thread.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from pdserve.errors import RequestError

_KEPT_SEQUENCES = 1024
_LONGEST_KEPT = 64
_UNKNOWN_ROLE = "zqrole"
_MARK = re.compile(r"zqmessage(\d+)zq")

Render = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], str]


class TemplateRoles:
    """What one template makes of roles.

    Args:
        render: the template; raises RequestError for messages that it refuses.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        self._kept = lru_cache(_KEPT_SEQUENCES)(self._decide)

    def roles(self, asked: tuple[str, ...], variables: Mapping[str, Any]) -> tuple[str, ...]:
        """The roles to render messages of the roles `asked` with.

        `developer` stands for `system` where the template does not know it.

        Raises:
            RequestError: the template leaves a message out; `param` is its role.
        """
        known = json.dumps(variables, sort_keys=True, default=repr)
        decide = self._kept if len(asked) <= _LONGEST_KEPT else self._decide
        roles, lost = decide(asked, known)
        if lost is not None:
            param = f"messages.{lost}.role"
            raise RequestError(
                f"{param}: the chat template of this model leaves out a {asked[lost]} message here", param
            )
        return roles

    def _decide(self, asked: tuple[str, ...], variables: str) -> tuple[tuple[str, ...], int | None]:
        """The roles to use, and the first message that is left out nevertheless."""
        known: dict[str, Any] = json.loads(variables)
        roles = asked
        if "developer" in asked and not self._knows_developer(asked, known):
            roles = tuple("system" if role == "developer" else role for role in asked)
        text = self._marked(roles, known)
        if text is None:
            return roles, None  # refused as a whole, which the real messages will be, too
        shown = _shown(text)
        return roles, next((index for index in range(len(roles)) if index not in shown), None)

    def _knows_developer(self, asked: tuple[str, ...], variables: Mapping[str, Any]) -> bool:
        """Whether `developer` is more than any word would be that the template writes where the role stands."""
        text = self._marked(asked, variables)
        if text is None or not {at for at, role in enumerate(asked) if role == "developer"} <= _shown(text):
            return False
        other = self._marked(tuple(_UNKNOWN_ROLE if role == "developer" else role for role in asked), variables)
        return other is None or other.replace(_UNKNOWN_ROLE, "developer") != text

    def _marked(self, roles: tuple[str, ...], variables: Mapping[str, Any]) -> str | None:
        messages = [{"role": role, "content": _mark(index)} for index, role in enumerate(roles)]
        try:
            return self._render(messages, variables)
        except RequestError:
            return None


def _mark(index: int) -> str:
    """Letters and digits, which no template escapes."""
    return f"zqmessage{index}zq"


def _shown(text: str) -> set[int]:
    """The messages whose marks are in `text`."""
    return {int(index) for index in _MARK.findall(text)}
