"""The examples of docs/extending.md: a custom member of every plug point trains and samples."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import udddm
from udddm.config import load_config, resolve
from udddm.data import load_dataset
from udddm.errors import ConfigError, StoreError
from udddm.evaluation.evaluate import evaluate as score
from udddm.order import Order
from udddm.store import Encoding, StateLayout, X0Store
from udddm.testing.store import StoreConformance

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGE = Path(udddm.__file__).parent
MODULES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
TINY = [
    "data.name=digits",
    "network={base_channels: 8, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [], dropout: 0.0, "
    "condition: none}",
    "order={lanes: 4, chunk: 64, window: 2}",
    "train={steps: 8, batch_size: 32, learning_rate: 0.001, ema: [0.9], torch_threads: 1}",
    "checkpoint.every_steps=4",
    "sample={every_steps: 0, final: 4}",
]


@pytest.fixture(autouse=True)
def reachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Adds examples/ to the import path of this process and its children, like PYTHONPATH=examples."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("PYTHONPATH", f"{EXAMPLES}{os.pathsep}{PACKAGE.parent}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = contents()
    yield
    assert contents() == before, "an example changed a file of the package"


def contents() -> str:
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def member(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def train(run: Path, *overrides: str, **options: Any) -> udddm.TrainResult:
    return udddm.train(load_config(None, [*TINY, *overrides]), run_dir=run, device="cpu", **options)


def fingerprints(result: udddm.TrainResult) -> list[str]:
    return [result.weights_sha256, result.ema_sha256, result.state_sha256]


def test_the_package_names_no_example_and_every_example_is_documented() -> None:
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    documented = (EXAMPLES.parent / "docs" / "extending.md").read_text()
    assert len(MODULES) == 9
    for name in MODULES:
        assert name not in source
        assert f"examples/{name}.py" in documented
        text = (EXAMPLES / f"{name}.py").read_text()
        assert "PYTHONPATH=examples" in text.split('"""')[1], "the docstring shows the command"
        assert len(text.splitlines()) <= 150


class TestSqliteStore(StoreConformance):
    """The conformance suite of the package, with fewer random histories (`StoreConformance.examples`)."""

    dtypes = ("fp16", "bf16")
    examples = 6

    def make(self, order: Order, lanes: range, shape: tuple[int, ...], encoding: Encoding, directory: Path) -> X0Store:
        store: X0Store = member("custom_store:SqliteStore")(
            StateLayout(order, lanes, shape, encoding, torch.device("cpu")), directory / "state"
        )
        return store


def test_a_run_on_sqlite_equals_a_run_on_the_device_bit_for_bit(tmp_path: Path) -> None:
    device = train(tmp_path / "device", "store.kind=gpu")
    python = train(tmp_path / "python", store=member("custom_store:SqliteStore"))
    elsewhere = f"store={{kind: 'custom_store:SqliteStore', settings: {{directory: '{tmp_path / 'db'}', cache_mb: 1}}}}"
    named = train(tmp_path / "named", elsewhere)
    assert fingerprints(device) == fingerprints(python) == fingerprints(named)
    assert list((tmp_path / "python" / "state").glob("*.sqlite")) and list((tmp_path / "db").glob("*.sqlite"))


def test_a_killed_run_on_sqlite_resumes_bit_for_bit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from udddm.cli.train import main as run_command

    longer = ["train={steps: 80, batch_size: 32, learning_rate: 0.001, ema: [0.9], torch_threads: 1}"]
    longer.append("checkpoint.every_steps=20")
    expected = train(tmp_path / "device", *longer, "store.kind=gpu")
    preset = tmp_path / "preset.yaml"  # the third way to name a member: YAML
    tree = load_config(None, [*TINY, *longer, "store.kind=custom_store:SqliteStore"]).model_dump(mode="json")
    preset.write_text(yaml.safe_dump(tree))
    run = tmp_path / "run"
    arguments = [f"--config={preset}", f"--run-dir={run}", "--device=cpu"]
    command = [sys.executable, "-m", "udddm", "train", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*/manifest.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "result.json").exists()
    assert run_command(arguments) == 0
    assert "resuming from step-" in capfd.readouterr().err
    found = json.loads((run / "result.json").read_text())
    assert [found["weights_sha256"], found["ema_sha256"], found["state_sha256"]] == fingerprints(expected)


def test_a_run_moves_between_sqlite_and_built_in_stores(tmp_path: Path) -> None:
    expected = train(tmp_path / "device", "store.kind=gpu")
    (tmp_path / "moved").mkdir()
    for stop, kind in ((4, "custom_store:SqliteStore"), (0, "zarr")):
        if stop:
            interrupted(tmp_path / "moved", stop, f"store.kind={kind}")
        else:
            moved = train(tmp_path / "moved", f"store.kind={kind}")
    assert fingerprints(moved) == fingerprints(expected)


def interrupted(run: Path, step: int, *overrides: str) -> None:
    """Train up to the checkpoint of `step`."""
    from udddm.backends.distributed.ranks import join
    from udddm.data import ImageDataset
    from udddm.runs.run import Run, check_or_record
    from udddm.training.trainer import Trainer

    config = load_config(None, [*TINY, *overrides])
    images = ImageDataset(load_dataset(config.data))
    check_or_record(run, config, images)
    trainer = Trainer(config, images, Run(run), join("cpu"))
    inputs = trainer.begin()
    for _ in range(step):
        trainer.train_step(inputs)
    trainer.save()
    inputs.close()
    trainer.store.close()


def test_unsupported_settings_of_a_sqlite_store_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"store.settings.cache_mb.*integer"):
        train(tmp_path / "run", "store={kind: 'custom_store:SqliteStore', settings: {cache_mb: many}}")
    (tmp_path / "file").write_text("")
    place = f"store={{kind: 'custom_store:SqliteStore', settings: {{directory: '{tmp_path / 'file' / 'x'}'}}}}"
    with pytest.raises(StoreError, match=r"cannot create .*lanes-0000.sqlite.*store.settings.directory"):
        train(tmp_path / "other", place)


CHOICES = {
    "network": ("network.name=custom_network:DiT", "network.settings={width: 16, depth: 1, heads: 2}"),
    "objective": ("objective.name=custom_objective:PlainConsistency", "objective.settings.levels=4"),
    "schedule": ("schedule.kind=custom_schedule:Cosine", "schedule.settings={lowest: 0.05, highest: 30}"),
    "engine": ("engine.name=custom_engine:Decoupled", "engine.settings.optimizer=radam"),
    "sampler": ("sample={sampler: 'custom_sampler:chosen_levels', steps: 2, final: 4, every_steps: 0}",),
}


@pytest.mark.parametrize("what", CHOICES)
def test_each_choice_trains_resumes_and_gives_finite_samples(what: str, tmp_path: Path) -> None:
    chosen = CHOICES[what]
    whole = train(tmp_path / "whole", *chosen)
    assert whole.steps == 8
    images = np.load(tmp_path / "whole" / "samples.npy")
    assert images.shape == (4, 1, 8, 8) and np.isfinite(images).all()
    (tmp_path / "resumed").mkdir()
    interrupted(tmp_path / "resumed", 4, *chosen)
    assert fingerprints(train(tmp_path / "resumed", *chosen)) == fingerprints(whole)
    if what in ("network", "objective", "schedule", "engine"):
        assert fingerprints(train(tmp_path / "plain")) != fingerprints(whole)


def test_members_can_be_passed_as_objects_from_python(tmp_path: Path) -> None:
    named = [override for what in CHOICES for override in CHOICES[what]]
    expected = train(tmp_path / "named", *named)
    settings = [override for override in named if "custom_" not in override]
    found = train(
        tmp_path / "passed",
        *settings,
        "sample={steps: 2, final: 4, every_steps: 0}",
        network=member("custom_network:DiT"),
        objective=member("custom_objective:PlainConsistency"),
        schedule=member("custom_schedule:Cosine"),
        engine=member("custom_engine:Decoupled"),
        sampler=member("custom_sampler:chosen_levels"),
    )
    assert fingerprints(found) == fingerprints(expected)
    config = (tmp_path / "passed" / "config.yaml").read_text()
    assert all(name in config for name in ("custom_network:DiT", "custom_sampler:chosen_levels"))
    with pytest.raises(ConfigError, match=r"custom_network:DiT.*trust=True"):
        udddm.load_model(tmp_path / "passed", device="cpu")
    model = udddm.load_model(tmp_path / "passed", device="cpu", trust=True)
    sampler = member("custom_sampler:chosen_levels")
    images = model.sample(range(4), steps=2, sampler=sampler)
    np.testing.assert_array_equal(images, np.load(tmp_path / "passed" / "samples.npy"))
    others = model.sample(range(4), steps=2, sampler=sampler, settings={"levels": [5.0]})
    assert np.isfinite(others).all() and not np.array_equal(images, others)
    with pytest.raises(ConfigError, match=r"3 evaluations need 2 levels"):
        model.sample(range(4), steps=3, sampler=sampler, settings={"levels": [5.0]})
    with pytest.raises(ConfigError, match="give positive, decreasing levels"):
        model.sample(range(4), steps=3, sampler=sampler, settings={"levels": [1.0, 5.0]})


def test_a_network_takes_conditions_labels_and_no_labels(tmp_path: Path) -> None:
    from udddm import networks

    settings = {"patch": 2, "width": 16, "depth": 1, "heads": 2}
    tree = {
        "network": {"name": "custom_network:DiT", "settings": settings, "classes": 3, "condition": "cross-attention"}
    }
    network = networks.for_run(resolve(tree), (3, 4, 6)).eval()  # without dropout
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    noisy, level = torch.randn(2, 3, 4, 6), torch.zeros(2)
    plain = network(noisy, level, torch.zeros_like(noisy), None)
    assert plain.shape == noisy.shape
    torch.testing.assert_close(network(noisy, level, torch.zeros_like(noisy), torch.tensor([3, 3])), plain)
    assert not torch.equal(network(noisy, level, torch.ones_like(noisy), torch.tensor([0, 1])), plain)
    with pytest.raises(ConfigError, match="does not divide images of 5x4"):
        networks.for_run(resolve(tree), (1, 5, 4))


def test_time_inverts_sigma_in_a_custom_schedule() -> None:
    from udddm.diffusion import schedule

    config = load_config(None, list(CHOICES["schedule"])).schedule
    cosine = schedule.build(config)
    t = np.linspace(1, config.timesteps, 97)
    np.testing.assert_allclose(cosine.time(cosine.sigma(t)), t, rtol=1e-9)
    assert np.isfinite(cosine.coefficients(t)).all()
    np.testing.assert_allclose([cosine.lowest, cosine.highest], [0.05, 30])


def test_a_dry_run_counts_and_measures_custom_members(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from udddm.cli.train import main as run

    chosen = [override for what in ("network", "objective", "schedule", "engine") for override in CHOICES[what]]
    settings = [f"--set={each}" for each in [*TINY, *chosen, "store.kind=custom_store:SqliteStore"]]
    assert run([*settings, "--dry-run", "--device=cpu"]) == 0
    said = capsys.readouterr().out
    assert "store custom_store:SqliteStore: each rank holds at most" in said and "GFLOP" in said
    assert "objective: custom_objective:PlainConsistency" in said


def test_the_store_command_reads_the_checkpoints_of_a_run_on_sqlite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from udddm.cli.store import main as store

    run = tmp_path / "run"
    train(run, "store.kind=custom_store:SqliteStore")
    sys.modules.pop("custom_store")
    for command in (["info"], ["verify"], ["view", "--sample=3", f"--out={tmp_path}/v.png"]):
        assert store([command[0], str(run), *command[1:]]) == 0
    assert "no zarr store (store.kind=custom_store:SqliteStore)" in capsys.readouterr().out
    assert store(["convert", str(run), str(tmp_path / "copy")]) == 0
    assert "custom_store" not in sys.modules


def test_custom_images_train_by_name_and_by_object(tmp_path: Path) -> None:
    data = "data={name: 'own_images:factory', arguments: {count: 96, side: 8}}"
    named = train(tmp_path / "named", data, "network.classes=3")
    passed = train(tmp_path / "passed", data, "network.classes=3", dataset=member("own_images:factory")(96, 8))
    assert fingerprints(named) == fingerprints(passed)


def test_a_custom_metric_is_reported_during_and_after_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from udddm.cli.evaluate import main as evaluate

    monkeypatch.setenv("UDDDM_CACHE", str(tmp_path / "cache"))
    own = "evaluate={every_steps: 4, count: 16, features: 'custom_metric:pixels', "
    train(tmp_path / "run", own + "metrics: ['custom_metric:density_coverage']}")
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and set(lines[0]) == {"step", "evaluations", "n", "density", "coverage"}
    command = [f"--checkpoint={tmp_path / 'run'}", "--count=16", "--device=cpu", f"--json={tmp_path / 'scores.json'}"]
    command += ["--features=custom_metric:pixels", f"--cache={tmp_path / 'cache'}"]
    assert evaluate([*command, "--metrics=frechet,custom_metric:density_coverage"]) == 0
    said = capsys.readouterr().out
    assert "fd " in said and "coverage " in said and "density " in said
    assert json.loads((tmp_path / "scores.json").read_text())["density"] >= 0
    assert evaluate([*command, "--metrics=frechet,custom_metric:nothing"]) == 2
    assert "custom_metric has no nothing" in capsys.readouterr().err
    digits = load_dataset(load_config(None, ["data.name=digits"]).data)
    real = np.stack([digits[i][0] for i in range(300)])
    found = score(real, digits, features="custom_metric:pixels", metrics=[member("custom_metric:density_coverage")])
    assert found.other["density"] > 0.5 and found.fd is None


def test_a_custom_launcher_starts_the_ranks_and_raises_their_errors(tmp_path: Path) -> None:
    launcher = member("custom_launcher:Torchrun")
    alone = train(tmp_path / "alone")
    several = train(tmp_path / "several", workers=2, backend=launcher)
    assert several.steps == alone.steps and several.state_sha256 != ""
    with pytest.raises(udddm.DataError, match=r"data\.arguments: count 0"):
        train(
            tmp_path / "wrong", "data={name: 'own_images:factory', arguments: {count: 0}}", workers=2, backend=launcher
        )


def test_an_optimizer_with_unsupported_state_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "momentum.py").write_text(
        "import torch\nfrom udddm.backends.engines.ddp import TorchEngine\n\n\nclass Momentum(TorchEngine):\n"
        "    def optimizer(self, parameters):\n        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="keeps momentum_buffer, which checkpoints do not hold"):
        train(tmp_path / "run", "engine.name=momentum:Momentum")


def test_the_commands_in_the_docstrings_are_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every `udddm-...` command in a docstring is parsed, and its configuration is resolved."""
    import shlex

    from udddm.cli import evaluate, sample
    from udddm.cli import train as training

    parsers = {"udddm-train": training._parser, "udddm-sample": sample._parser, "udddm-evaluate": evaluate._parser}
    found = 0
    for name in MODULES:
        text = (EXAMPLES / f"{name}.py").read_text().split('"""')[1].replace("\\\\\n", " ").replace("\\\n", " ")
        for line in text.splitlines():
            if line.strip().startswith("PYTHONPATH=examples udddm-"):
                command, *arguments = shlex.split(line)[1:]
                parsed = parsers[command]().parse_args(arguments)
                if command == "udddm-train":
                    load_config(parsed.config, [*parsed.set, *parsed.overrides])
                found += 1
    assert found >= len(MODULES)
