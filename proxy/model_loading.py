"""Loads what the proxy serves from the model's folder. May take seconds, so it runs in a thread at start."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pdserve.config import ClusterConfig
from pdserve.errors import ConfigError
from pdserve.model_fingerprint import model_fingerprint
from pdserve.model_store import load_generation_defaults, read_config, resolve_model, tokenizer_folder
from pdserve.text.tokenizer import Tokenizer
from proxy.chat_template import ChatTemplate
from proxy.model import ServedModel
from proxy.parsers import reasoning_format, tool_format

log = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_model(config: ClusterConfig) -> ServedModel:
    """The model of `config`; without a tokenizer if it is switched off, or if the folder has none and none is named.

    Raises:
        ConfigError: the model or its tokenizer is not there or can't be read, or the chat template does not tell how
            tools are called.
    """
    folder = resolve_model(config.model)
    text_folder = folder if config.tokenizer is None else resolve_model(config.tokenizer)
    tokenizer = _load_tokenizer(config, text_folder)
    template = None if tokenizer is None else ChatTemplate.load(text_folder, tokenizer)
    found = load_generation_defaults(folder)
    return ServedModel(
        name=config.model_name,
        tokenizer=tokenizer,
        template=template,
        tools=tool_format(config.proxy.tool_parser, None if template is None else template.with_tools.source),
        reasoning=reasoning_format(config.proxy.reasoning_parser),
        vocab_size=_vocab_size(read_config(folder), tokenizer),
        eos_token_ids=frozenset(found.eos_token_ids),
        fingerprint=_fingerprint(folder, config),
        defaults=found,
    )


def _fingerprint(folder: Path, config: ClusterConfig) -> str | None:
    try:
        return model_fingerprint(folder, config.generation_servers.load_format)
    except ConfigError as error:  # only workers need the weights
        log.warning("the workers say which model this cluster serves: %s", error)
        return None


def _load_tokenizer(config: ClusterConfig, folder: Path) -> Tokenizer | None:
    has_none = not any((folder / name).is_file() for name in _TOKENIZER_FILES)
    if config.skip_tokenizer_init or (config.tokenizer is None and has_none):
        return None
    return Tokenizer.load(tokenizer_folder(folder))


def _vocab_size(settings: dict[str, Any], tokenizer: Tokenizer | None) -> int | None:
    """The model's, which may be padded beyond the tokenizer's."""
    inner = settings.get("text_config")
    size = settings.get("vocab_size") or (inner.get("vocab_size") if isinstance(inner, dict) else None)
    if isinstance(size, int):
        return size
    return None if tokenizer is None else tokenizer.vocab_size
