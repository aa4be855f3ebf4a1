"""Protection from configurations in other people's checkpoints, runs and releases.

A setting may name code (`network.name=package.module:factory`) or a file or URL (`data.path`). A user who trains with a
configuration has chosen them. A user who opens a checkpoint from someone else has not. In that case, `check_trusted` is
called for the sections that a command uses, before anything is imported or opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from udddm.config.evaluate import PUBLISHED_NETWORKS
from udddm.config.plugins import (
    ENGINES,
    LOGGERS,
    METRICS,
    NETWORKS,
    OBJECTIVES,
    SAMPLERS,
    SCHEDULES,
    STORES,
    Registry,
)
from udddm.config.reading import keys_set
from udddm.config.run import RunConfig
from udddm.errors import ConfigError

NAMED: dict[str, Registry] = {
    registry.key: registry
    for registry in (NETWORKS, SCHEDULES, OBJECTIVES, STORES, ENGINES, SAMPLERS, METRICS, LOGGERS)
}
"""Every key of a configuration that may name code, except data.name and evaluate.features."""
MODEL = ("network", "schedule")
"""The sections that define a trained model."""
DATA = ("data",)
"""The section that defines the data set."""


def reaching(config: RunConfig, sections: Sequence[str], overrides: Sequence[str] = ()) -> list[str]:
    """Returns the settings in `sections`, as `key=value`, that import code or open a file or URL.

    Settings in `overrides`, those of the command line (`data.path=x.npy`), are omitted, because the user chose them.
    """
    given = {key for override in overrides for key in keys_set(override)}
    return [
        f"{key}={value}"
        for key, value in _reaching(config)
        if key.partition(".")[0] in sections and not any(key == one or key.startswith(f"{one}.") for one in given)
    ]


def _reaching(config: RunConfig) -> Iterator[tuple[str, object]]:
    """Every setting that imports code or opens a file or URL."""
    for key, registry in NAMED.items():
        section, _, leaf = key.partition(".")
        value = getattr(config, section)
        if leaf:
            value = getattr(value, leaf)
        for name in (value,) if isinstance(value, str) else value or ():
            if registry.is_import(name):
                yield key, name
    data = config.data
    if ":" in data.name:
        yield "data.name", data.name
    yield from ((f"data.arguments.{key}", value) for key, value in data.arguments.items())
    if data.path is not None:
        yield "data.path", data.path
    if data.condition.path is not None:
        yield "data.condition.path", data.condition.path
    evaluate = config.evaluate
    yield from (("evaluate.features", name) for name in evaluate.features if name not in PUBLISHED_NETWORKS)
    for key in ("inception_weights", "dinov2_weights", "reference"):
        if (place := getattr(evaluate, key)) is not None:
            yield f"evaluate.{key}", place


def check_trusted(
    config: RunConfig, sections: Sequence[str], source: str, overrides: Sequence[str] | None = None
) -> None:
    """Raise ConfigError if `sections` of the configuration of `source` import code or open files that the user did not
    choose.

    `overrides` are those of a command with --set; None for a command without it.
    """
    if found := reaching(config, sections, overrides or ()):
        keys = " ".join(f"--set {one.partition('=')[0]}=..." for one in found)
        instead = "" if overrides is None else f"Set them yourself ({keys}), or "
        trust = "give --trust (in Python trust=True) if you trust these files"
        raise ConfigError(
            f"the configuration of {source} names {', '.join(found)}: this would import code or open files "
            f"chosen by {source}. {instead}{trust if instead else trust[0].upper() + trust[1:]}"
        )
