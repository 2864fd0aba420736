"""Data order as a pure function: place in the epoch -> row of the source. A loader's whole state is one integer."""

from __future__ import annotations

import hashlib

_ROUNDS = 4


def shuffled(position: int, rows: int, seed: int) -> tuple[int, int]:
    """(row, epoch) of the sample at a position that counts on over epochs.

    A keyed Feistel network permutes the next power of four above `rows`; walking its cycle until the value is in range
    makes it a permutation of `range(rows)`, another in each epoch, in constant memory.
    """
    epoch, value = divmod(position, rows)
    half = max(1, ((rows - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=4 * _ROUNDS).digest()
    keys = [int.from_bytes(key[4 * i : 4 * i + 4], "little") for i in range(_ROUNDS)]
    while True:
        left, right = value >> half, value & mask
        for k in keys:
            left, right = right, left ^ (_mix(right ^ k) & mask)
        value = (left << half) | right
        if value < rows:
            return value, epoch


def _mix(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    return x ^ (x >> 16)
