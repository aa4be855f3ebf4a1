"""What every benchmark reports of itself: machine, commit, date and command, and the files it writes.

A script in a folder below this one imports it with

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from report import about, heading, write_json
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def device_name(device: str) -> str | None:
    """The name of a GPU, for `about`. None for a CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    return torch.cuda.get_device_name(device)


def commit() -> str:
    """The commit of this checkout, with "-dirty" after it if tracked files differ; "unknown" outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command_line() -> str:
    """This command with the script's path as seen from the repository's root, without the output options."""
    script = Path(sys.argv[0]).resolve()
    words = [str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name]
    arguments = iter(sys.argv[1:])
    for word in arguments:
        option, equals, _ = word.partition("=")
        if option in (
            "--json",
            "--plot",
            "--directory",
            "--runs",
            "--screenshot",
            "--runtime",
        ):  # where files are on this machine tells a reader nothing
            if not equals:
                next(arguments, None)
            continue
        words.append(word if " " not in word else f"'{word}'")
    return " ".join(["python", *words])


def about(*packages: str, device: str | None = None) -> dict[str, Any]:
    """The head of a report: {"date", "commit", "command", "machine", "cores", "versions"}.

    `device` is what the measured work ran on if it is not the CPU. `versions` has those of Python, torch and `packages`
    that are installed.
    """
    versions = {"python": platform.python_version()}
    for name in ("torch", *packages):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": command_line(),
        "machine": device or cpu_model(),
        "cores": os.cpu_count(),
        "versions": versions,
    }


def heading(head: dict[str, Any]) -> str:
    """`about()` as the two lines that begin a text report."""
    versions = ", ".join(f"{name} {number}" for name, number in head["versions"].items())
    first = f"{head['date']}, commit {head['commit']}, {head['machine']}, {head['cores']} cores, {versions}"
    return f"{first}\n{head['command']}\n"


def write_json(path: Path, head: dict[str, Any], found: dict[str, Any]) -> None:
    """A report: what `about()` gave, then what was found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | found, indent=1) + "\n")


def write_report(path: Path | None, head: dict[str, Any], found: dict[str, Any], lines: list[str]) -> None:
    """The report as JSON, and beside it the printed `lines` as text. Nothing without a path."""
    if path is not None:
        write_json(path, head, found)
        path.with_suffix(".txt").write_text("\n".join(lines) + "\n")
