"""Seeds of requests and of their choices: one rule for the proxy and for `LLM`."""

from __future__ import annotations

import hashlib
import secrets

SEED_BITS = 63
_MASK = (1 << SEED_BITS) - 1


def new_seed() -> int:
    """A seed for a request that came without."""
    return secrets.randbits(SEED_BITS)


def choice_seeds(seed: int | None, n: int) -> list[int]:
    """The seeds of the `n` choices of a request, which may have come without one."""
    first = new_seed() if seed is None else seed
    return [choice_seed(first, choice) for choice in range(n)]


def choice_seed(seed: int, choice: int) -> int:
    """The seed of choice number `choice`, from 0, of a request with `seed`.

    The first choice has the request's own (modulo 2**63). The others' are hashed from it, so that the second choice of
    one request is not the first of another whose seed is greater by one.
    """
    first = seed & _MASK
    if choice == 0:
        return first
    digest = hashlib.blake2b(f"{first}/{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _MASK
