"""The trainer's view of a data set: validated batches, and a fingerprint that detects changed data."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch

from udddm.data.huggingface import wrapped
from udddm.data.images import (
    ArrayImages,
    BatchSource,
    Ids,
    Labels,
    MapDataset,
    as_channels_first,
    check_labels,
    format_shape,
    require_map_style,
    scaled,
    split_sample,
)
from udddm.errors import ConfigError, DataError

log = logging.getLogger(__name__)

PROBES = 16  # samples that a fingerprint covers


class ImageDataset:
    """A map-style object, read in batches of float32 images [n, C, H, W] in [-1, 1], with or without labels.

    `source` is a BatchSource, an array or tensor of all images, a `datasets.Dataset` (Hugging Face) with a column of
    images, or any object whose `source[i]` is an image or (image, label). An image is a torch tensor or NumPy array
    [C, H, W] or [H, W], uint8 [H, W, C] with 1, 3 or 4 channels, or a PIL image. uint8 values become value / 127.5 - 1;
    floats must be in [-1, 1]. All images must have the same shape, and either all or none must have a label. Samples of
    a paired data set are (image, condition) or (image, condition, label), where the condition is an image of the same
    shape (`data.condition`). The optional attribute `classes` of a source with labels is the number of classes, or a
    list of their names as in torchvision.

    Thread-safe: a source that is not a BatchSource is called by one thread at a time.

    Raises DataError for an object that is not map-style or is empty, or if the first sample is not an image.
    """

    shape: tuple[int, int, int]
    """(C, H, W) of every image."""
    paired: bool
    """Whether every sample has a conditioning image."""
    labelled: bool
    """Whether the samples have labels."""
    classes: int | None
    """The number of classes, if the source provides it. None without labels."""
    class_names: list[str]
    """The names of the classes. Empty if the source does not provide them."""

    def __init__(self, source: MapDataset | torch.Tensor | np.ndarray[Any, Any]) -> None:
        source = wrapped(source)  # type: ignore[assignment]
        require_map_style(source, "the data set")
        if isinstance(source, torch.Tensor):
            source = source.detach().cpu()
            source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
        self._source: MapDataset = ArrayImages(source) if isinstance(source, np.ndarray) else source
        self._lock = threading.Lock()
        self._length = len(self._source)
        if self._length == 0:
            raise DataError("the data set is empty")
        first = np.zeros(1, dtype=np.int64)
        if isinstance(self._source, BatchSource):
            images, labels = self._source.batch(first)
            image, condition = np.split(images[0], 2) if self._source.paired else (images[0], None)
            label = None if labels is None else labels[0]
        else:
            image, condition, label = self._sample(0)
        channels, height, width = image.shape
        self.shape = (channels, height, width)
        self.labelled, self.paired = label is not None, condition is not None
        self.classes = _count_classes(self._source) if self.labelled else None
        self._remedy = ""
        self.class_names = _class_names(self._source) if self.labelled else []
        self.read(first)  # reports a wrong range or label now instead of in the first step

    def __len__(self) -> int:
        return self._length

    @property
    def in_memory(self) -> bool:
        """Whether the images are an array in memory or a memory-mapped file, which nothing has to decode."""
        return isinstance(self._source, BatchSource) and self._source.in_memory

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def batch(self, ids: Ids) -> tuple[torch.Tensor, Labels | None]:
        """Returns the samples `ids` (int64 [n], each in 0..N-1), without conditioning images.

        These are images, float32 [n, C, H, W] in [-1, 1] on the CPU, and labels, int64 [n], or None if the data set has
        none.

        Raises IndexError for an id out of range. Raises DataError, which names the sample, for a shape that differs
        from sample 0, NaN, a value out of range, an integer type other than uint8, or a missing or invalid label.
        """
        images, labels = self.read(ids)
        return images[:, : self.shape[0]].contiguous(), labels

    def read(self, ids: Ids) -> tuple[torch.Tensor, Labels | None]:
        """The same as `batch`, with conditioning images: [n, 2 C, H, W] if the data set is paired.

        The conditioning images are the last C channels. Raises the errors of `batch`, and DataError for a sample
        without a conditioning image, or with one of another shape.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < self._length):  # NumPy would accept negative ids
            raise IndexError(f"ids {ids.min()}..{ids.max()} of a data set of {self._length} samples")
        if isinstance(self._source, BatchSource):
            rows, labels = self._source.batch(ids)
            channels, *sides = self.shape
            if rows.shape != (len(ids), channels * (2 if self.paired else 1), *sides):
                raise DataError(f"a batch of {len(ids)} images of {self._describe()} has shape {list(rows.shape)}")
            images = scaled(rows, ids)
            if labels is not None and self.classes is not None and len(labels) and labels.max() >= self.classes:
                worst = int(labels.argmax())
                check_labels(labels[worst : worst + 1], 1, self.classes, f"sample {ids[worst]}", self._remedy)
        else:
            channels, *sides = self.shape
            images = np.empty((len(ids), channels * (2 if self.paired else 1), *sides), dtype=np.float32)
            labels = np.empty(len(ids), dtype=np.int64) if self.labelled else None
            for row, index in enumerate(ids.tolist()):
                image, condition, label = self._sample(index)
                if image.shape != self.shape:
                    raise DataError(
                        f"sample {index} is {format_shape(image.shape)}, but sample 0 is {self._describe()}: "
                        "all images must have the same shape"
                    )
                images[row, :channels] = scaled(image[None], ids[row : row + 1])[0]
                self._add_condition(images[row, channels:], condition, index)
                if labels is not None:
                    labels[row] = self._label(label, index)
                elif label is not None:
                    raise DataError(f"sample {index} has a label, but sample 0 has none: label all samples or none")
        return torch.from_numpy(images), labels

    def check_classes(self, classes: int) -> None:
        """Raise ConfigError unless all labels are in 0..classes-1, as a network with `classes` classes needs.

        The network uses the label `classes` for "no label". Labels that are known only from their samples are checked
        by later calls of `batch`.
        """
        if not self.labelled:
            raise ConfigError(
                f"network.classes is {classes}, but the data set has no labels: "
                "give it labels, or set network.classes to 0"
            )
        labels = self._source.labels if isinstance(self._source, BatchSource) else None
        low, high = (0, self.classes or 0) if labels is None else (int(labels.min()), int(labels.max()) + 1)
        if high > classes:
            lie = f"has {high} classes" if labels is None else f"has labels in {low}..{high - 1}"
            raise ConfigError(
                f"network.classes is {classes}, whose labels are 0..{classes - 1}, but the data set {lie}: "
                + (f"subtract {low} from the labels" if 0 < low <= high - classes else "renumber the labels from 0")
                + f", or set network.classes to {high}"
            )
        known = self.classes or high
        if 0 < known < classes:
            log.warning(
                "network.classes is %d, but the data set has %d classes: nothing trains the others, and samples of "
                "them will be noise; set network.classes=%d unless this is intended",
                classes,
                known,
                known,
            )
        if self.classes is None:
            self.classes, self._remedy = classes, ", or set network.classes to the number of classes"

    def fingerprint(self) -> dict[str, Any]:
        """What a run records to detect changed data: `{"length": N, "shape": [C, H, W], "digest": sha256}`.

        Also has `class_names` if they are known, `earlier_digest` if earlier versions read different labels, and
        `content`, a digest of all samples, for an array of at most 1 GiB in memory or in a .npy file.

        The digest covers the images and labels of 16 evenly spaced samples, including the first and the last. It is
        cheap, and does not detect changes of other samples. It is None if reading a sample twice gives other images.
        """
        probes = np.unique(np.linspace(0, self._length - 1, PROBES).round().astype(np.int64))
        images, labels = self.read(probes)
        digest: str | None = _digest(images, labels)
        if not isinstance(self._source, BatchSource) and _digest(*self.read(probes)) != digest:
            digest = None
            log.warning(
                "the data set returns different images when read again (a random transform?); each stored state "
                "belongs to one image, so prefer fixed images"
            )
        elif images[:, : self.shape[0]].min() >= 0 and images.max() > 0:
            log.warning(
                "no sampled image has a value below 0; if your images are scaled to [0, 1], scale them to [-1, 1]"
            )
        found = {"length": self._length, "shape": list(self.shape), "digest": digest}
        if self.class_names:
            found["class_names"] = self.class_names
        if isinstance(self._source, BatchSource) and (content := self._source.content()):
            found["content"] = content
        if isinstance(self._source, BatchSource) and not isinstance(self._source.earlier_labels, str):
            earlier = self._source.earlier_labels
            found["earlier_digest"] = _digest(images, None if earlier is None else earlier[probes])
        return found

    def _describe(self) -> str:
        return format_shape(self.shape)

    def _add_condition(self, row: np.ndarray[Any, Any], condition: np.ndarray[Any, Any] | None, index: int) -> None:
        """Write the conditioning image of sample `index` to `row`, which has no channels if there is to be none."""
        if (condition is not None) != self.paired:
            first, this = ("one", "no") if self.paired else ("none", "a")
            raise DataError(
                f"sample {index} has {this} conditioning image, but sample 0 has {first}: give all samples one, or none"
            )
        if condition is None:
            return
        if condition.shape != self.shape:
            raise DataError(
                f"the conditioning image of sample {index} is {format_shape(condition.shape)}, but the images are "
                f"{self._describe()}: give it the same shape, for example by enlarging it"
            )
        row[:] = scaled(condition[None], np.array([index]))[0]

    def _sample(self, index: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None, Any]:
        try:
            with self._lock:
                sample = self._source[index]
        except DataError:
            raise
        except Exception as error:
            error.add_note(f"while reading sample {index} of the data set")
            raise
        image, condition, label = split_sample(sample, f"sample {index}")
        if condition is not None:
            condition = as_channels_first(condition, f"the conditioning image of sample {index}")
        return as_channels_first(image, f"sample {index}"), condition, label

    def _label(self, label: Any, index: int) -> int:
        if label is None:
            raise DataError(f"sample {index} has no label, but sample 0 has one: label all samples or none")
        if isinstance(label, torch.Tensor):
            label = label.detach().cpu().numpy()
        array = np.asarray(label)
        if array.shape not in ((), (1,)):
            raise DataError(f"the label of sample {index} has shape {list(array.shape)}: return one integer")
        return int(check_labels(array.reshape(1), 1, self.classes, f"sample {index}", self._remedy)[0])


def check_agreement(fingerprints: Sequence[Mapping[str, Any]], places: Sequence[str]) -> None:
    """Raise DataError if the data sets of several ranks differ. Messages name each rank by its entry in `places`."""
    first = fingerprints[0]
    for found, place in zip(fingerprints, places, strict=True):
        for key, what in (("length", "samples"), ("shape", "images of shape")):
            if found[key] != first[key]:
                raise DataError(
                    f"{place} has {what} {found[key]}, but {places[0]} has {first[key]}: every rank must read the same "
                    "data set, so copy the complete data to each machine or use shared storage"
                )
        if found != first:
            raise DataError(
                f"{place} and {places[0]} read different data sets of {first['length']} samples (different images, "
                "labels, classes or order): copy the same data to each machine, and make sure that every rank reads it "
                "in the same order with the same package versions"
            )


def check_unchanged(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise DataError, which lists the changes, if the fingerprint of a run and that of the current data differ."""
    changes = []
    if recorded.get("length") != current.get("length"):
        changes.append(f"it had {recorded.get('length')} samples and now has {current.get('length')}")
    if recorded.get("shape") != current.get("shape"):
        before, now = (format_shape(each.get("shape") or ()) for each in (recorded, current))
        changes.append(f"its images were {before} and now are {now}")
    names, names_now = recorded.get("class_names"), current.get("class_names")
    if names and names_now and names != names_now:  # runs of earlier versions did not record names
        changes.append(f"its classes were {_listed(names)} and now are {_listed(names_now)}")
    accepted = [current[key] for key in ("digest", "earlier_digest") if key in current]
    if not changes and (recorded.get("digest") not in accepted or _content_differs(recorded, current)):
        changes.append("the contents of its samples differ (images, labels, order, preprocessing or image decoder)")
    if changes:
        raise DataError(
            f"the data set is not the one this run was started with: {'; '.join(changes)}; "
            "restore the old data, or start a new run"
        )


def _content_differs(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Whether both have a digest of all samples of the same type, and they differ. Earlier versions recorded none."""
    (before, digest_before), (now, digest_now) = (
        str(each.get("content", "")).split(":", 1) if each.get("content") else ("", "") for each in (recorded, current)
    )
    same_labels = recorded.get("digest") == current.get("digest")  # not those that an earlier version read
    return same_labels and bool(before) and before == now and digest_before != digest_now


def _digest(images: torch.Tensor, labels: Labels | None) -> str:
    digest = hashlib.sha256(images.numpy().astype("<f4").tobytes())
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _listed(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _class_names(source: object) -> list[str]:
    """The names of the classes, from `class_names`, or from `classes` as in torchvision."""
    for attribute in ("class_names", "classes"):
        names = getattr(source, attribute, None)
        if isinstance(names, Sequence) and not isinstance(names, str) and names:
            return [str(name) for name in names]
    return []


def _count_classes(source: object) -> int | None:
    classes = getattr(source, "classes", None)
    if isinstance(classes, Sized) and not isinstance(classes, str):
        classes = len(classes)
    return int(classes) if isinstance(classes, int | np.integer) and classes > 0 else None
