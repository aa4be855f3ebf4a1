"""Dry runs of all presets without their data: counting the operations of their networks takes seconds each."""

from __future__ import annotations

import re

import numpy as np
import pytest

from udddm.config import load_config, presets
from udddm.data import expected
from udddm.tools import dry_run
from udddm.tools.throughput import Speed

PRESETS = presets.names()
BYTES = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_plan_of_every_preset_matches_its_header_without_the_data(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Speed(images=2, operations=1e12, passes=1.0, update=0.5)
    monkeypatch.setattr(dry_run, "measure", lambda *_: measured)  # measuring needs gigabytes and a minute
    monkeypatch.setattr(dry_run, "load_dataset", lambda _: pytest.fail("a plan loaded data"))
    config = load_config(preset)
    lines = "\n".join(dry_run.plan(config, "cpu"))
    header = " ".join(line.lstrip("# ") for line in presets.text_of(preset).splitlines() if line.startswith("#"))

    data = expected(config.data)
    assert data is not None
    stated = re.search(r"x0-state (?:has |takes |of )?([\d.]+) (kB|MB|GB) in fp16", header)
    assert stated, header
    assert data.samples * np.prod(data.shape) * 2 == pytest.approx(float(stated[1]) * BYTES[stated[2]], rel=5e-3)
    found = re.search(r"network: ([\d,]+) parameters", lines)
    assert found
    if "parameters" in header:
        stated = re.search(r"([\d.]+) M parameters", header)
        assert stated and f"{int(found[1].replace(',', '')) / 1e6:.1f}" == stated[1]
    assert f"{data.samples} images {'x'.join(map(str, data.shape))}" in lines
