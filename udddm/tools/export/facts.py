"""What an export says of a model besides its weights: how it was trained and scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from udddm.runs import hub
from udddm.runs.checkpoint import NAME
from udddm.runs.remote import open_copy
from udddm.storage import local_path
from udddm.tools.report import recorded


@dataclass(frozen=True)
class Facts:
    """What a run has recorded. Empty for a single checkpoint or a release, which have no record of their training."""

    name: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    """(fact, value), such as ("images seen", "384 thousand")."""
    scores: list[dict[str, Any]] = field(default_factory=list)
    """The scores of the first average at the last scored step, a row for each number of evaluations: `images` seen,
    `evaluations`, and any of fid, fd, kid, precision and recall."""


def facts_of(run: str | Path) -> Facts:
    """The facts of a run; of a checkpoint or a release, only the name. Raises CheckpointError, StoreError."""
    text = str(run).rstrip("/")
    name = text.removeprefix(hub.SCHEME) if hub.on_hub(run) else text.rpartition("/")[2]
    local = local_path(run) if not hub.on_hub(run) else None
    if local is not None:
        name = local.resolve().name
    if hub.on_hub(run) or NAME.fullmatch(name) or (local is not None and not (local / "run.json").exists()):
        return Facts(name)
    opened = open_copy(run)
    if not (opened.path / "run.json").exists():
        return Facts(name)
    found = recorded(run, opened)
    last = max((row["images"] for row in found["scores"]), default=0)
    return Facts(name, found["facts"], [row for row in found["scores"] if row["images"] == last])
