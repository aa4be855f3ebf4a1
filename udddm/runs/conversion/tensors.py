"""Tensors of a pickle that `inert_pickle` has read: their storages in PyTorch's older file format, and their views."""

from __future__ import annotations

import io
import math
import struct
from pathlib import Path
from typing import Any

import torch

from udddm.errors import CheckpointError
from udddm.runs.conversion.inert_pickle import Inert, Name, Reference, read

REBUILD = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
STORAGE = "torch.storage._load_from_bytes"
NAMES = frozenset({REBUILD, PARAMETER, STORAGE})
"""The names in pickles of tensors."""
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""The start of PyTorch's file format before its zip archives (`torch.serialization`)."""
_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


def tensor(record: Any, where: str | Path) -> torch.Tensor:
    """The tensor that a record of a pickle describes, with its own memory. Raises CheckpointError for a record that is
    none, or that reads beyond its storage."""
    if isinstance(record, Inert) and record.name == PARAMETER and record.arguments:
        record = record.arguments[0]
    if not isinstance(record, Inert) or record.name != REBUILD or len(record.arguments) < 4:
        raise CheckpointError(f"{where}: a weight is not a tensor")
    saved, offset, size, stride = record.arguments[:4]
    numbers = (offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (None,)
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers) or len(size) != len(stride):
        raise CheckpointError(f"{where}: a tensor has an invalid shape")
    values = _storage(saved, where)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if count > values.numel() or (count and last >= values.numel()):
        raise CheckpointError(f"{where}: a tensor of {count} values has a storage of {values.numel()}")
    return values.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)


def _storage(record: Any, where: str | Path) -> torch.Tensor:
    """The values of a storage, one-dimensional, in read-only memory."""
    if not isinstance(record, Inert) or record.name != STORAGE or len(record.arguments) != 1:
        raise CheckpointError(f"{where}: a tensor has no storage")
    data = record.arguments[0]
    if not isinstance(data, bytes):
        raise CheckpointError(f"{where}: a storage is not binary")
    file = io.BytesIO(data)
    magic, protocol, system = (read(file, (), where) for _ in range(3))
    if magic != _MAGIC or protocol != _PROTOCOL or not isinstance(system, dict) or not system.get("little_endian"):
        raise CheckpointError(f"{where}: a storage is not in PyTorch's format, with little-endian numbers")
    reference, keys = read(file, _DTYPES, where, references=True), read(file, (), where)
    identity = reference.identity if isinstance(reference, Reference) else None
    if not isinstance(identity, tuple) or len(identity) < 5 or not isinstance(identity[1], Name):
        raise CheckpointError(f"{where}: a storage is not in PyTorch's format")
    dtype, key, count = _DTYPES[identity[1].name], identity[2], identity[4]
    start, width = file.tell() + 8, dtype.itemsize
    header = data[start - 8 : start]
    if not isinstance(key, str) or keys != [key] or type(count) is not int or count < 0:
        raise CheckpointError(f"{where}: a storage is not in PyTorch's format")
    if header != struct.pack("<q", count) or len(data) != start + count * width:
        raise CheckpointError(f"{where} is truncated: a storage of {count} values has {len(data) - start} bytes")
    if not count:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(data[start:]), dtype=dtype)
