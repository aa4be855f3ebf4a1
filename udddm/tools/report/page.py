"""The page of a report: values as JSON, with a style sheet and a script that draw them."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from typing import Any


def page(runs: list[dict[str, Any]]) -> str:
    """The HTML page of the runs that `collect` has found."""
    title = f"{', '.join(run['name'] for run in runs)} - udddm"
    here = files("udddm.tools.report")
    style, script = ((here / name).read_text() for name in ("page.css", "page.js"))
    return document(title, style, script, {"runs": runs}, "img-src data:; script-src 'unsafe-inline'")


def document(title: str, style: str, script: str, values: dict[str, Any], policy: str) -> str:
    """An HTML page whose script draws `values`, the JSON in its element `data`, in the element `page`.

    `policy` is what its Content-Security-Policy allows besides inline styles.
    """
    # "</" would end the script; "<!--" would begin a comment in it
    data = json.dumps(values, allow_nan=False).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"style-src 'unsafe-inline'; {policy}\">\n"
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        '<main id="page"><noscript>This page draws its contents with a script that it contains.</noscript></main>\n'
        f'<script type="application/json" id="data">{data}</script>\n<script>\n{script}</script>\n</body>\n</html>\n'
    )
