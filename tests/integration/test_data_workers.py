"""Images that several processes read are the same, in the same order, and a process that fails does no harm."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import udddm
from udddm.data import ImageDataset, load_dataset
from udddm.data.reading import ProcessReader
from udddm.errors import ConfigError, DataError
from udddm.log import log as logger
from udddm.training.trainer import Trainer

TINY: dict[str, Any] = {
    "network": {"base_channels": 4, "channel_mult": [1], "blocks_per_level": 1, "attention_resolutions": []},
    "order": {"lanes": 1, "chunk": 16, "window": 1},
    "train": {"steps": 12, "batch_size": 8, "ema": [0.9]},
    "checkpoint": {"every_steps": 6},
    "sample": {"every_steps": 0, "final": 0},
    "store": {"kind": "gpu"},
}


class Images:
    """Images with labels, read one by one. Sample `broken` does what `how` says."""

    classes = 3

    def __init__(self, broken: int = -1, how: str = ""):
        self.broken, self.how = broken, how

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        if index == self.broken:
            if self.how == "raise":
                raise RuntimeError("the disk is gone")
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "hang":
                time.sleep(1000)
        return np.full((1, 8, 8), index / 64, np.float32), index % 3


class Unusable(Images):
    """Cannot be opened in another process."""

    def __setstate__(self, state: Any) -> None:
        raise OSError("no such device")


@pytest.fixture
def reader(request: pytest.FixtureRequest) -> Iterator[ProcessReader]:
    made = ProcessReader(ImageDataset(Images(*getattr(request, "param", ()))), 2)
    yield made
    made.close()


def children() -> set[int]:
    return {process.pid or 0 for process in multiprocessing.active_children()}


@pytest.mark.parametrize("processes", [1, 3])
def test_batches_do_not_depend_on_the_number_of_processes(processes: int) -> None:
    dataset = ImageDataset(Images())
    reader = ProcessReader(dataset, processes)
    batches = [np.array(ids) for ids in ([5, 3, 60, 3], [0], list(range(64)))]
    pending = [reader.request(ids) for ids in batches]
    for ids, read in zip(batches, pending, strict=True):
        (images, labels), (expected, expected_labels) = read(ids), dataset.batch(ids)
        assert images.equal(expected) and labels is not None and expected_labels is not None
        assert labels.tolist() == expected_labels.tolist()
    reader.close()


def test_a_run_does_not_depend_on_them_and_may_resume_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(run: str, workers: int) -> list[str]:
        result = udddm.train(TINY, Images(), run_dir=tmp_path / run, device="cpu", overrides={"data.workers": workers})
        return [result.weights_sha256, result.ema_sha256, result.state_sha256]

    save = Trainer.save

    def failing(trainer: Trainer) -> Path:
        save(trainer)
        raise RuntimeError("the power fails")

    alone = train("alone", 0)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the power fails"):
        patch.setattr(Trainer, "save", failing)
        train("mixed", 2)
    assert train("mixed", 1) == alone


@pytest.mark.parametrize("reader", [(7, "raise")], indirect=True)
def test_an_error_of_the_data_set_names_the_sample(reader: ProcessReader) -> None:
    ids = np.arange(16)
    with pytest.raises(RuntimeError, match="the disk is gone") as raised:
        reader.request(ids)(ids)
    assert any("sample 7" in note for note in raised.value.__notes__)
    again = np.arange(8, 16)
    assert len(reader.request(again)(again)[0]) == 8, "the processes go on"


def test_an_invalid_image_is_the_same_error(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    from PIL import Image

    for number in range(4):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
    config = udddm.load_config(None, ["data.name=folder", f"data.path={tmp_path}"])
    dataset = ImageDataset(load_dataset(config.data))
    (tmp_path / "2.png").write_bytes(b"not an image")
    reader = ProcessReader(dataset, 2)
    ids = np.arange(4)
    with pytest.raises(DataError, match=r"2\.png"):
        reader.request(ids)(ids)
    reader.close()


@pytest.mark.parametrize("reader", [(7, "die")], indirect=True)
def test_a_process_that_is_killed_is_one_error(reader: ProcessReader) -> None:
    ids = np.arange(16)
    for _ in range(2):
        with pytest.raises(DataError, match=r"a process that reads the data set ended unexpectedly.*data\.workers"):
            reader.request(ids)(ids)


@pytest.mark.parametrize("reader", [(7, "hang")], indirect=True)
def test_closing_ends_a_process_whose_data_set_does_not_answer(reader: ProcessReader) -> None:
    ids = np.arange(16)
    reader.request(ids)
    time.sleep(0.5)
    started = children()
    reader.close()
    deadline = time.monotonic() + 30
    while started & children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not started & children()


def test_a_data_set_that_cannot_be_sent_or_opened_is_named() -> None:
    source = Images()
    source.open_file = open(os.devnull)  # type: ignore[attr-defined]  # noqa: SIM115, PTH123
    with pytest.raises(ConfigError, match=r"data\.workers=2: the data set cannot be sent"):
        ProcessReader(ImageDataset(source), 2)
    source.open_file.close()  # type: ignore[attr-defined]
    reader = ProcessReader(ImageDataset(Unusable()), 1)
    ids = np.arange(4)
    with pytest.raises(OSError, match="no such device"):
        reader.request(ids)(ids)
    reader.close()


def test_images_in_memory_are_read_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = np.zeros((64, 1, 8, 8), np.uint8)
    before = children()
    with caplog.at_level("INFO", logger=logger.name):
        udddm.train(TINY, images, run_dir=tmp_path / "run", device="cpu", overrides={"data.workers": 2})
    assert children() <= before
    assert "data.workers has no effect" in caplog.text


class Slow(Images):
    def __getitem__(self, index: int) -> Any:
        time.sleep(0.02)
        return super().__getitem__(index)


def test_a_run_that_waits_for_its_images_says_what_helps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger=logger.name):
        udddm.train(TINY, Slow(), run_dir=tmp_path / "run", device="cpu", overrides={"log_every_steps": 3})
    assert caplog.text.count("data.workers=1 reads them in 1 other process per rank") == 1
