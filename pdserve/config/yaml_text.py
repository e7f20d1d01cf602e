"""YAML as a person means it: text stays as it was written, and no choice is made silently.

Where a key holds text, a plain `123`, `007`, `on` or `2024-01-01` is that text and no number, truth value or date; all
keys are text. A key that is written twice is an error. Anchors, aliases and merge keys (`<<`) work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

import yaml

from pdserve.config.schema import annotation_at, element_of, is_list, is_text, section_of
from pdserve.errors import ConfigError, path_error

_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_TAKEN_FOR_MORE = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp"))


def read_file(file: Path, stream: IO[bytes] | None, root: Any) -> dict[str, Any]:
    """The mapping in a file, as the model `root` types its keys. Read from `stream` if there is one.

    Raises:
        ConfigError: it can't be read, is not YAML, no mapping, or has a key twice.
        HostError: the system lacks something.
    """
    try:
        raw = file.read_bytes() if stream is None else stream.read()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise path_error(error, f"{file}: {error.strerror or error}") from None
    data = parse(text, root, str(file))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: a mapping of keys was expected, not a {type(data).__name__}")
    return data


def parse(text: str, annotation: Any, name: str) -> Any:
    """The value that `text` is, for a key of this type. `name` is told with an error."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            return loader.construct_document(_Reading(name).typed(node, annotation))
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{name} is not YAML{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    except (ValueError, RecursionError) as error:  # such as a date that does not exist
        raise ConfigError(f"{name}: {error}") from None


def as_json(text: str, annotation: Any, name: str) -> str:
    """The text of a flag or variable as pydantic-settings reads it, which takes JSON for lists and sections.

    Text is taken as it is, but for quotes around it; a list may go without brackets. Of numbers and switches pydantic
    reads the text.
    """
    if is_text(annotation):
        return str(parse(text, annotation, name)) if text.startswith(('"', "'")) else text
    if text == "null" or not (is_list(annotation) or section_of(annotation)):
        return text
    if is_list(annotation) and not text.startswith("["):
        text = f"[{text}]"
    return json.dumps(parse(text, annotation, name), default=str)


class _Reading:
    """One pass over a document's nodes, before anything is made of them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._seen: set[tuple[int, str]] = set()  # an alias is the node that it stands for

    def typed(self, node: yaml.Node, annotation: Any) -> yaml.Node:
        """`node` as a key of this type holds it. Raises ConfigError for a key that is given twice."""
        if isinstance(node, yaml.ScalarNode):
            is_plain_text = node.style is None and node.tag in _TAKEN_FOR_MORE and is_text(annotation)
            return yaml.ScalarNode(_TEXT, node.value, node.start_mark, node.end_mark) if is_plain_text else node
        if (id(node), repr(annotation)) in self._seen:
            return node
        self._seen.add((id(node), repr(annotation)))
        if isinstance(node, yaml.SequenceNode):
            element = element_of(annotation)
            node.value = [self.typed(each, element) for each in node.value]
        elif isinstance(node, yaml.MappingNode):
            self._take_mapping(node, annotation)
        return node

    def _take_mapping(self, node: yaml.MappingNode, annotation: Any) -> None:
        section = section_of(annotation)
        seen, pairs = set(), []
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{self._name}, line {line}: a key must be text")
            if key.value in seen:
                raise ConfigError(f"{self._name}, line {line}: the key {key.value!r} is given twice", key.value)
            seen.add(key.value)
            if key.tag == _MERGE:
                parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for part in parts:
                    self.typed(part, annotation)
            else:
                key.tag = _TEXT
                value = self.typed(value, section and annotation_at(section, (key.value,)))
            pairs.append((key, value))
        node.value = pairs
