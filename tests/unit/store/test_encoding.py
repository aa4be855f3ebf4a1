"""How states are stored: error bounds, bits, and recoding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from udddm.store import Encoding
from udddm.store.encoding import StateDtype, generation_zero

NAMES: list[StateDtype] = ["fp32", "fp16", "bf16", "uint8"]
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "uint8": 1}
FLOATS = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=64)


def there_and_back(name: StateDtype, values: torch.Tensor) -> torch.Tensor:
    encoding = Encoding(name)
    array = encoding.to_array(encoding.encode(values))
    assert array.dtype == encoding.array
    assert array.dtype.itemsize == BYTES[name]
    return encoding.decode(encoding.to_tensor(array))


@given(FLOATS)
def test_errors_within_one_are_bounded(numbers: list[float]) -> None:
    values = torch.tensor(numbers)
    assert torch.equal(there_and_back("fp32", values), values)
    for name, relative, absolute in (("fp16", 2**-11, 2**-25), ("bf16", 2**-8, 0.0)):
        error = (there_and_back(name, values) - values).abs()  # type: ignore[arg-type]
        normal = values.abs() >= torch.finfo(torch.float32).tiny
        assert bool((error <= relative * values.abs() + absolute)[normal].all())
    assert float((there_and_back("uint8", values) - values).abs().max()) <= 1 / 255 + 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_stored_numbers_round_trip_exactly(name: StateDtype) -> None:
    encoding = Encoding(name)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    once = encoding.encode(values)
    assert torch.equal(encoding.encode(encoding.decode(once)), once)


def test_every_byte_survives() -> None:
    encoding = Encoding("uint8")
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(encoding.encode(encoding.decode(every)), every)
    assert encoding.decode(every)[[0, 255]].tolist() == [-1, 1]


def test_every_bit_of_bfloat16_survives() -> None:
    encoding = Encoding("bf16")
    every = np.arange(2**16, dtype="<u2")
    tensor = encoding.to_tensor(every)
    assert tensor.dtype == torch.bfloat16
    np.testing.assert_array_equal(encoding.to_array(tensor), every)
    finite = torch.isfinite(tensor)
    np.testing.assert_array_equal(encoding.to_array(encoding.encode(encoding.decode(tensor)))[finite], every[finite])


def test_values_outside_the_range_are_clamped() -> None:
    values = torch.tensor([-1e30, -65505.0, -1.5, 1.5, 65505.0, 1e30])
    assert there_and_back("uint8", values).tolist() == [-1, -1, -1, 1, 1, 1]
    assert there_and_back("fp16", values).tolist() == [-65504, -65504, -1.5, 1.5, 65504, 65504]
    assert bool(torch.isfinite(there_and_back("bf16", values)).all())


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_recoding_is_decoding_and_encoding(source: StateDtype, target: StateDtype) -> None:
    old, new = Encoding(source), Encoding(target)
    values = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(1))
    rows = old.to_array(old.encode(values))
    rows.setflags(write=False)  # like rows read directly from a file
    recoded = new.recode(rows, old)
    assert recoded.dtype == new.array
    wanted = new.to_array(new.encode(old.decode(old.encode(values))))
    np.testing.assert_array_equal(recoded, wanted)
    if (source, target) in {(n, n) for n in NAMES} | {("fp16", "fp32"), ("bf16", "fp32"), ("uint8", "fp32")}:
        np.testing.assert_array_equal(old.recode(recoded, new), rows)  # nothing was lost


def test_read_only_rows_are_copied() -> None:
    for name in NAMES:
        encoding = Encoding(name)
        rows = np.zeros(4, encoding.array)
        rows.setflags(write=False)
        encoding.to_tensor(rows).fill_(1)
        assert not rows.any()


@pytest.mark.parametrize("name", NAMES)
def test_generation_zero_depends_only_on_seed_and_sample(name: StateDtype) -> None:
    encoding = Encoding(name)
    whole = encoding.to_array(generation_zero(5, np.arange(100), (2, 4, 4), encoding))
    some = np.array([99, 3, 3, 57])
    np.testing.assert_array_equal(encoding.to_array(generation_zero(5, some, (2, 4, 4), encoding)), whole[some])
    assert np.any(encoding.to_array(generation_zero(6, np.arange(100), (2, 4, 4), encoding)) != whole)


def test_generation_zero_is_standard_normal() -> None:
    encoding = Encoding("fp32")
    drawn = encoding.decode(generation_zero(0, np.arange(2000), (3, 8, 8), encoding))
    assert abs(float(drawn.mean())) < 5 / drawn.numel() ** 0.5
    assert abs(float(drawn.var()) - 1) < 5 * (2 / drawn.numel()) ** 0.5


def test_uint8_decodes_to_the_same_bits_on_every_device() -> None:
    """Dividing in float32 rounds as here on a CPU, but differently on a GPU (docs/gpu.md)."""
    levels = np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1)
    decoded = Encoding("uint8").decode(torch.arange(256).to(torch.uint8))
    assert np.array_equal(decoded.numpy().view(np.int32), levels.view(np.int32))
