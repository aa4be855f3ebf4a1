"""A page that runs the ONNX file in the browser with onnxruntime-web (WebAssembly backend).

    index.html                                 the page
    model.onnx, model.json                     the model
    runtime/ort.wasm.bundle.min.mjs, runtime/ort-wasm-simd-threaded.wasm      with --runtime

Without `--runtime`, the page loads the two files of onnxruntime-web from a public CDN. In both cases the page states
their SHA-384, and the browser refuses other files.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from udddm.errors import ConfigError
from udddm.files import write_text
from udddm.tools.export import onnx_model
from udddm.tools.report import document, grid_size

if TYPE_CHECKING:
    from udddm.tools.export import Options, Source

VARIANTS = 16, 8
"""Images and columns of a page that draws from a conditioning image."""
VERSION = "1.30.0"
CDN = "https://cdn.jsdelivr.net"
SCRIPT, BINARY = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
"""The files of onnxruntime-web's folder `dist` that its WebAssembly backend needs."""


@dataclass(frozen=True)
class Asset:
    """A file that the page loads."""

    url: str
    integrity: str
    """As in the attribute of that name in HTML."""


PINNED = {
    SCRIPT: "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    BINARY: "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
}
"""The files of version `VERSION` in the npm registry, which the CDN serves."""


def write(source: Source, folder: Path, options: Options) -> list[str]:
    """Write the page, the model and, with `options.runtime`, the files of onnxruntime-web. Raises ConfigError for a
    `runtime` without these files and for images without one or three channels, and the errors of `onnx_model.write`."""
    channels = source.model.shape[0]
    if channels not in (1, 3):
        raise ConfigError(f"--to web shows images of one or three channels; this model's have {channels}")
    script, binary = _runtime(options.runtime, folder)
    lines = onnx_model.write(source, folder, options)
    count, columns = grid_size(source.model) if source.model.conditions is None else VARIANTS
    described = {
        "name": source.facts.name,
        "shape": list(source.model.shape),
        "classes": source.model.config.network.classes,
        "conditioned": source.model.config.network.conditioned,
        "condition": _condition(source),
        "count": count,
        "columns": columns,
        "model": "model.onnx",
        "script": asdict(script),
        "binary": asdict(binary),
    }
    write_text(folder / "index.html", _page(described, local=options.runtime is not None))
    where = "runtime/" if options.runtime is not None else f"{CDN} (version {VERSION})"
    return [
        *lines,
        f"index.html loads onnxruntime-web from {where}",
        "serve the folder, as with `python -m http.server --bind 127.0.0.1 8000 --directory FOLDER`",
    ]


def _condition(source: Source) -> dict[str, Any] | None:
    """What the page says of conditioning images, with examples in 8 bits. None for a model without `data.condition`."""
    conditions = source.model.conditions
    if conditions is None:
        return None
    examples = []
    for given in [] if source.examples is None else source.examples.given:
        hidden = given.isnan().any(0)
        pixels = ((given.nan_to_num(nan=0.0) + 1) * 127.5).round().clamp(0, 255).byte()
        encoded = {"image": pixels, "mask": hidden.byte()} if conditions.hides else {"image": pixels}
        examples.append({name: base64.b64encode(values.numpy().tobytes()).decode() for name, values in encoded.items()})
    kind = source.model.config.data.condition.kind
    return {"kind": kind, "shape": list(conditions.given_shape), "hides": conditions.hides, "examples": examples}


def _runtime(given: Path | None, folder: Path) -> tuple[Asset, Asset]:
    """The script and the binary of onnxruntime-web: copied to `folder` from the npm package, or on the CDN."""
    if given is None:
        base = f"{CDN}/npm/onnxruntime-web@{VERSION}/dist"
        return Asset(f"{base}/{SCRIPT}", PINNED[SCRIPT]), Asset(f"{base}/{BINARY}", PINNED[BINARY])
    found = []
    for name in (SCRIPT, BINARY):
        source = next((place for place in (given / "dist" / name, given / name) if place.is_file()), None)
        if source is None:
            raise ConfigError(
                f"--runtime {given} has no file dist/{name}: name the folder of the npm package onnxruntime-web, "
                f"version {VERSION} (npm pack onnxruntime-web@{VERSION}, then unpack it)"
            )
        target = folder / "runtime" / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
        digest = hashlib.sha384(target.read_bytes()).digest()
        found.append(Asset(f"runtime/{name}", f"sha384-{base64.b64encode(digest).decode()}"))
    return found[0], found[1]


def _page(described: dict[str, Any], *, local: bool) -> str:
    here = files("udddm.tools")
    style = (here / "report" / "page.css").read_text() + (here / "export" / "web.css").read_text()
    policy = (
        f"connect-src 'self'{'' if local else f' {CDN}'}; "
        "script-src 'unsafe-inline' 'wasm-unsafe-eval' blob:; img-src 'self' data:"
    )
    title = f"{described['name']} - udddm"
    script = "".join((here / "export" / name).read_text() for name in ("condition.js", "web.js"))
    return document(title, style, script, described, policy)
