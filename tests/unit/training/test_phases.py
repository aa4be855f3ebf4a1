"""The phases of a run are logged as it reaches them."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

import udddm
from udddm import objectives
from udddm.config import load_config
from udddm.diffusion import schedule
from udddm.objectives import Objective
from udddm.training.phases import Phases


def objective(*settings: str) -> Objective:
    config = load_config(None, list(settings))
    return objectives.build(config, schedule.build(config.schedule), 100, (1, 8, 8))


@pytest.mark.parametrize(
    ("settings", "phases"),
    [
        (["objective=edm"], ["a denoiser (EDM)"]),
        (["objective=uddm", "network.condition=channels"], []),
        (
            ["objective=ict", "objective.pretrain=0.2", "objective.ict={s0: 10, s1: 40}"],
            ["a denoiser (EDM)", *(f"iCT with {n} noise levels" for n in (10, 20, 40))],
        ),
        (
            ["objective=ect", "objective.ect.stages=2", "objective.pretrain=0"],
            ["ECT, stage 1 of 2", "ECT, stage 2 of 2"],
        ),
        (["objective=chain"], [f"chains on {n} noise levels" for n in (8, 16, 32)]),
    ],
)
def test_every_phase_is_reported_once(settings: list[str], phases: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "udddm")
    run = Phases(objective(*settings), steps_per_epoch=3)
    for step in range(300):
        run.reach(step)
    assert [re.sub(r" from here on.*", "", message.partition("training ")[2]) for message in caplog.messages] == phases
    assert ["does not compare" in message for message in caplog.messages] == [False, True, True, True][: len(phases)]


def test_a_run_reports_the_phase_in_which_its_loss_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "udddm")
    sets = ["train.steps=60", "objective.pretrain=0.5", "sample={every_steps: 0, final: 0}", "network.base_channels=8"]
    udddm.train("digits", overrides=sets, run_dir=tmp_path / "run", device="cpu")
    assert "step 0: training a denoiser (EDM)" in caplog.messages
    [change] = [message for message in caplog.messages if "does not compare" in message][:1]
    assert change.startswith("step 58: training iCT with 10 noise levels")
