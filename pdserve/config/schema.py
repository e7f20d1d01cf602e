"""What the models say of a key: its type, where it is, and which others there are."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def annotation_at(root: type[BaseModel], path: Sequence[str | int]) -> Any:
    """The type of the key at `path` below `root`; None if there is no such key."""
    field = field_at(root, path) if path else None
    return field.annotation if field else None if path else root


def field_at(root: type[BaseModel], path: Sequence[str | int]) -> FieldInfo | None:
    """The key at `path` below `root`, which is no empty path; None if there is no such key."""
    section = section_of(annotation_at(root, path[:-1]))
    return section.model_fields.get(str(path[-1])) if section else None


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a key of this type holds, if it holds one."""
    for kind in _kinds(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def is_text(annotation: Any) -> bool:
    """Whether a key of this type holds text, or one of some words."""
    kinds = _kinds(annotation)
    return bool(kinds) and all(
        kind is str or (get_origin(kind) is Literal and all(isinstance(word, str) for word in get_args(kind)))
        for kind in kinds
    )


def is_list(annotation: Any) -> bool:
    """Whether a key of this type holds a list."""
    return any(get_origin(kind) in (list, tuple) for kind in _kinds(annotation))


def element_of(annotation: Any) -> Any:
    """The type of what a list of this type holds; None if it is no list."""
    for kind in _kinds(annotation):
        if get_origin(kind) in (list, tuple):
            return next(iter(get_args(kind)), None)
    return None


def is_switch(annotation: Any) -> bool:
    """Whether a key of this type is true or false."""
    return _kinds(annotation) == [bool]


def all_keys(root: type[BaseModel], *, below: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key below `root` that is no section."""
    for name, field in root.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            yield (*below, name)
        else:
            yield from all_keys(section, below=(*below, name))


def _kinds(annotation: Any) -> list[Any]:
    """The types that a value may have, besides None."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [] if annotation in (None, type(None)) else [annotation]
