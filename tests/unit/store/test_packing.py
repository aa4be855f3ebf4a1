"""Rows of several tensors: every dtype comes back with its bits, and mistakes are named."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from udddm.errors import ConfigError, DataError, StoreError
from udddm.store import Encoding
from udddm.store.encoding import generation_zero
from udddm.store.packing import DTYPES, Packing

SHAPES = st.lists(st.integers(1, 3), max_size=3).map(tuple)
DECLARED = st.dictionaries(
    st.from_regex(r"[a-z_]{1,4}", fullmatch=True), st.tuples(SHAPES, st.sampled_from(list(DTYPES.values()))), min_size=1
)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits, so also NaNs with a payload, infinities and subnormal numbers."""
    size = int(np.prod(shape)) * dtype.itemsize
    bits = torch.from_numpy(np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, size, np.uint8))
    return bits.view(dtype).reshape(shape)


@given(DECLARED, st.integers(1, 4))
def test_tensors_come_back_with_the_same_bits(declared: dict[str, Any], samples: int) -> None:
    packing = Packing(declared)
    values = {n: random_tensor((samples, *s), d, i) for i, (n, (s, d)) in enumerate(declared.items())}
    before = torch.zeros(samples, packing.row_bytes, dtype=torch.uint8)
    found = packing.unpack(packing.pack(values, before))
    assert list(found) == list(declared)
    for name, tensor in found.items():
        assert tensor.dtype == values[name].dtype
        assert tensor.shape == values[name].shape
        assert tensor.view(-1).view(torch.uint8).equal(values[name].view(-1).view(torch.uint8))


@given(DECLARED)
def test_a_tensor_that_is_not_given_keeps_its_bits(declared: dict[str, Any]) -> None:
    packing = Packing(declared)
    before = random_tensor((2, packing.row_bytes), torch.uint8, 1)
    name, (shape, dtype) = next(iter(declared.items()))
    values = random_tensor((2, *shape), dtype, 2)
    rows = packing.pack({name: values}, before)
    part = packing.parts[name]
    outside = torch.ones(packing.row_bytes, dtype=torch.bool)
    outside[part.first : part.past] = False
    assert rows[:, outside].equal(before[:, outside])
    assert rows[:, part.first : part.past].equal(values.reshape(2, -1).contiguous().view(torch.uint8))
    assert packing.pack({}, before).equal(before)


def test_unpacked_tensors_are_copies() -> None:
    packing = Packing({"a": ((2,), torch.float32)})
    rows = torch.zeros(3, packing.row_bytes, dtype=torch.uint8)
    packing.unpack(rows)["a"].fill_(1)
    assert not rows.any()


def test_floating_point_types_are_converted_and_clamped_to_the_range_of_float16() -> None:
    packing = Packing({"h": ((2,), torch.float16)})
    rows = packing.pack({"h": torch.tensor([[1e6, -torch.inf]])}, torch.zeros(1, 4, dtype=torch.uint8))
    assert packing.unpack(rows)["h"].tolist() == [[65504.0, -65504.0]]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "give a shape and a dtype by name"),
        ({"a b": ((1,), torch.float32)}, "'a b' is not a name"),
        ({"a": (1, torch.float32)}, "tensors['a']: (1, torch.float32) is not a shape and a dtype"),
        ({"a": ((2, 0), torch.float32)}, "tensors['a']: the shape [2, 0] needs positive integers"),
        ({"a": ((2,), torch.complex64)}, "tensors['a']: the dtype is torch.complex64; choose one of torch.float64"),
        ({"a": ((2,), "float32")}, "tensors['a']: the dtype is 'float32'"),
    ],
)
def test_wrong_declarations_name_the_tensor(tensors: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Packing(tensors)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"b": torch.zeros(2, 3)}, "there is no tensor b; declared are a, n"),
        ({"a": torch.zeros(2, 4)}, "write(a=...): the shape is [2, 4] instead of [2, 3]"),
        ({"a": torch.zeros(1, 3)}, "write(a=...): the shape is [1, 3] instead of [2, 3]"),
        ({"a": [0.0]}, "write(a=...): expected a tensor, not a list"),
        ({"n": torch.zeros(2)}, "write(n=...): the dtype is torch.float32 instead of torch.int64"),
        ({"a": torch.zeros(2, 3, device="meta")}, "write(a=...): the tensor is on meta and the state is read"),
    ],
)
def test_wrong_values_name_the_tensor(values: Any, message: str) -> None:
    packing = Packing({"a": ((3,), torch.float32), "n": ((), torch.int64)})
    with pytest.raises(DataError, match=re.escape(message)):
        packing.pack(values, torch.zeros(2, packing.row_bytes, dtype=torch.uint8))


def test_bytes_begin_with_zeros_and_are_not_converted() -> None:
    assert not generation_zero(1, np.arange(5), (7,), Encoding("bytes")).any()
    with pytest.raises(StoreError, match="bytes, which cannot be converted to fp16"):
        Encoding("fp16").recode(np.zeros((1, 4), np.uint8), Encoding("bytes"))
