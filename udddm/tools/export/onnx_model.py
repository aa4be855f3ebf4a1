"""The ONNX file of the one-evaluation generator, compared with PyTorch when it is written.

model.onnx   noise [batch, C, H, W] (condition, mask, label) -> image [batch, C, H, W] in [-1, 1], any batch size
model.json   names, shapes and types of inputs and outputs, classes, opset, and the difference from PyTorch
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import udddm
from udddm.errors import CheckpointError, ConfigError
from udddm.files import write_json
from udddm.tools.export.generator import Generator

if TYPE_CHECKING:
    from udddm.tools.export import Options, Source

OPSET = 18
"""Version of the ONNX operators: the one for which PyTorch's exporter is written."""
LIMITS = {"fp32": 1e-4, "fp16": 0.05}
"""Largest difference from PyTorch in float32, of values in [-1, 1], with which a file is written."""
CHECKED = (1, 8)
"""The batch sizes with which a file is compared."""


def write(source: Source, folder: Path, options: Options) -> list[str]:
    """Write model.onnx and model.json. Raises ConfigError if a package is missing or the network cannot be exported,
    CheckpointError if the file does not compute what PyTorch computes, and OSError."""
    found = describe(source, folder / "model.onnx", options.precision)
    write_json(folder / "model.json", found)
    size = (folder / "model.onnx").stat().st_size
    return [
        f"model.onnx ({size / 1e6:.1f} MB, opset {OPSET}, {options.precision}): at most "
        f"{found['largest_difference']:.1e} from PyTorch",
        f"inputs: {', '.join(each['name'] for each in found['inputs'])}; model.json describes them",
    ]


def describe(source: Source, path: Path, precision: str) -> dict[str, Any]:
    """Write the ONNX file `path` and return the contents of model.json. Raises the errors of `write`."""
    _check_installed()
    model = source.model
    inside = replace(model, network=copy.deepcopy(model.network)) if precision == "fp16" else model
    generator = Generator(inside, half=precision == "fp16").eval()
    _export(generator, generator.example(model, range(3)), path)
    difference = _difference(source, generator, path)
    if not difference <= LIMITS[precision]:
        raise CheckpointError(
            f"the ONNX file differs from PyTorch by {difference:.2g}, more than {LIMITS[precision]:g}, with precision "
            f"{precision}; " + ("export it with --precision fp32" if precision == "fp16" else "please report this")
        )
    image = ["batch", *model.shape]
    return {
        "name": source.facts.name,
        "average": source.average,
        "inputs": _inputs(source, generator),
        "outputs": [{"name": "image", "shape": image, "type": "float32", "range": [-1, 1]}],
        "classes": generator.classes,
        **({} if model.conditions is None else {"condition": model.config.data.condition.kind}),
        "evaluations": 1,
        "opset": OPSET,
        "precision": precision,
        "largest_difference": difference,
        "written_by": f"udddm {udddm.__version__}, torch {torch.__version__}",
    }


MEANINGS = {
    "downscale": "the small image; the model enlarges it by {factor}",
    "gray": "the gray image, one channel",
    "pairs": "the conditioning image",
    "mask": "the image; its values where mask is 1 do not matter",
}
"""Of the input `condition`, by `data.condition.kind`."""


def _inputs(source: Source, generator: Generator) -> list[dict[str, Any]]:
    """Name, shape, type and meaning of each input."""
    model, conditions = source.model, source.model.conditions
    image = ["batch", *model.shape]
    condition: dict[str, Any] = {"shape": image, "meaning": "standard normal noise, independent of the first"}
    if conditions is not None:
        section = model.config.data.condition
        meaning = MEANINGS[section.kind].format(factor=section.factor)
        condition = {"shape": ["batch", *conditions.given_shape], "range": [-1, 1], "meaning": meaning}
    mask = {"shape": ["batch", 1, *model.shape[1:]], "meaning": "1 in hidden pixels, which are generated, otherwise 0"}
    meanings: dict[str, dict[str, Any]] = {
        "noise": {"type": "float32", "shape": image, "meaning": "standard normal noise"},
        "condition": {"type": "float32", **condition},
        "mask": {"type": "float32", **mask},
        "label": {"type": "int64", "shape": ["batch"], "meaning": f"class, 0 to {generator.classes - 1}"},
    }
    return [{"name": name, **meanings[name]} for name in generator.inputs]


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"ONNX files need {error.name}: pip install 'udddm[onnx]'") from error


def _export(generator: Generator, example: dict[str, torch.Tensor], path: Path) -> None:
    """Write the ONNX file of the generator, with weights inside. Raises ConfigError."""
    batch, others = torch.export.Dim("batch"), list(example)[1:]
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                generator,
                tuple(example.values()),
                dynamo=True,
                dynamic_shapes=({0: batch}, *([tuple({0: batch} for _ in others)] if others else [])),
                input_names=list(example),
                output_names=["image"],
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # of a custom network, in any of the exporter's steps
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        first = (str(cause).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"PyTorch cannot export this network to ONNX ({type(cause).__name__}: {first}). Its forward pass must be "
            "traceable by torch.export: no branches that depend on the values of tensors"
        ) from error
    assert program is not None
    program.save(path, external_data=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings about PyTorch's own code and about packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _difference(source: Source, generator: Generator, path: Path) -> float:
    """The largest difference between the images of the file and those of `Model.sample`. Raises ConfigError if the file
    takes one batch size only."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    if any(not isinstance(each.shape[0], str) for each in session.get_inputs()):
        raise ConfigError(
            "this network was exported to ONNX for one batch size only, because its forward pass turns the size into a "
            "number: use x.shape[0] instead of len(x)"
        )
    largest = 0.0
    for count in CHECKED:
        given = {name: value.numpy() for name, value in generator.example(source.model, range(count)).items()}
        (found,) = session.run(None, given)
        expected = generator.expected(source.model, range(count)).numpy()
        largest = max(largest, float(np.abs(found - expected).max()))
    return largest
