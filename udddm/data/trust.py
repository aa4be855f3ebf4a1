"""A configuration that comes with a checkpoint, a run or a release is data: what it names is not used unasked.

Whoever trains names the data set, and `load_dataset` imports the function or opens the URL. Whoever looks into a
stranger's checkpoint has not: there `check_trusted` comes first.
"""

from __future__ import annotations

from collections.abc import Sequence

from udddm.config import DataConfig
from udddm.errors import ConfigError


def reaching(data: DataConfig, overrides: Sequence[str] = ()) -> list[str]:
    """The settings, as `key=value`, that import code or open a file or URL, apart from those that `overrides` give.

    `overrides` are those of the command line (`data.path=x.npy`), which are the user's own.
    """
    given = {override.partition("=")[0] for override in overrides}
    found: dict[str, object] = {"data.name": data.name} if ":" in data.name else {}
    found |= {f"data.arguments.{key}": value for key, value in data.arguments.items()}
    if data.path is not None:
        found["data.path"] = data.path
    return [
        f"{key}={value}"
        for key, value in found.items()
        if not any(key == one or key.startswith(f"{one}.") for one in given)
    ]


def check_trusted(data: DataConfig, source: str, overrides: Sequence[str] = ()) -> None:
    """Raise ConfigError when the configuration of `source` imports code or opens files that the user did not name."""
    if found := reaching(data, overrides):
        keys = " ".join(f"--set {one.partition('=')[0]}=..." for one in found)
        raise ConfigError(
            f"the configuration of {source} names its data set by {', '.join(found)}: this would import code or open "
            f"files that {source} chose. Name the data set yourself ({keys}), or give --trust if you trust these files"
        )
