"""Random numbers as pure functions of their position: (seed, stream, index, ...), with no generator state.

A 64-bit key is derived from integers by the splitmix64 finalizer (Steele, Lea & Flood 2014). Element `i` of a key's
sequence is the finalizer applied to `key + i * golden ratio`, which is splitmix64 itself seeded with the key. Decisions
on the host (order, levels) use the NumPy functions and tensors use the torch functions; both give the same bits.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

_GOLDEN = 0x9E3779B97F4A7C15
_PART = 0xD1B54A32D192ED03  # another odd constant, so that no part can cancel the seed
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

Keys = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64] | int


class Stream(IntEnum):
    """The purpose of a random number. Streams with the same seed are independent."""

    PERMUTATION = 1
    CHUNKS = 2
    WINDOW = 3
    INITIAL_STATE = 4
    TIME = 5
    NOISE = 6
    CONDITION = 7
    CHAIN_OFFSET = 8
    CHAIN_LEVEL = 9
    DROPOUT = 10
    SAMPLE_NOISE = 11
    SAMPLE_CONDITION = 12
    SAMPLE_RENOISE = 13
    INITIAL_WEIGHTS = 14
    SAMPLE_LABEL = 15
    LABEL_DROPOUT = 16
    REFINED = 17
    FLIP = 18
    CONDITION_MASK = 19


def splitmix64(z: Keys) -> Keys:
    """The finalizer of splitmix64, element by element. Overflow is intended."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
    return z ^ (z >> np.uint64(31))


def keys(seed: int, stream: Stream, *parts: Integers) -> Keys:
    """One 64-bit key per element of the broadcast `parts` (integers or int64 arrays)."""
    with np.errstate(over="ignore"):
        z: Keys = np.asarray(splitmix64(np.asarray(seed % 2**64, np.uint64) + np.uint64(_GOLDEN * int(stream) % 2**64)))
        for part in parts:
            z = splitmix64((z ^ splitmix64(np.asarray(part).astype(np.uint64) + np.uint64(_PART))) + np.uint64(_GOLDEN))
    return z


def key(seed: int, stream: Stream, *parts: int) -> int:
    """`keys` for a single position, as a Python integer in [0, 2^64)."""
    return int(keys(seed, stream, *parts))


def randint(limit: npt.NDArray[np.int64] | int, key: Keys) -> npt.NDArray[np.int64]:
    """One integer in [0, limit) per key, uniform to within limit / 2^32. Requires limit < 2^32."""
    high = key >> np.uint64(32)
    return ((high * np.asarray(limit).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def uniform(key: Keys) -> npt.NDArray[np.float64]:
    """One number in (0, 1) per key: its upper 52 bits select an interval, and the result is the interval's midpoint."""
    found: npt.NDArray[np.float64] = ((key >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return found


def permutation(count: int, key: int) -> npt.NDArray[np.int64]:
    """A permutation of range(count) [count], determined by `key`."""
    with np.errstate(over="ignore"):
        z = splitmix64(np.asarray(key, np.uint64) + np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN))
    return np.argsort(z, kind="stable")


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts int64 arithmetically


def normal(key: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal numbers [B, *shape] in float32. Row b depends only on `key[b]` (`key` is [B] int64).

    Uses the Box-Muller transform on two 32-bit halves in float64, so that vectorized and scalar code round to the same
    float32.
    """
    count = math.prod(shape)
    pairs = (count + 1) // 2
    index = torch.arange(pairs, device=key.device, dtype=torch.int64)
    z = key[:, None] + index * _signed(_GOLDEN)
    z = (z ^ _shift(z, 30)) * _signed(_MIX1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX2)
    z = z ^ _shift(z, 31)
    radius = (_shift(z, 32).double() + 0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = (z & 0xFFFFFFFF).double().mul_(2 * math.pi * 2.0**-32)
    flat = torch.empty(len(key), 2 * pairs, dtype=torch.float32, device=key.device)
    flat[:, :pairs] = angle.cos().mul_(radius)
    flat[:, pairs:] = angle.sin_().mul_(radius)
    return flat[:, :count].reshape(len(key), *shape)


def as_tensor(key: Keys) -> torch.Tensor:
    """Reinterpret the bits of keys as the int64 tensor that `normal` takes."""
    return torch.from_numpy(np.ascontiguousarray(key).view(np.int64))
