"""The data set of a trained model: opened if the user chose it, because the configuration may be somebody else's.

The user chose the data of a run that was started on this machine, under this account: `remember` records its id and
its section `data` when training starts, as the name of an empty file in `$XDG_STATE_HOME/udddm/runs`. Another run, or
a changed section, has another name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from udddm.config import DataConfig, RunConfig
from udddm.config.trust import DATA, check_trusted
from udddm.data import ImageDataset, check_unchanged, load_dataset
from udddm.errors import ConfigError
from udddm.runs.pretrained import recorded_run


def remember(identity: str, data: DataConfig) -> None:
    """Record that this user has started the run with the id `identity` on `data`. Nothing happens if that cannot be
    written: the user is then asked for the data set."""
    place = _place(identity, data)
    if not place.is_absolute():  # there is no home directory
        return
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        place.touch()


def is_own(where: str | Path, data: DataConfig) -> bool:
    """Whether this user has started the run at `where`, or of the checkpoint there, on `data`, on this machine.

    Raises StoreError, CheckpointError.
    """
    recorded = recorded_run(where)
    return recorded is not None and _place(str(recorded.get("id", "")), data).is_file()


def check_data(
    where: str | Path, config: RunConfig, *, trust: bool = False, overrides: Sequence[str] | None = None
) -> None:
    """Raise ConfigError if the data set of the model at `where` would be code or a file that the user did not choose.

    `config` is that of the model, without the `overrides` of the command line; None: of a command without them.
    """
    if not trust and not is_own(where, config.data):
        check_trusted(config, DATA, str(where), overrides)


def training_data(where: str | Path, config: RunConfig, *, trust: bool = False) -> ImageDataset:
    """The data set that the model at `where` was trained on, as its `config` names it.

    Raises ConfigError as `check_data` does, and for a release, which does not record its data set; DataError for data
    that are missing or have changed.
    """
    check_data(where, config, trust=trust)
    recorded = recorded_run(where)
    if recorded is None:
        raise ConfigError(f"{where} has no run.json, which identifies the data set: name the run instead")
    dataset = ImageDataset(load_dataset(config.data))
    check_unchanged(recorded["dataset"], dataset.fingerprint())
    return dataset


def _place(identity: str, data: DataConfig) -> Path:
    configured = Path(os.environ.get("XDG_STATE_HOME", ""))
    # The XDG base directory specification requires relative paths to be ignored.
    state = configured
    if not state.is_absolute():
        with suppress(RuntimeError):  # there is no home directory
            state = Path.home() / ".local" / "state"
    # What changes nothing of what is opened is left out.
    section = data.model_dump(mode="json", exclude={"workers", "expect", "missing_chunks", "flip"})
    told = json.dumps([identity, section], sort_keys=True)
    return state / "udddm" / "runs" / hashlib.sha256(told.encode()).hexdigest()
