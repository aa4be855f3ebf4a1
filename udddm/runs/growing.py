"""`udddm train --continue`: a finished run goes on as a longer one, and `--new`: numbered run directories."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from udddm.config import RunConfig, as_yaml, resolve
from udddm.config.reading import overridden
from udddm.data import ImageDataset, check_unchanged
from udddm.errors import ConfigError
from udddm.files import load_json, write_json, write_text
from udddm.log import log
from udddm.runs.remote import open_copy
from udddm.runs.run import Run, differences
from udddm.storage import local_path

LENGTHS = ("train.steps", "train.epochs")
ALLOWED = (
    *LENGTHS,
    "train.learning_rate",
    "train.lr_schedule",
    "train.lr_restart",
    "train.warmup_steps",
    "train.grad_clip",
    "train.weight_decay",
)
"""The keys that a longer run may change, besides those that any start may change. Its checkpoint does not depend on
them."""
TIMES = re.compile(r"(\d+(?:\.\d+)?)x")


def planned(where: str | Path, changes: list[str]) -> RunConfig:
    """The configuration with which `udddm train --continue` trains the run in a directory or at a URL.

    `changes` are overrides, of which a length may be a multiple: `train.steps=2x` of a finished run. A command that was
    stopped after it made the run longer gives the same configuration again. Raises ConfigError unless the run becomes
    longer, and nothing changes that its checkpoint depends on.
    """
    path = open_copy(where).path
    if not (path / "run.json").exists():
        raise ConfigError(f"--continue {where}: there is no run; give the directory or URL of one")
    recorded = load_json(path / "run.json", "config")
    current = resolve(recorded["config"], str(path / "run.json"))
    if not (path / "result.json").exists():
        if not changes:
            return current
        for earlier in recorded.get("earlier", [])[-1:]:
            with suppress(ConfigError):
                again = _grown(resolve(earlier, str(path / "run.json")), changes, where)
                if again.fingerprint() == current.fingerprint():
                    return again
    return _grown(current, changes, where)


def _grown(config: RunConfig, changes: list[str], where: str | Path) -> RunConfig:
    """The configuration with changes that make a run longer, or name the length that it has."""
    before = config.model_dump(mode="json")
    new = resolve(overridden(before, [_absolute(change, before) for change in changes], "--continue"), "--continue")
    lengths = {alias for key in LENGTHS for alias in (key, key.removeprefix("train."))}
    if not (new.fingerprint() == config.fingerprint() and any(each.partition("=")[0] in lengths for each in changes)):
        check_grown(config, new, where)
    return new


def check_grown(config: RunConfig, new: RunConfig, where: str | Path) -> None:
    """Raise ConfigError unless `new` is a configuration of the same run that is longer."""
    before, after = config.model_dump(mode="json"), new.model_dump(mode="json")
    changed = [
        line
        for line in differences(before, after)
        if (key := line.partition(":")[0]) not in ALLOWED and not {key, key.partition(".")[0]} & RunConfig.changeable()
    ]
    if changed:
        raise ConfigError(
            f"{where} cannot go on with {'; '.join(changed)}: what it has trained depends on it. Start another run "
            f"with train.init_from={where} instead"
        )
    key = next(key for key in LENGTHS if _value(before, key) is not None)
    length, longer = _value(before, key), _value(after, key)
    if longer is None or longer <= length:
        given = "" if longer in (None, length) else f", and {longer:g} is not longer"
        raise ConfigError(f"the length of {where} is {key}={length:g}{given}; say how long it shall be: {key}=2x")


def _absolute(change: str, config: dict[str, Any]) -> str:
    """`train.steps=2x` with the number that it means."""
    key, _, value = change.partition("=")
    factor = TIMES.fullmatch(value.strip())
    full = key if "." in key else f"train.{key}"
    if factor is None or full not in LENGTHS:
        return change
    length = _value(config, full)
    if length is None:
        other = next(each for each in LENGTHS if each != full)
        raise ConfigError(f"{change}: the length of this run is {other}={_value(config, other):g}: use {other}={value}")
    product = length * float(factor[1])
    return f"{full}={round(product) if full == 'train.steps' else product}"


def _value(config: dict[str, Any], key: str) -> Any:
    return config["train"][key.removeprefix("train.")]


def extend(run: Run, config: RunConfig, dataset: ImageDataset) -> None:
    """Make a run, whose lock is held, one of the longer `config`. Does nothing if it is one already.

    Its result.json stays under a name with the number of its steps. A run that is killed here is finished, or one that
    resumes from its last checkpoint, as the shorter or the longer run. Raises ConfigError, DataError if the data set is
    another one, StoreError, OSError.
    """
    file = run.path / "run.json"
    if not file.exists():
        raise ConfigError(f"{run} is not a run yet: train it first, without extending it")
    recorded = load_json(file, "config", "dataset")
    current, settings = resolve(recorded["config"], str(file)), config.model_dump(mode="json")
    if current.fingerprint() == config.fingerprint():
        write_text(run.path / "config.yaml", as_yaml(settings, flow=False))  # killed before it was written
        return
    check_grown(current, config, str(run))
    check_unchanged(recorded["dataset"], dataset.fingerprint())
    result = run.path / "result.json"
    if result.exists():
        found = load_json(result, "steps")
        write_json(run.path / f"result-{found['steps']:08d}.json", found)
        run.persist()
        for name in ("report.html", "result.json"):
            run.remove(name)
    earlier = [*recorded.get("earlier", []), recorded["config"]]
    write_json(file, {**recorded, "config": settings, "earlier": earlier})
    write_text(run.path / "config.yaml", as_yaml(settings, flow=False))
    run.persist()
    log.info(f"{run} becomes longer; the result that it had is in {run}/result-*.json")


def numbered(run_dir: str | Path) -> Path:
    """Create and return the first of the directories `<run_dir>-001`, `-002`, ... that does not exist.

    Raises ConfigError for a URL, and OSError.
    """
    base = local_path(run_dir)
    if base is None:
        raise ConfigError(f"--new is for local directories; give a URL of your own with --run-dir instead of {run_dir}")
    for number in range(1, 1_000_000):
        found = base.with_name(f"{base.name}-{number:03d}")
        try:
            found.mkdir(parents=True)
        except FileExistsError:
            continue
        return found
    raise ConfigError(f"there are a million runs {base}-*")
