"""Releases on the Hugging Face Hub, as `hf://user/model` or `hf://user/model@revision`.

Files are downloaded once, into the cache of huggingface_hub (`HF_HOME`), which also works without a network. Only the
configuration and the weights that it names are downloaded, and they are read as any release: nothing in them is
executed or unpickled.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from udddm.errors import CheckpointError, ConfigError
from udddm.runs.checkpoint import load_config

SCHEME = "hf://"
CONFIG = "config.json"
_ADDRESS = re.compile(r"hf://([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w./-]*))?/?", re.ASCII)


def on_hub(where: str | Path) -> bool:
    """Whether `where` is the address of a model on the Hugging Face Hub."""
    return isinstance(where, str) and where.startswith(SCHEME)


def library(purpose: str) -> Any:
    """The module huggingface_hub. Raises ConfigError, which names `purpose`, if it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise ConfigError(f"{purpose} needs huggingface_hub ({error}): pip install 'udddm[hub]'") from error
    return huggingface_hub


def snapshot(address: str) -> Path:
    """A directory with the configuration and weights of a model on the Hub, in the local cache.

    The files there are links into the same cache. Raises ConfigError for an address that is malformed, and
    CheckpointError if the files cannot be downloaded, or if one of them is not a file of this model's cache.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(f"{address}: write hf://user/model, or hf://user/model@revision")
    repository, revision = match[1], match[2]
    hub = library(address)
    try:
        config = Path(hub.hf_hub_download(repository, CONFIG, revision=revision))
        _check_cached(config)
        trained, _ = load_config(config.parent)
        weights = [f"ema-{name}.safetensors" for name in trained.train.averages] + ["model.safetensors"]
        # The same commit as the configuration, whose name the cache gives to the directory.
        found = Path(hub.snapshot_download(repository, revision=config.parent.name, allow_patterns=[CONFIG, *weights]))
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # of huggingface_hub and of the HTTP library that it uses
        raise CheckpointError(f"cannot download {address}: {_reason(hub, error)}") from error
    for name in weights:
        if (found / name).is_symlink() or (found / name).exists():
            _check_cached(found / name)
    return found


def _check_cached(path: Path) -> None:
    """Raise CheckpointError unless `<cache>/models--user--model/snapshots/<commit>/<name>` is a file in the directory
    of its model, to whose `blobs` it is usually a link."""
    directory = path.parents[2].resolve()
    try:
        place = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete {directory}, to download it again") from error
    if not place.is_file() or not place.is_relative_to(directory):
        raise CheckpointError(
            f"{path} is not a file of this model: it leads to {place}, outside of {directory}. Delete that directory, "
            "to download the model again"
        )


def _reason(hub: Any, error: Exception) -> str:
    """What went wrong, and what to do."""
    errors = hub.errors
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such model, or it is private: check the name, or log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision: name a branch, a tag or a commit"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "it is not in the local cache, and the Hub cannot be reached, or HF_HUB_OFFLINE is set"
    if isinstance(error, errors.EntryNotFoundError):
        return f"it has no {CONFIG}, so it is not a release of udddm (udddm export --to hub writes one)"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
