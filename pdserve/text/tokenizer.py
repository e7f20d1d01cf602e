"""The model's `tokenizer.json`.

Owns encoding, what a single token looks like, and which detokenizer fits. Immutable after loading, shared by all
requests and safe in any thread; who encodes long texts does it in one.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from pdserve.errors import ConfigError
from pdserve.text.detokenizer import ByteLevelDetokenizer, Detokenizer, WindowDetokenizer

_CONTEXT_TOKENS = 6
_DECODED_AT_ONCE = 16 * 1024
"""The library's decoding holds the GIL, for 2 to 9 ms with so many tokens."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Encodes prompts and describes tokens.

    Args:
        tokenizer: truncation and padding are switched off in it.
    """

    def __init__(self, tokenizer: RustTokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in self._added.items() if token.special)
        self._byte_level = _is_byte_level(tokenizer.decoder)
        self._token_bytes = self._token_table()
        self.max_characters_per_token = self._longest_token()

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer of a model folder, None if the folder has none.

        Raises:
            ConfigError: the file is there and is no tokenizer.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            return None
        try:
            return cls(RustTokenizer.from_file(str(file)))
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a bad file
            raise ConfigError(f"{file}: {error}", "tokenizer") from None

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return len(self._token_bytes)

    def encode_now(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """`text` as token ids, in the calling thread."""
        # The batch call is the one that releases the GIL, and "fast" leaves out the offsets nobody reads.
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(batch[0].ids)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Each of `texts` as token ids, in the calling thread."""
        batch = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in batch]

    def count(self, text: str) -> int:
        """How many tokens `text` is, in the calling thread."""
        return len(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of tokens that nothing stands before."""
        # The library would read added tokens of a byte-level vocabulary as bytes.
        if self._byte_level or len(token_ids) > _DECODED_AT_ONCE:
            detokenizer = self.detokenizer(skip_special_tokens)
            return "".join([*map(detokenizer.push, token_ids), detokenizer.flush()])
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The vocabulary's entries of `token_ids`, "" for an id without a token."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    def offsets(self, token_ids: Sequence[int], text: str) -> list[int]:
        """Where each of `token_ids` starts in `text`, the text that they were made of."""
        offsets, position = [], 0
        detokenizer = self.detokenizer(skip_special_tokens=False)
        for token_id in token_ids:
            offsets.append(position)
            new = detokenizer.push(token_id)
            # A token that the tokenizer put in front (BOS) has no place in the text.
            if text.startswith(new, position) or token_id not in self._special:
                position = min(position + len(new), len(text))
        return offsets

    def special_text(self, token_id: int) -> str | None:
        """How a special token is written, None for an id that is none."""
        return self._added[token_id].content if token_id in self._special else None

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, b"" for an id without a token."""
        return self._token_bytes[token_id] if 0 <= token_id < len(self._token_bytes) else b""

    def special_ids(self, texts: Collection[str]) -> frozenset[int]:
        """The special tokens that are written as one of `texts`."""
        return frozenset(token_id for token_id in self._special if self._added[token_id].content in texts)

    def detokenizer(
        self, skip_special_tokens: bool, context: Sequence[int] = (), shown: frozenset[int] = frozenset()
    ) -> Detokenizer:
        """A detokenizer for text that follows the tokens `context` (the prompt; only its end matters).

        Of the special tokens that are skipped, `shown` are text nevertheless.
        """
        skipped = self._special - shown if skip_special_tokens else frozenset()
        if self._byte_level:
            return ByteLevelDetokenizer(self._token_bytes, skipped)
        decode = functools.partial(self._tokenizer.decode, skip_special_tokens=False)
        return WindowDetokenizer(decode, skipped, context[-_CONTEXT_TOKENS:])

    def _longest_token(self) -> int | None:
        """The most characters of a text that one token can stand for; None if that has no bound that is known here.

        In byte-level BPE every byte of the text is in a token, unless a normalizer or an added token drops some.
        """
        if not self._byte_level or not isinstance(self._tokenizer.model, models.BPE):
            return None
        strips = any(token.lstrip or token.rstrip for token in self._added.values())
        if strips or self._tokenizer.normalizer is not None:
            return None
        return max(map(len, self._token_bytes), default=None)

    def _token_table(self) -> list[bytes]:
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocabulary.values(), default=-1) + 1)
        to_bytes = _byte_level_bytes if self._byte_level else _piece_bytes
        for piece, token_id in vocabulary.items():
            table[token_id] = to_bytes(piece)
        if self._byte_level:
            for token_id, token in self._added.items():
                if not self._is_own_piece(token.content, token_id):
                    table[token_id] = token.content.encode()
        return table

    def _is_own_piece(self, content: str, token_id: int) -> bool:
        """Whether the model makes an added token by itself, out of bytes.

        Such a token ("\u00e9", which is the byte 0xE9) appears in ordinary text far more often as those bytes.
        """
        model = self._tokenizer.model
        return model.token_to_id(content) == token_id and len(model.tokenize(content)) == 1


def _is_byte_level(decoder: decoders.Decoder | None) -> bool:
    """Whether pieces are joined as bytes and nothing else is done to them."""
    if decoder is None:
        return False
    state = json.loads(decoder.__getstate__())
    kinds = [each["type"] for each in state.get("decoders", [state])]
    return kinds[0] == "ByteLevel" and set(kinds) <= {"ByteLevel", "Fuse"}


def _byte_level_bytes(piece: str) -> bytes:
    """The bytes a byte-level piece of the model stands for; one with other characters stands for itself."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in piece])
    except KeyError:
        return piece.encode()


def _piece_bytes(piece: str) -> bytes:
    """The bytes of a sentencepiece-like piece, seen alone."""
    byte = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (`bytes_to_unicode` of its encoder.py), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
