"""Hostile and damaged pickles are refused by name, and nothing in them runs."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from udddm.config import RunConfig, resolve
from udddm.errors import CheckpointError
from udddm.runs.conversion import edm, tensors
from udddm.runs.conversion.inert_pickle import Inert, Name, read

SHAPE = (3, 8, 8)


def config() -> RunConfig:
    return resolve({"network": {"name": "ddpmpp", "condition": "none", "channel_mult": [1, 2]}})


class Calls:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def named(module: str, name: str, *arguments: str) -> bytes:
    """A pickle that calls module.name, which need not exist here, with texts."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value.encode())]) + value.encode()

    body = b"".join(text(each) for each in arguments)
    return b"\x80\x04" + text(module) + text(name) + b"\x93(" + body + b"tR."


def snapshot(content: bytes) -> bytes:
    """A pickle of {"ema": the object of another pickle}."""
    return b"\x80\x04}\x8c\x03ema" + content.removeprefix(b"\x80\x04").removesuffix(b".") + b"s."


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def hostile(mark: Path) -> dict[str, tuple[bytes, str]]:
    touch = f"touch {mark}"
    storage = pickle.dumps(Calls(os.system, touch), protocol=4)
    inside = named("torch.storage", "_load_from_bytes")[:-3] + pickle.dumps(storage, protocol=4)[2:-1] + b"tR."
    source = {
        "type": "class",
        "class_name": "EDMPrecond",
        "module_src": f"import os; os.system({touch!r})",
        "state": {},
    }
    return {
        "os.system": (pickle.dumps(Calls(os.system, touch)), "posix.system"),
        "eval": (pickle.dumps(Calls(eval, f"__import__('os').system({touch!r})")), "builtins.eval"),
        "exec": (pickle.dumps(Calls(exec, f"open({str(mark)!r}, 'w')")), "builtins.exec"),
        "getattr": (named("builtins", "getattr", "x", "y"), "builtins.getattr"),
        "a name inside an allowed module": (named("torch.storage", "os.system", touch), "torch.storage.os.system"),
        "a name behind an allowed name": (
            named("torch_utils.persistence", "_reconstruct_persistent_obj.__globals__"), "__globals__"
        ),
        "a dotted module": (named("torch._utils._rebuild_tensor_v2.__globals__", "eval"), "__globals__"),
        "an old style name": (b"cposix\nsystem\n(V" + touch.encode() + b"\ntR.", "posix.system"),
        "an instance": (b"(V" + touch.encode() + b"\niposix\nsystem\n.", "the operation INST"),
        "an object": (b"(cposix\nsystem\nV" + touch.encode() + b"\no.", "posix.system"),
        "an extension": (b"\x80\x02\x82\x01.", "the operation EXT1"),
        "a reference outside": (b"\x80\x02Vx\nQ.", "a reference to something outside"),
        "a call of a record": (named("collections", "OrderedDict")[:-1] + b"(tR.", "not a name"),
        "a name inside a storage": (snapshot(inside), "posix.system"),
        "source code": (pickle.dumps({"ema": 1}) + pickle.dumps(source), "not a module"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(hostile(Path("x"))))
def test_hostile_pickles_are_refused_by_name_and_run_nothing(kind: str, mark: Path, tmp_path: Path) -> None:
    data, message = hostile(mark)[kind]
    path = tmp_path / "snapshot.pkl"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        if kind == "a name inside a storage":
            with path.open("rb") as file:
                tensors._storage(read(file, edm.NAMES, path)["ema"], path)
        else:
            edm.convert(path, config(), SHAPE)
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert not mark.exists()


def test_the_hostile_pickles_would_run_otherwise(mark: Path) -> None:
    """The test above would not notice a mark that no pickle makes."""
    pickle.loads(hostile(mark)["os.system"][0])
    assert mark.exists()


LIMITED = """
import json, resource, sys
from pathlib import Path
from udddm.errors import CheckpointError
from udddm.runs.conversion import edm, tensors
from udddm.runs.conversion.inert_pickle import read

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
said = {}
for path in Path(sys.argv[1]).iterdir():
    try:
        with path.open("rb") as file:
            said[path.name] = repr(tensors.tensor(read(file, edm.NAMES, "snapshot.pkl"), "snapshot.pkl"))
    except CheckpointError as error:
        said[path.name] = f"refused: {error}"
print(json.dumps(said))
"""
"""Reads the pickles of a folder in a process that can allocate 1 GiB beyond what its imports take."""


def tensor_pickle(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, values: int = 4) -> bytes:
    storage = io.BytesIO()
    torch.save(torch.ones(values)._typed_storage(), storage, _use_new_zipfile_serialization=False)
    rebuild, load = torch._utils._rebuild_tensor_v2, torch.storage._load_from_bytes  # type: ignore[attr-defined]
    held = Calls(load, storage.getvalue())
    return pickle.dumps(Calls(rebuild, held, offset, size, stride, False, collections.OrderedDict()))


def bombs() -> dict[str, tuple[bytes, str]]:
    doubled = b"\x80\x04]\x94" + b"".join(b"](h" + bytes([n]) + b"h" + bytes([n]) + b"e\x94" for n in range(200)) + b"."
    return {
        "text that is not there": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.", "not a valid pickle"),
        "bytes that are not there": (b"\x80\x05\x8e" + struct.pack("<Q", 1 << 40) + b"x.", "not a valid pickle"),
        "a number that is not there": (b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"x.", "not a valid pickle"),
        "a memo at a huge index": (b"\x80\x02Nr" + struct.pack("<I", 0xFFFFFFFF) + b".", "not a tensor"),
        "a list of lists, doubled 200 times": (doubled, "not a tensor"),
        "tuples 200,000 deep": (b"\x80\x02)" + b"\x85" * 200_000 + b".", "not a tensor"),
        "a deep key": (b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.", "a key that is neither text nor a number"),
        "marks without end": (b"(" * 600_000 + b".", "has more than 500000 operations"),
        "a tensor beyond its storage": (tensor_pickle((1 << 40,), (0,)), "a storage of 4"),
        "a stride beyond its storage": (tensor_pickle((2, 2), (1 << 40, 1)), "a storage of 4"),
        "an offset beyond its storage": (tensor_pickle((4,), (1,), 1), "a storage of 4"),
        "a negative size": (tensor_pickle((-1,), (1,)), "invalid shape"),
    }


def test_files_that_ask_for_memory_are_refused_with_little_of_it(tmp_path: Path) -> None:
    expected = bombs()
    for kind, (data, _) in expected.items():
        (tmp_path / kind).write_bytes(data)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [kind for kind, (_, message) in expected.items() if not said[kind].startswith("refused: ")] == []
    assert {kind: said[kind] for kind, (_, message) in expected.items() if message not in said[kind]} == {}


def test_every_truncation_is_refused() -> None:
    whole = tensor_pickle((2, 2), (2, 1))
    assert torch.equal(tensors.tensor(read(io.BytesIO(whole), edm.NAMES, "x"), "x"), torch.ones(2, 2))
    for length in range(len(whole)):
        with pytest.raises(CheckpointError, match="x is not a valid pickle"):
            read(io.BytesIO(whole[:length]), edm.NAMES, "x")


def test_a_truncated_storage_is_refused() -> None:
    record = read(io.BytesIO(tensor_pickle((4,), (1,))), edm.NAMES, "x")
    data = record.arguments[0].arguments[0]
    for length in range(len(data)):
        cut = Inert(record.name, (Inert(tensors.STORAGE, (data[:length],)), *record.arguments[1:]))
        with pytest.raises(CheckpointError):
            tensors.tensor(cut, "x")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_tensors_are_those_that_were_pickled(dtype: torch.dtype) -> None:
    base = torch.arange(24).view(4, 6).to(dtype)
    for tensor in (base, base.t(), base[1:, 2:4], base[0, 0], base[:0]):
        found = tensors.tensor(read(io.BytesIO(pickle.dumps(tensor)), edm.NAMES, "x"), "x")
        assert found.dtype == dtype and torch.equal(found, tensor)
    parameter = torch.nn.Parameter(torch.ones(2))
    record = read(io.BytesIO(pickle.dumps(parameter)), edm.NAMES, "x")
    assert torch.equal(tensors.tensor(record, "x"), parameter.detach())


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@settings(max_examples=60)
@given(PLAIN, st.sampled_from([3, 4, 5]))
def test_plain_data_is_read_as_pickle_reads_it(value: Any, protocol: int) -> None:
    assert read(io.BytesIO(pickle.dumps(value, protocol)), (), "x") == value


def test_objects_are_records_of_names() -> None:
    data = pickle.dumps([np.float64(0.5), collections.OrderedDict(a=1), {"x", "y"}], protocol=4)
    scalar, ordered, elements = read(io.BytesIO(data), edm.NAMES, "x")
    assert isinstance(scalar, Inert) and scalar.name.endswith("multiarray.scalar")
    assert isinstance(scalar.arguments[0], Inert) and scalar.arguments[0].name == "numpy.dtype"
    assert ordered == {"a": 1} and sorted(elements) == ["x", "y"]
    assert read(io.BytesIO(b"cnumpy\ndtype\n."), edm.NAMES, "x") == Name("numpy.dtype")


@settings(max_examples=150)
@given(st.data())
def test_damaged_bytes_are_read_or_refused(data: st.DataObject) -> None:
    """Whatever a byte is changed to, the only error is CheckpointError."""
    whole = bytearray(tensor_pickle((2, 2), (2, 1)))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(CheckpointError):
        tensors.tensor(read(io.BytesIO(bytes(whole)), edm.NAMES, "x"), "x")


def test_operations_without_operands_are_refused() -> None:
    """Every operation of pickle, on an empty stack."""
    for code in pickletools.opcodes:
        data = code.code.encode("latin-1") + b"0\n0\n" + b"\0" * 16 + b"."
        with pytest.raises(CheckpointError):
            read(io.BytesIO(data), (), "x")
