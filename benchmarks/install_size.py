"""What an installation weighs: the base, what each extra adds to it, and what each distribution is needed for.

    python benchmarks/install_size.py | tee benchmarks/results/install-size.txt

Reads pyproject.toml and the metadata of the environment that it runs in, which must have everything that is to be
measured (`make test` sets up such an environment); requirements that are not installed are listed. Sizes are those of
the installed files. Bytecode has a separate column because `pip install --no-compile` omits it. torch is counted apart,
with everything that only torch needs: 740 MB for a CPU, several GB with CUDA.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = next(path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").exists())
EXTRAS = ("images", "tensorboard", "evaluation", "s3", "deepspeed", "ray", "docs")


@dataclass(frozen=True)
class Size:
    """Bytes of a distribution's files, bytecode apart."""

    files: int
    bytecode: int


def closure(requirements: Iterable[str]) -> tuple[set[str], set[str]]:
    """(distributions that an installation of `requirements` brings, those of them that are not installed here)."""
    found: set[tuple[str, frozenset[str]]] = set()
    missing: set[str] = set()
    waiting = [(requirement, "") for requirement in requirements]
    while waiting:
        text, wanted_by = waiting.pop()
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": wanted_by}):
            continue
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in found:
            continue
        found.add(key)
        try:
            needed = distribution(name).requires or []
        except PackageNotFoundError:
            missing.add(name)
            continue
        waiting += [(one, extra) for one in needed for extra in ("", *requirement.extras)]
    return {name for name, _ in found} - missing, missing


def size(name: str) -> Size:
    files = bytecode = 0
    for file in distribution(name).files or []:
        path = Path(str(file.locate()))
        if path.is_file():
            if path.suffix == ".pyc":
                bytecode += path.stat().st_size
            else:
                files += path.stat().st_size
    return Size(files, bytecode)


def line(label: str, sizes: Iterable[Size], note: str = "") -> str:
    sizes = list(sizes)
    files, bytecode = sum(s.files for s in sizes) / 1e6, sum(s.bytecode for s in sizes) / 1e6
    return f"{label:<28} {files:>9.1f} {bytecode:>9.1f}   {note}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base, missing = closure(project["dependencies"])
    without_torch, _ = closure(one for one in project["dependencies"] if Requirement(one).name != "torch")
    sizes = {name: size(name) for name in base}

    print(f"{'MB':<28} {'files':>9} {'bytecode':>9}")
    print(line("base without torch", (sizes[name] for name in without_torch)))
    for name in sorted(without_torch, key=lambda one: -sizes[one].files):
        if sizes[name].files >= 1e6:
            print(line("  " + name, [sizes[name]]))
    print(line("torch and what only it needs", (sizes[name] for name in base - without_torch)))
    result = {"base": {name: vars(sizes[name]) for name in sorted(without_torch)}, "extras": {}}
    for extra in EXTRAS:
        brought, lacking = closure([*project["dependencies"], *project["optional-dependencies"][extra]])
        added = {name: size(name) for name in brought - base}
        names = ", ".join(sorted(added, key=lambda one: -added[one].files)[:4])
        print(line(f"[{extra}] adds", added.values(), names))
        result["extras"][extra] = {name: vars(added[name]) for name in sorted(added)}
        missing |= lacking
    if missing:
        print("not installed here, and so not counted: " + ", ".join(sorted(missing)))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
