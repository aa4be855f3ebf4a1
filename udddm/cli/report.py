"""The command `udddm report`: one HTML page about one or several runs."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from udddm.cli.arguments import Parser, check_exists
from udddm.cli.command import TRUST, add_version, path, reported


def _parser() -> Parser:
    parser = Parser(
        prog="udddm report",
        description="Write one self-contained HTML page: samples, scores, loss, x0-state, throughput, configuration.",
        epilog="udddm report runs/digits; udddm report runs/a runs/b --out compared.html",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories or URLs; several are compared")
    parser.add_argument(
        "--out", type=path, metavar="FILE", help="default: report.html in the run, or here for a URL and several runs"
    )
    parser.add_argument(
        "--gif", type=path, metavar="FILE", help="write the pictures of training as an animated GIF instead of a page"
    )
    parser.add_argument("--no-samples", action="store_true", help="do not load the model and draw samples")
    parser.add_argument("--trust", action="store_true", help=TRUST)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_version(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse(argv)
    for run in arguments.runs:
        check_exists(parser, run)

    if arguments.gif and len(arguments.runs) > 1:
        parser.error("--gif is of one run")

    def body() -> int:
        if arguments.gif:
            from udddm.runs.remote import open_copy
            from udddm.tools import pictures

            count = pictures.film(open_copy(arguments.runs[0]), arguments.gif)
            print(f"{arguments.gif}: {count} pictures, {arguments.gif.stat().st_size / 1e6:.1f} MB")
            return 0
        from udddm.tools import report

        began = time.monotonic()
        out: Path = arguments.out or _default_out(arguments.runs)
        report.write(
            arguments.runs,
            out,
            images=not arguments.no_samples,
            device=arguments.device,
            trust=arguments.trust,
        )
        print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, written in {time.monotonic() - began:.1f} s")
        return 0

    return reported(body)


def _default_out(runs: list[str]) -> Path:
    one = len(runs) == 1 and "://" not in runs[0]
    return Path(runs[0]).expanduser() / "report.html" if one else Path("report.html")


if __name__ == "__main__":
    sys.exit(main())
