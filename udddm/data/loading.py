"""Loads the data set of the configuration section `data`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from udddm.config import DataConfig, ExpectConfig
from udddm.config.plugins import load_plugin
from udddm.data import arrays, folder, huggingface, sources, webdataset, zip_archive
from udddm.data.dataset import ImageDataset
from udddm.data.encoded import EncodedImages, ImageFiles
from udddm.data.images import MapDataset, format_shape, require_map_style
from udddm.data.pairs import ConditionFiles, MatchedFiles, PairedImages
from udddm.errors import ConfigError, DataError
from udddm.files import expanded
from udddm.storage import local_path

FILES: dict[str, Callable[[DataConfig], ImageFiles]] = {
    "folder": lambda config: folder.open_folder(_place(config), config.size),
    "zip": lambda config: zip_archive.ZipFiles(_place(config)),
    "webdataset": lambda config: webdataset.TarShards(_place(config), config.image, config.label),
    "huggingface": lambda config: huggingface.open_huggingface(
        _place(config), image=config.image, label=config.label, split=config.split
    ),
}
"""The data sets of image files, which are decoded at each access."""

BUILT_IN: dict[str, Callable[[DataConfig], MapDataset]] = {
    "digits": lambda config: sources.digits(),
    "fashion-mnist": lambda config: sources.fashion_mnist(_optional_path(config)),
    "cifar10": lambda config: sources.cifar10(_optional_path(config)),
    **dict.fromkeys(FILES, lambda config: _decoded(config)),
    "array": lambda config: _array(config),
}

_TAKEN: dict[str, tuple[str, ...]] = {
    "size": tuple(FILES),
    "image": ("webdataset", "huggingface"),
    "label": ("webdataset", "huggingface"),
    "split": ("huggingface",),
}
"""The data sets to which a setting applies."""

CONDITIONS_APART = ("folder", "zip", "array")
"""The data sets whose conditioning images may be at `data.condition.path`."""
CONDITIONS_WITHIN = ("webdataset", "huggingface", "array")
"""The data sets whose samples may contain their conditioning images, at `data.condition.image`."""

_ALWAYS = {
    "digits": ExpectConfig(samples=1797, shape=(1, 8, 8), classes=10),
    "fashion-mnist": ExpectConfig(samples=60_000, shape=(1, 28, 28), classes=10),
    "cifar10": ExpectConfig(samples=50_000, shape=(3, 32, 32), classes=10),
}
"""The contents of the built-in data sets."""


def expected(config: DataConfig) -> ExpectConfig | None:
    """The expected contents, known without reading the data: `data.expect`, or those of a built-in data set."""
    return config.expect or _ALWAYS.get(config.name)


def load_dataset(config: DataConfig) -> MapDataset:
    """Load the data set that `config` names: a map-style object of images or (image, label) pairs.

    Wrap it in ImageDataset to read batches. Raises DataError for an unknown name, a setting that the data set does not
    support, and data that are missing, corrupt or different from `config.expect`.
    """
    dataset = _open(config)
    if config.expect is not None:
        _check(dataset, config.name, config.expect)
    return dataset


def _check(dataset: MapDataset, name: str, expect: ExpectConfig) -> None:
    images = ImageDataset(dataset)
    differing = []
    if len(images) != expect.samples:
        differing.append(f"it has {len(images)} samples, not {expect.samples}")
    if images.shape != expect.shape:
        differing.append(f"its images are {format_shape(images.shape)}, not {format_shape(expect.shape)}")
    if expect.classes is not None and not images.labelled:
        differing.append(f"it has no labels, not {expect.classes} classes")
    elif expect.classes is not None and images.classes not in (None, expect.classes):
        differing.append(f"it has {images.classes} classes, not {expect.classes}")
    if differing:
        raise DataError(
            f"the data set {name} does not match data.expect: {'; '.join(differing)}. Correct data.path or data.expect"
        )


def open_files(config: DataConfig) -> ImageFiles:
    """The image files of a data set whose name is one of FILES, not decoded. Raises DataError."""
    return FILES[config.name](config)


def open_conditions(config: DataConfig, images: ImageFiles) -> ImageFiles | None:
    """The conditioning images of `images`, the files of a data set of pairs, in their order. None without pairs.

    Raises ConfigError and DataError, which names the file, for an image without a partner.
    """
    if config.condition.kind != "pairs":
        return None
    path, image = config.condition.path, config.condition.image
    found: ImageFiles
    if config.name == "webdataset":
        found = webdataset.TarShards(_place(config), image, config.label, part="condition")
    elif config.name == "huggingface":
        found = huggingface.open_conditions(_place(config), condition=image, split=config.split)
    elif path is None:
        raise ConfigError(
            f"data.condition.kind=pairs needs data.condition.path, the {config.name} of conditioning images with the "
            "names of the images"
        )
    else:
        local = local_path(path)
        place = path if local is None else str(local)
        found = zip_archive.ZipFiles(place) if _is_zip(place) else folder.open_folder(place, config.size)
    return MatchedFiles(images, found)


def _is_zip(place: str) -> bool:
    return place.lower().endswith(".zip")


def _decoded(config: DataConfig) -> MapDataset:
    files = open_files(config)
    images = EncodedImages(files, config.size)
    others = open_conditions(config, files)
    if others is None:
        return images
    conditions = ConditionFiles(others, images, config.size)
    return PairedImages(images, conditions, (files.where, others.where))


def _array(config: DataConfig) -> MapDataset:
    path, section = _path(config), config.condition
    within = None
    if section.kind == "pairs" and section.path is None:
        within = section.image or arrays.CONDITIONS
    images = arrays.open_array(path, missing_chunks=config.missing_chunks, conditions=within)
    if section.path is None:
        return images
    conditions = arrays.open_array(section.path, missing_chunks=config.missing_chunks)
    return PairedImages(images, conditions, (path, section.path))


def _open(config: DataConfig) -> MapDataset:
    _refuse_conditions(config)
    if ":" in config.name:
        _refuse(config, path=config.path, **{key: getattr(config, key) for key in _TAKEN})
        return _from_factory(config.name, config.arguments)
    if config.name not in BUILT_IN:
        match = difflib.get_close_matches(config.name, BUILT_IN, 1, 0.5)
        hint = f"did you mean {match[0]}? The choices are" if match else "the choices are"
        raise ConfigError(
            f"data.name: unknown data set {config.name!r}; {hint} {', '.join(BUILT_IN)}, and package.module:function"
        )
    _refuse(
        config,
        path=config.path if config.name == "digits" else None,
        arguments=config.arguments or None,
        **{key: getattr(config, key) for key, names in _TAKEN.items() if config.name not in names},
    )
    return BUILT_IN[config.name](config)


def _refuse_conditions(config: DataConfig) -> None:
    """Raise ConfigError for a place of conditioning images that the data set would ignore."""
    for key, names in (("path", CONDITIONS_APART), ("image", CONDITIONS_WITHIN)):
        if getattr(config.condition, key) is not None and config.name not in names:
            other = {"path": "image", "image": "path"}[key]
            known = config.name in (*CONDITIONS_APART, *CONDITIONS_WITHIN)
            hint = f"set data.condition.{other}" if known else "its samples must be (image, condition)"
            raise ConfigError(f"data.condition.{key} does not apply to the data set {config.name}: {hint}")


def _refuse(config: DataConfig, **settings: object) -> None:
    """Raise ConfigError for a setting that the data set would ignore."""
    for key, value in settings.items():
        if value is not None:
            raise ConfigError(f"data.{key} does not apply to the data set {config.name}: {_remedy(config, key)}")


def _remedy(config: DataConfig, key: str) -> str:
    """What to do about a setting that does not apply: most likely, another data set is meant."""
    if ":" in config.name:
        return "move it to data.arguments"
    if key == "path":
        return f"to train on {config.path}, set data.name=folder (image files) or data.name=array (.npy or Zarr)"
    meant = ", ".join(_TAKEN.get(key, ("package.module:function",)))
    return f"set data.name={meant}, or remove data.{key}"


def _path(config: DataConfig) -> str:
    if not config.path:
        raise ConfigError(f"the data set {config.name!r} needs data.path, the location of its images")
    return config.path


def _place(config: DataConfig) -> str:
    """The path, with ~ expanded, or the URL of the data."""
    path = _path(config)
    local = local_path(path)
    return path if local is None else str(local)


def _optional_path(config: DataConfig) -> Path | None:
    return expanded(config.path) if config.path else None


def _from_factory(name: str, arguments: dict[str, Any]) -> MapDataset:
    factory = load_plugin(name, "data set")
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"data set {name!r} does not accept data.arguments: {error}") from error
    except ValueError:
        pass  # a function written in C may have no signature
    dataset = factory(**arguments)
    require_map_style(dataset, f"the return value of {name}")
    result: MapDataset = dataset
    return result
