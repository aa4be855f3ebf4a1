"""The documentation builds as a site without a warning, and the site loads nothing from another server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import udddm

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOADING = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}
"""The attributes whose URL a browser opens without a click."""


def build(where: Path, config: Path = ROOT / "docs" / "site" / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(config), "--site-dir", str(where)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. The build is strict: a broken link or anchor, or a page outside the navigation, fails it."""
    where = tmp_path_factory.mktemp("docs") / "site"
    done = build(where)
    assert done.returncode == 0, done.stderr
    return where


class Tags(HTMLParser):
    """The URLs that a page loads, those that it links to, and its ids."""

    def __init__(self, page: Path):
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.add(values.get("id") or "")
        if tag == "a":
            self.linked.append(values.get("href") or "")
        elif tag in LOADING:
            self.loaded.append(values.get(LOADING[tag]) or "")


def test_every_page_is_in_the_navigation(site: Path) -> None:
    """From the home page, links reach every page, those of README.md, CONTRIBUTING.md and CHANGELOG.md included."""
    names = {"index", "contributing", "changelog", "api", *(page.stem for page in (ROOT / "docs").glob("*.md"))}
    assert {f"{name}.html" for name in names} <= set(Tags(site / "index.html").linked) | {"index.html"}


def test_nothing_is_loaded_from_another_server_and_every_file_is_there(site: Path) -> None:
    for page in site.rglob("*.html"):
        for url in filter(None, Tags(page).loaded):
            parts = urlsplit(url)
            assert not parts.scheme and not parts.netloc, (page.name, url)
            if page.name != "404.html":  # its links are those of a server's root
                assert (page.parent / unquote(parts.path)).exists(), (page.name, url)
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"url\(\s*[\"']?(?:https?:)?//|@import", sheet.read_text()), sheet.name


def test_links_to_the_project_lead_to_files_that_exist(site: Path) -> None:
    """Links that leave docs/ lead to the code host, and a typo in one is not a broken link to the builder."""
    checked = 0
    for page in site.glob("*.html"):
        for url in Tags(page).linked:
            if found := re.match(r"https://github\.com/udddm/udddm/(blob|tree)/main/([^#]+)", url):
                path = ROOT / unquote(found[2])
                assert path.is_dir() if found[1] == "tree" else path.is_file(), (page.name, url)
                checked += 1
    assert checked > 20


def test_the_reference_has_every_public_name(site: Path) -> None:
    ids = Tags(site / "api.html").ids
    assert not [name for name in udddm.__all__ if not {f"udddm.{name}", f"udddm.errors.{name}"} & ids]


def test_the_search_index_has_the_configuration_keys_and_the_names(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    text = " ".join(f"{entry['title']} {entry['text']}" for entry in index["docs"])
    for word in ("train.learning_rate", "min_sharpness", "load_model", "--on-corruption"):
        assert word in text


def test_a_broken_link_and_a_broken_anchor_fail_the_build(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "docs", copy / "docs")
    for name in (*(path.name for path in ROOT.glob("*.md")), "benchmarks", "examples", "udddm"):
        (copy / name).symlink_to(ROOT / name)
    page = copy / "docs" / "method.md"
    page.write_text(f"{page.read_text()}\n[a page](no-such-page.md), [a section](store.md#no-such-section)\n")
    done = build(tmp_path / "site", copy / "docs" / "site" / "mkdocs.yml")
    assert done.returncode != 0 and "no-such-page.md" in done.stderr and "no-such-section" in done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_searches_the_site_from_the_disk(site: Path, tmp_path: Path) -> None:
    """No host can be resolved here, so that a request to any would be an error on the console."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={tmp_path}/browser", "--virtual-time-budget=6000", "--dump-dom"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"{site.as_uri()}/index.html?q=min_sharpness"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert not re.findall(r".*(?:CONSOLE|Uncaught).*", done.stderr), done.stderr[-2000:]
    answer = re.search(r'class="md-search-result__meta">(.*?)<', done.stdout, re.DOTALL)
    assert answer and re.search("[1-9] matching documents?", answer[1]), answer
