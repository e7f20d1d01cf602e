"""The first frame of a connection: who speaks which protocol over which network, sealed.

What a peer says of itself is passed to libraries, and some end the process over bytes that they don't understand: UCX
does, over the address of a worker. So nothing of a greeting is used before its length, version and seal are checked. A
seal is a BLAKE2b hash of all that it covers, keyed with the cluster's key. Without a key it keeps out garbage and
programs that connect by mistake, but nobody who means to get in.
"""

from __future__ import annotations

import hashlib
import hmac

from pdserve.errors import TransferError

MAGIC = b"pdserve-kv"
VERSION = 2
MAX_GREETING_BYTES = 16 << 10
"""A UCX address takes about 70 bytes for each device and transport."""

_NETWORK_BYTES = 8
_SEAL_BYTES = 32
_HEADER_BYTES = len(MAGIC) + 1 + _NETWORK_BYTES


class Seal:
    """Seals what goes to peers over `network`, and checks theirs. `key`, of at most 64 bytes, is the cluster's."""

    def __init__(self, network: str, key: bytes = b"") -> None:
        self._network = network
        self._key = key
        self._header = MAGIC + bytes((VERSION,)) + network.encode().ljust(_NETWORK_BYTES)

    def close(self, body: bytes) -> bytes:
        """`body` as a sealed frame."""
        return self._header + self._hash(body) + body

    def open(self, frame: bytes) -> bytes:
        """The body of a peer's frame.

        Raises:
            TransferError: "protocol"; no transceiver of this version, network and key has made it.
        """
        if not frame.startswith(MAGIC) or not _HEADER_BYTES + _SEAL_BYTES <= len(frame) <= MAX_GREETING_BYTES:
            raise TransferError("the peer is no KV transceiver", "protocol")
        version = frame[len(MAGIC)]
        if version != VERSION:
            raise TransferError(f"the peer greets in version {version}, we in {VERSION}", "protocol", "version")
        if not frame.startswith(self._header):
            network = frame[len(MAGIC) + 1 : _HEADER_BYTES].decode("ascii", "replace").strip()
            raise TransferError(f"the peer moves KV over {network!r}, we over {self._network!r}", "protocol")
        seal, body = frame[_HEADER_BYTES : _HEADER_BYTES + _SEAL_BYTES], frame[_HEADER_BYTES + _SEAL_BYTES :]
        if not hmac.compare_digest(seal, self._hash(body)):
            raise TransferError("the seal of what the peer says is broken, or made with another key", "protocol")
        return body

    def _hash(self, body: bytes) -> bytes:
        return hashlib.blake2b(self._header + body, digest_size=_SEAL_BYTES, key=self._key).digest()
