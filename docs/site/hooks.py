"""MkDocs hooks: pages and pictures from outside of docs/, and links to other files of the repository.

The Markdown files are written for a reader of the repository, where `../examples/slurm.sh` is a valid link. On the site
such a link leads to the file on the code host, a link to a Markdown file that is a page leads to that page, and
pictures are copied. A link to a file that does not exist is left unchanged, and the strict build reports it.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
HOST = "https://github.com/udddm/udddm"
PICTURES = "https://raw.githubusercontent.com/udddm/udddm/main/"
ADDED = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "api.md": "docs/site/api.md",
    "assets/iframe-worker.js": "docs/site/iframe-worker.js",
}
"""Path on the site -> file in the repository."""
LINK = re.compile(r"(!?\[[^\]\n]*(?:\n[^\]\n]*)?\])\(([^)\s]+)\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the files of `ADDED`, and every picture that a page shows."""
    for uri, name in ADDED.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for page in files.documentation_pages():
        source = Path(str(page.abs_src_path))
        for text, link in LINK.findall(source.read_text()):
            found = _in_repository(source, link)
            if text.startswith("!") and found is not None:
                uri = found.relative_to(ROOT).as_posix()
                if files.get_file_from_path(uri) is None:
                    files.append(File.generated(config, uri, abs_src_path=str(found)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: Any, files: Files) -> str:
    """Rewrite the links of a page for the site. A link whose text is the name of a page's file shows its title."""
    source = Path(str(page.file.abs_src_path))
    pages = {str(file.abs_src_path): file.src_uri for file in files}
    start = posixpath.dirname(page.file.src_uri)
    titles = {uri: title for section in config.nav for title, uri in _titles(section)}

    def rewrite(match: re.Match[str]) -> str:
        text, link = match.groups()
        found = _in_repository(source, link)
        if found is None:
            return match[0]
        anchor = link[link.index("#") :] if "#" in link else ""
        if str(found) in pages:
            uri = pages[str(found)]
            if posixpath.basename(text.strip("[]")) == found.name and uri in titles:
                text = f"[{titles[uri]}]"
            return f"{text}({posixpath.relpath(uri, start or '.')}{anchor})"
        kind = "tree" if found.is_dir() else "blob"
        return f"{text}({HOST}/{kind}/main/{found.relative_to(ROOT).as_posix()}{anchor})"

    return LINK.sub(rewrite, markdown)


def _titles(entry: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The titles of the pages in an entry of the navigation, each with the page's path on the site."""
    for title, found in entry.items():
        if isinstance(found, str):
            yield title, found
        else:
            for inner in found:
                yield from _titles(inner)


def _in_repository(source: Path, link: str) -> Path | None:
    """The existing file or directory of the repository that a link of `source` leads to, or None."""
    path = link.partition("#")[0]
    for prefix in (f"{HOST}/blob/main/", f"{HOST}/tree/main/", PICTURES):
        if path.startswith(prefix):
            source, path = ROOT / "README.md", path.removeprefix(prefix)
    if not path or "://" in path:
        return None
    found = Path(os.path.normpath(source.parent / path))
    return found if found.is_relative_to(ROOT) and found.exists() else None
