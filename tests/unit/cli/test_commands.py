"""`udddm COMMAND`: runs and settings without options, where output goes, and completion in a shell."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from udddm.cli import completion, train
from udddm.cli.arguments import Parser
from udddm.cli.command import USAGE
from udddm.cli.main import COMMANDS, main
from udddm.config import presets

ROOT = Path(__file__).parents[3]
TINY = [
    "network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], condition: none}",
    *("network.dropout=0", "classes=10", "steps=4", "lr=1e-3", "ema=0.9", "objective=ict", "objective.pretrain=0"),
    *("checkpoint.every_steps=2", "sample={every_steps: 0, final: 0}", "log_every_steps=2"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run, trained with settings before, between and after options."""
    directory = tmp_path_factory.mktemp("commands") / "run"
    options = ["--config", "digits", "--device", "cpu", "--run-dir", str(directory)]
    assert main(["train", TINY[0], *options[:2], *TINY[1:4], *options[2:], *TINY[4:]]) == 0
    return directory


def recorded(run_dir: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((run_dir / "run.json").read_text())["config"]
    return found


def test_settings_need_no_option(run: Path) -> None:
    config = recorded(run)
    assert config["train"]["steps"] == 4 and config["train"]["learning_rate"] == 1e-3
    assert config["train"]["ema"] == [0.9] and config["objective"]["name"] == "ict"
    assert config["network"]["classes"] == 10 and config["network"]["base_channels"] == 8


def test_python_m_udddm_is_the_same_command() -> None:
    command = [sys.executable, "-m", "udddm", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("cifar10 ")


def test_a_reader_that_ends_early_is_no_error() -> None:
    command = f"{sys.executable} -m udddm config schema | head -n 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 141) and done.stderr == ""


def test_the_last_line_of_a_run_says_what_to_type_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["udddm"])
    assert main(["train", "--config", "digits", "--device", "cpu", *TINY, "sample.final=9"]) == 0
    line = capsys.readouterr().out
    samples = r"9 samples in runs/digits/samples\.png"
    assert re.fullmatch(
        rf"done in \d+ s: 4 steps, 0\.2\d* kimg, loss [\d.]+, {samples}\. "
        r"Next: udddm sample runs/digits --count 100 --nfe 4\n",
        line,
    )
    assert main([*line.split("Next: udddm ")[1].split(), "--device", "cpu"]) == 0
    assert (tmp_path / "samples" / "digits" / "samples.png").exists()


def test_the_next_command_is_the_one_that_the_shell_does_not_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for folder in ("bin", ".venv"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "udddm").touch(0o755)
    for typed, shown in (
        (".venv/udddm", ".venv/udddm"),
        (".venv/udddm-train", ".venv/udddm"),
        (str(tmp_path / "bin" / "udddm"), "udddm"),
        ("/x/udddm/__main__.py", "python -m udddm"),
    ):
        monkeypatch.setattr(sys, "argv", [typed])
        assert train._command() == shown


@pytest.mark.parametrize("config", ["config.yaml", ""])
def test_the_configuration_of_a_run_resumes_it(run: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(run / config), "--device", "cpu"]) == 0
    assert f"{run} is finished" in capsys.readouterr().err
    assert main(["train", "--config", str(run / config), "seed=5", "--device", "cpu"]) == USAGE
    message = capsys.readouterr().err
    assert "seed: 0 -> 5" in message and "--run-dir" in message


def test_the_configuration_of_a_run_can_start_another(run: Path, tmp_path: Path) -> None:
    options = ["--config", str(run / "config.yaml"), "--run-dir", str(tmp_path / "other"), "--device=cpu"]
    assert main(["train", *options, "seed=5"]) == 0
    assert recorded(tmp_path / "other") == {**recorded(run), "seed": 5}


def test_samples_have_a_directory_with_the_name_of_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(run), "--count", "30", "--nfe", "2", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert re.match(r"30 images in \d+\.\d\d s \([\d.]+ ms each; loading the model took \d+\.\d\d s\): ", told)
    assert told.endswith(": samples/run/samples.npy, samples/run/samples.png\n")
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]
    by_seeds = ["--checkpoint", str(run), "--seeds", "0-29", "--steps", "2", "--out", "other", "--device=cpu"]
    assert main(["sample", *by_seeds]) == 0
    first = np.load("samples/run/samples.npy")
    assert first.shape == (30, 1, 8, 8) and np.array_equal(first, np.load("other/samples.npy"))
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    assert main(["sample", str(checkpoint), "--count", "2", "--device", "cpu"]) == 0
    assert (tmp_path / "samples" / checkpoint.name / "samples.png").exists()


def test_the_grid_has_one_column_per_class(run: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for arguments, columns in ((["--count", "30"], 10), (["--count", "30", "--labels", "3"], 6)):
        assert main(["sample", str(run), *arguments, "--out", str(tmp_path), "--device", "cpu"]) == 0
        with image.open(tmp_path / "samples.png") as grid:
            assert grid.width == columns * 66 + 2


def test_a_run_may_be_given_before_and_after_options_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sample", str(run), "--checkpoint", "other"])
    assert stop.value.code == USAGE
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(run), "--steps", "2", "other"])
    assert stop.value.code == USAGE
    message = capsys.readouterr().err
    assert "two runs" in message and "several runs" in message


def test_the_score_of_a_run_takes_settings_of_its_data(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ["--features", f"{__name__}:half", "--count", "16", "--metrics", "frechet", "--device", "cpu"]
    assert main(["evaluate", str(run), "data=digits", *options, "--nfe", "2"]) == 0
    assert f"{run} (16 images, 2 evaluations" in capsys.readouterr().out
    assert main(["evaluate", *options, "network.dropout=0.5", str(run)]) == USAGE
    assert "network.dropout=0.5 has no effect here" in capsys.readouterr().err


def half(images: object) -> object:
    return images.flatten(1)[:, :8]  # type: ignore[attr-defined]


def test_the_readme_makes_the_picture_above_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    readme = (ROOT / "README.md").read_text()
    [picture] = re.findall(r"!\[.*\]\(https://\S+/main/(\S+grid\.png)\)", readme)
    [command] = re.findall(r"udddm (sample benchmarks/.*)", readme)
    arguments = [str(ROOT / each) if each.startswith("benchmarks/") else each for each in command.split()]
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--device", "cpu"]) == 0
    shown, made = (
        np.asarray(image.open(path).convert("L")).astype(int)
        for path in (ROOT / picture, tmp_path / "samples" / "consistency" / "samples.png")
    )
    assert shown.shape == made.shape
    assert np.abs(shown - made).mean() < 1


# Completion.


@pytest.fixture
def complete(tmp_path: Path) -> Callable[[str], set[str]]:
    """The completions of a command line in bash."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    (tmp_path / "script").write_text(completion.script("bash"))

    def completed(line: str) -> set[str]:
        words = line.split(" ")
        code = (
            f"source ./script; COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}; "
            '_udddm; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run([bash, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
        assert done.stderr == ""
        return set(done.stdout.split())

    return completed


def test_a_shell_completes_commands_options_presets_and_settings(complete: Callable[[str], set[str]]) -> None:
    assert complete("udddm ") == set(COMMANDS)
    assert complete("udddm tr") == {"train"}
    assert complete("udddm train --conf") == {"--config"}
    assert complete("udddm train --config ") == set(presets.names())
    assert complete("udddm-train --config dig") == {"digits"}
    assert complete("udddm train --config digits --store ") == {"none", "gpu", "pinned", "zarr"}
    assert complete("udddm train --config digits train.lea") == {"train.learning_rate="}
    assert complete("udddm train --config digits batch") == {"batch_size="}
    assert "--nfe" in complete("udddm sample runs/digits --")
    assert complete("udddm sample --device ") == {"auto", "cpu", "cuda"}
    assert complete("udddm config sh") == {"show"}
    assert complete("udddm config show fa") == {"fashion-mnist"}
    assert "--sample" in complete("udddm store view --s") | complete("udddm-store view --s")
    assert complete("udddm sample scr") == {"script"}  # a file


def test_zsh_has_the_same_completions() -> None:
    assert completion.script("zsh").endswith(completion.script("bash").partition("\n")[2])


def test_every_parser_reports_mistakes_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        parser = importlib.import_module(f"udddm.cli.{name}")._parser()
        assert isinstance(parser, Parser) and parser.prog == f"udddm {name}"
        with pytest.raises(SystemExit) as stop:
            main([name, "--no-such-option"])
        assert stop.value.code == USAGE
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1, message
