"""The commands: fast help, clear errors with exit codes, dry runs that write nothing."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from udddm.cli.command import FAILED, USAGE
from udddm.cli.evaluate import main as evaluate_command
from udddm.cli.sample import main as sample_command
from udddm.cli.train import main as train_command
from udddm.config import presets

TINY = [
    "--set=network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], "
    "dropout: 0, condition: none}",
    "--set=train={steps: 6, batch_size: 64, learning_rate: 1.0e-3, ema: [0.9]}",
    "--set=checkpoint.every_steps=3",
    "--set=sample={every_steps: 0, final: 9}",
    "--set=log_every_steps=2",
    "--device=cpu",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run on the digits."""
    directory = tmp_path_factory.mktemp("cli") / "run"
    assert train_command(["--config", "digits", "--run-dir", str(directory), *TINY]) == 0
    return directory


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "store"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        f"import sys; from udddm.cli import {command}\n"
        f"try: {command}.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'zarr', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_help_names_every_member_of_the_plug_points(capsys: pytest.CaptureFixture[str]) -> None:
    """The help is fixed text, because reading the tables would import the configuration."""
    from udddm.config.plugins import ENGINES, LAUNCHERS, SAMPLERS, STORES

    for command, tables in (
        (train_command, (STORES, ENGINES, LAUNCHERS)),
        (sample_command, (SAMPLERS,)),
        (evaluate_command, (SAMPLERS,)),
    ):
        with pytest.raises(SystemExit):
            command(["--help"])
        words = set(capsys.readouterr().out.replace(",", " ").split())
        assert {name for table in tables for name in table.members} <= words


def test_on_corruption_is_accepted_by_both_of_its_names() -> None:
    from udddm.cli.train import _parser

    for name in ("--on-corruption", "--on-damage"):
        assert _parser().parse_args([name, "reinitialize"]).on_corruption == "reinitialize"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.lerning_rate=3"], ["train.lerning_rate", "train.learning_rate"]),
        (["trian.epochs=3"], ["trian", "train"]),
        (["learning_rates=3"], ["learning_rates", "train.learning_rate"]),
        (["train.epochs=many"], ["train.epochs", "many"]),
        (["train.epochs=-1"], ["train.epochs", "greater than 0"]),
        (["seed=-1"], ["seed", "-1"]),
        (["store.kind=s4"], ["store.kind", "zarr"]),
        (["order.lanes=7"], ["order.lanes", "64"]),
        (["schedule.sigma_min=60"], ["sigma_min", "sigma_max"]),
        (["objective.name=uddm"], ["Algorithm 1", "network.condition"]),
        (["objective.chain.stages=[{start: 0, levels: 8}, {start: 0.5, levels: 12}]"], ["12", "8"]),
        (["train.steps=3", "train.epochs=4", "train.steps=5", "nonsense"], ["nonsense", "key=value"]),
        (["train=3"], ["train"]),
        (["seed={"], ["seed", "YAML"]),
        (["seed.x=3", "seed=3", "seed.y=4"], ["seed", "section"]),
    ],
)
def test_bad_configuration_names_the_key(
    overrides: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--set={o}" for o in overrides]
    code = train_command(["--config", "digits", "--run-dir", str(tmp_path / "run"), *arguments])
    assert code == USAGE
    message = capsys.readouterr().err
    assert all(part in message for part in expected), message
    assert not (tmp_path / "run").exists()


def test_an_unreadable_configuration_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_command(["--config", str(tmp_path / "none.yaml")]) == USAGE
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert train_command(["--config", str(tmp_path / "list.yaml")]) == USAGE
    (tmp_path / "code.yaml").write_text("seed: !!python/object/apply:os.getcwd []\n")
    assert train_command(["--config", str(tmp_path / "code.yaml")]) == USAGE
    message = capsys.readouterr().err
    assert "none.yaml" in message
    assert "list.yaml must contain a mapping" in message
    assert "code.yaml is not valid YAML" in message


@pytest.mark.parametrize("preset", presets.names())
def test_every_preset_is_valid_and_lists_its_requirements(preset: str) -> None:
    from udddm.config import load_config

    load_config(preset)
    assert "\n# Needs: " in presets.text_of(preset)


def test_presets_of_the_paper_have_the_values_of_the_paper() -> None:
    from udddm.config import load_config

    for name, blocks in (("vp", 3), ("ve", 3), ("vp-deep", 6), ("ve-deep", 6)):
        config = load_config(f"cifar10-{name}")
        kind = name[:2]
        assert config.objective.name == "uddm"
        assert config.objective.huber_c == {"vp": 0.00014, "ve": 0.00015}[kind]
        assert config.schedule.kind == kind and config.schedule.preconditioning == "paper"
        assert config.schedule.timesteps == {"vp": 8000, "ve": 1000}[kind]
        assert (config.schedule.beta_min, config.schedule.beta_max) == (1.5e-3, 2.0e-2)
        assert (config.schedule.sigma_min, config.schedule.sigma_max, config.schedule.rho) == (0.01, 50.0, 7.0)
        network = config.network
        assert (network.base_channels, network.channel_mult, network.blocks_per_level) == (128, (1, 2, 2, 2), blocks)
        assert (network.attention_resolutions, network.dropout, network.classes) == ((16, 8), 0.3, 0)
        assert network.condition == "cross-attention"
        train = config.train
        assert (train.steps, train.batch_size, train.learning_rate) == (400_000, 1024, 2e-4)
        assert (train.lr_schedule, train.warmup_steps, train.ema, train.ema_warmup) == ("constant", 0, (0.9999,), False)


def test_the_defaults_are_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a preset or a setting."""
    assert train_command(["--dry-run", "--device", "cpu"]) == 0
    assert "1797 images 1x8x8" in capsys.readouterr().out


def test_a_dry_run_plans_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "run"
    arguments = ["--config", "digits", "--run-dir", str(directory), *TINY]
    assert train_command([*arguments, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    for word in ("parameters", "x0-state", "bandwidth", "memory", "steps", "measured here"):
        assert word in plan
    assert not directory.exists()


def test_ranks_that_do_not_divide_the_lanes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    code = train_command(["--config", "digits", "--run-dir", str(tmp_path / "run"), *TINY])
    assert code == USAGE
    assert "2 and 4" in capsys.readouterr().err


def test_a_run_writes_all_documented_files(run: Path) -> None:
    import json

    result = json.loads((run / "result.json").read_text())
    for key in ("images_per_second", "store_wait_fraction", "peak_host_memory_bytes"):
        assert result[key] >= 0
    for key in ("weights_sha256", "ema_sha256", "state_sha256"):
        assert len(result[key]) == 64
    assert result["steps"] == 6
    samples = np.load(run / "samples.npy")
    assert samples.shape == (9, 1, 8, 8) and samples.dtype == np.float32 and np.abs(samples).max() <= 1
    assert (run / "samples.png").read_bytes().startswith(b"\x89PNG")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]
    assert any((run / "tensorboard").iterdir())
    names = sorted(p.name for p in (run / "checkpoints" / "step-00000006").iterdir())
    assert {"model.safetensors", "ema-0.9.safetensors", "optimizer.safetensors", "config.json"} <= set(names)


def test_a_finished_run_is_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_command(["--config", "digits", "--run-dir", str(run), *TINY]) == 0
    assert "is finished" in capsys.readouterr().err


def test_a_run_directory_of_another_configuration_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "digits", "--run-dir", str(run), *TINY, "--set=seed=5"]
    assert train_command(arguments) == USAGE
    assert "seed: 0 -> 5" in capsys.readouterr().err


@pytest.mark.parametrize("batch", [250, None])
def test_samples_depend_only_on_their_seed(run: Path, tmp_path: Path, batch: int | None) -> None:
    options = ["--checkpoint", str(run), "--device=cpu", *([] if batch is None else ["--batch", str(batch)])]
    assert sample_command([*options, "--seeds", "0-9", "--out", str(tmp_path / "a")]) == 0
    assert sample_command([*options, "--seeds", "7,3", "--out", str(tmp_path / "b")]) == 0
    many, few = np.load(tmp_path / "a" / "samples.npy"), np.load(tmp_path / "b" / "samples.npy")
    assert many.shape == (10, 1, 8, 8)
    exact = 0.0 if batch else 1e-5  # of as many images as there are, rounding differs
    assert np.abs(few - many[[7, 3]]).max() <= exact
    assert np.abs(many[:9] - np.load(run / "samples.npy")).max() <= exact


@pytest.mark.parametrize(
    "arguments", [["--steps", "2"], ["--steps", "2", "--sampler", "algorithm-2"], ["--ema", "none"]]
)
def test_samplers_and_averages_differ(run: Path, tmp_path: Path, arguments: list[str]) -> None:
    command = ["--checkpoint", str(run), "--seeds", "0-8", "--out", str(tmp_path), "--device=cpu"]
    command += ["--batch", "250", *arguments]
    assert sample_command(command) == 0
    same = np.array_equal(np.load(tmp_path / "samples.npy"), np.load(run / "samples.npy"))
    # this network takes no conditioning image, so Algorithm 2's second evaluation repeats its first
    assert same == ("algorithm-2" in arguments)


def test_sampling_without_a_run_is_an_error(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        sample_command(["--checkpoint", str(tmp_path / "none")])
    assert stop.value.code == USAGE
    assert sample_command(["--checkpoint", str(tmp_path)]) == FAILED
    assert sample_command(["--checkpoint", str(run), "--ema", "0.5"]) == FAILED
    assert sample_command(["--checkpoint", str(run), "--labels", "3"]) == USAGE
    assert sample_command(["--checkpoint", str(run), "--guidance", "2"]) == USAGE
    message = capsys.readouterr().err
    assert "none does not exist" in message
    assert "holds no checkpoint" in message
    assert "0.5" in message and "0.9" in message
    assert "this model has no classes" in message
    assert "guidance 2: the network takes no labels" in message


@pytest.mark.parametrize("seeds", ["5-2", "x", "1,,2", ""])
def test_bad_seeds_are_refused(seeds: str) -> None:
    with pytest.raises(SystemExit) as stop:
        sample_command(["--checkpoint", "x", "--seeds", seeds])
    assert stop.value.code == 2


def test_a_data_set_without_labels_cannot_train_a_conditional_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "images.npy", np.zeros((64, 1, 8, 8), np.uint8))
    arguments = ["--run-dir", str(tmp_path / "run"), *TINY, "--set=network.classes=3"]
    assert train_command([*arguments, f"--set=data={{name: array, path: {tmp_path / 'images.npy'}}}"]) == USAGE
    assert "no labels" in capsys.readouterr().err


def test_samples_that_do_not_fit_on_the_disk_keep_the_previous_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--checkpoint", str(run), "--out", str(tmp_path), "--device", "cpu", "--seeds"]
    assert sample_command([*command, "0-3"]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))  # as on a full disk, the file is cut
    try:
        assert sample_command([*command, "0-99"]) == FAILED
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "error: File too large" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
