"""Optional compression of the chunks of a zarr store: Zarr's `blosc` codec, so that zarr-python reads what is written.

Bytes are shuffled first, because neighboring numbers have similar signs and exponents, while their last bits are noise.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numcodecs import blosc

from udddm.store.encoding import Rows

Compression = Literal["none", "lz4", "zstd"]
_LEVEL = 1
"""Higher levels gain little on states, whose last bits are noise."""

blosc.use_threads = False  # the pipeline already has threads, and blosc's are shared by all callers


def codec(compression: Compression, item_bytes: int) -> list[dict[str, Any]]:
    """The entry of an array's `codecs` for numbers of `item_bytes` bytes; empty without compression."""
    if compression == "none":
        return []
    shuffle = "shuffle" if item_bytes > 1 else "bitshuffle"
    settings = {"cname": compression, "clevel": _LEVEL, "shuffle": shuffle, "typesize": item_bytes, "blocksize": 0}
    return [{"name": "blosc", "configuration": settings}]


def of_array(metadata: dict[str, Any]) -> Compression:
    """The compression of an array, from its `zarr.json`. Raises KeyError, TypeError or ValueError if unsupported."""
    for each in metadata["codecs"]:
        if each["name"] == "blosc":
            found: Compression = each["configuration"]["cname"]
            if found not in ("lz4", "zstd"):
                raise ValueError(f"blosc with {found}")
            return found
    return "none"


def compress(rows: Rows, compression: Compression) -> bytes | memoryview:
    """The stored bytes of `rows`, without unnecessary copies. Deterministic for a given version of the library."""
    if compression == "none":
        return np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
    shuffle = blosc.SHUFFLE if rows.itemsize > 1 else blosc.BITSHUFFLE
    return bytes(blosc.compress(np.ascontiguousarray(rows).reshape(-1), compression.encode(), _LEVEL, shuffle, 0))


def decompress(data: memoryview, compression: Compression) -> bytes | memoryview:
    """The bytes of the rows. Raises ValueError or RuntimeError if `data` does not come from `compress`."""
    return data if compression == "none" else bytes(blosc.decompress(bytes(data)))
