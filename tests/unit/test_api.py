"""The public API: its names, forms of a configuration, custom factories, and errors."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import udddm
from udddm import ConfigError, RunConfig, TrainResult
from udddm.backends.engines.ddp import TorchEngine
from udddm.backends.launchers import Job, Launcher, choose, run_rank
from udddm.config import presets
from udddm.diffusion.samplers import SamplingTask
from udddm.diffusion.schedule import VarianceExploding
from udddm.evaluation.metrics import MetricInput
from udddm.log import StderrHandler
from udddm.networks import NetworkContext
from udddm.objectives import Objective, ObjectiveContext
from udddm.objectives.edm import EDM
from udddm.store.device import DeviceStore

TINY: dict[str, Any] = {
    "network": {
        "base_channels": 4,
        "channel_mult": [1],
        "blocks_per_level": 1,
        "attention_resolutions": [],
        "head_dim": 4,
        "dropout": 0.0,
        "condition": "none",
        "classes": 10,
    },
    "train": {"steps": 2, "batch_size": 64, "ema": [0.9], "torch_threads": 1},
    "sample": {"every_steps": 0, "final": 0},
    "log_every_steps": 1,
}
PUBLIC = {
    *("train", "sample", "evaluate", "load_config", "load_model"),
    *("RunConfig", "TrainResult", "Scores", "Model", "X0Store", "PerSampleState", "Callback", "RunInfo"),
    *("UdddmError", "ConfigError", "DataError", "StoreError", "CorruptChunkError", "CheckpointError"),
    *("RankError", "WorkerLost", "Diverged", "Interrupted"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("api") / "run"
    udddm.train(TINY, run_dir=directory, device="cpu")
    return directory


@pytest.fixture
def untouched_logger() -> Iterator[logging.Logger]:
    """Resets the logger `udddm` to its state in a new process, and restores it afterwards."""
    log = logging.getLogger("udddm")
    before = (list(log.handlers), log.propagate, log.level)
    log.handlers, log.propagate = [], True
    log.setLevel(logging.NOTSET)
    yield log
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


def recorded(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "run.json").read_text())["config"]
    return found


# Names.


def test_the_package_lists_exactly_its_public_names() -> None:
    assert set(dir(udddm)) == PUBLIC | {"__version__"}
    assert set(udddm.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(udddm, name).__module__.startswith("udddm."), name


def test_a_wrong_name_is_an_attribute_error_that_lists_the_names() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'trian'.*train"):
        udddm.trian  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError):
        from udddm import trian  # type: ignore[attr-defined]  # noqa: F401


def test_importing_the_package_imports_no_large_dependencies() -> None:
    code = (
        "import sys, udddm; dir(udddm)\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'zarr'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# Configurations.


def test_a_file_a_dict_and_a_configuration_give_the_same_run(tmp_path: Path) -> None:
    small = {f"network.{key}": value for key, value in TINY["network"].items()}
    overrides = {"train.steps": 2, "train.batch_size": 64, "sample.final": 0, **small}
    as_text = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    resolved = udddm.load_config("digits", as_text)
    sections = resolved.model_dump(mode="json")
    results = [
        udddm.train(config, run_dir=tmp_path / str(number), device="cpu", overrides=given)
        for number, (config, given) in enumerate(
            [
                ("digits", overrides),
                (presets.FOLDER / "digits.yaml", as_text),
                (sections, ()),
                (resolved, ()),
                (resolved, {"log_every_steps": 2}),
            ]
        )
    ]
    assert {result.steps for result in results} == {2}
    assert len({result.weights_sha256 for result in results}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overrides": "train.steps=3"}, r"overrides: give a dict or a list such as \['train.steps=500'\]"),
        ({"overrides": [3]}, "overrides: give a dict or a list"),
        ({"overrides": 3}, "overrides: give a dict or a list"),
        ({"overrides": ["train.steps"]}, "write key=value"),
        ({"overrides": {"train.stepps": 3}}, "did you mean train.steps"),
        ({"overrides": {"train.steps": object()}}, "train.steps is a object"),
        ({"config": 7}, "config: give a RunConfig, the path of a YAML file or a dict of sections, not a int"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"config": {"train": {"steps": 2}, "netwrok": {}}}, "netwrok: unknown key; did you mean network"),
        ({"workers": 0}, "workers=0: give a positive number"),
        ({"workers": "2"}, "workers='2': give a positive number"),
        ({"workers": (4, 2)}, r"workers=\(4, 2\): give a positive number"),
        ({"workers": (1, 2, 3)}, "a minimum and a maximum"),
        ({"workers": (1, "a")}, "a minimum and a maximum"),
        ({"workers": None}, "workers=None"),
        ({"workers": 2.5}, "workers=2.5"),
        ({"workers": True}, "workers=True"),
        ({"workers": 3}, "the nearest numbers of ranks"),
        ({"backend": "slurm"}, "unknown launcher 'slurm'; the choices are local, ray, and package.module:function"),
        ({"backend": "json:JSONDecoder"}, "it returned a JSONDecoder; give a class or function that returns a"),
        ({"max_failures": -1}, "max_failures=-1: give the number of restarts, 0 or more"),
        ({"max_failures": True}, "max_failures=True"),
        ({"max_failures": "3"}, "max_failures='3'"),
        ({"timeout": 0}, "timeout=0: give a number of seconds above 0"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": "600"}, "timeout='600'"),
        ({"run_dir": None}, "run_dir=None: give a directory or URL"),
        ({"run_dir": " "}, "run_dir=' '"),
        ({"overrides": {"sample.sampler": "heun", "sample.steps": 4}}, r"sample\.steps 4: heun takes an odd number"),
        ({"overrides": {"data.name": "digtis"}}, r"data\.name: unknown data set 'digtis'; did you mean digits"),
        ({"device": "tpu"}, "--device tpu: choose auto, cpu or cuda"),
        ({"store": lambda context: None}, r"store=<function.*top level of a module"),
        ({"network": torch.nn.Linear(1, 1)}, "network=Linear.*top level of a module"),
        ({"store": "zar"}, "store.kind: unknown x0-state store 'zar'; did you mean zarr"),
        ({"store": "no.such.module:Store"}, "x0-state store 'no.such.module:Store': there is no module no"),
        ({"sampler": "huen"}, "did you mean heun"),
        ({"sampler": "no_such_module:sampler"}, "sampler 'no_such_module:sampler': there is no module"),
        ({"overrides": {"store.settings": {"a": 1}}}, "store.settings: the x0-state store gpu takes no settings"),
        ({"overrides": {"objective.name": "uddm"}}, "Algorithm 1 conditions the network on the x0-state"),
    ],
)
def test_a_wrong_argument_is_a_configuration_error(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"config": TINY, "run_dir": tmp_path / "run", "device": "cpu"} | arguments
    with pytest.raises(ConfigError, match=message):
        udddm.train(**given)
    assert not (tmp_path / "run").exists()


def test_local_functions_and_lambdas_are_refused(tmp_path: Path) -> None:
    def local(context: NetworkContext) -> torch.nn.Module:
        raise AssertionError

    with pytest.raises(ConfigError, match="every worker imports it by that name"):
        udddm.train(TINY, run_dir=tmp_path, network=local)


def test_an_unknown_option_is_a_type_error_that_lists_the_options(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"no argument 'max_failure'; .* max_failures"):
        udddm.train(TINY, run_dir=tmp_path, max_failure=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [1]}, "1 labels for 3 seeds"),
        ({"labels": [1, 2, 10]}, "there is no class 10; the model has 10 classes"),
        ({"labels": [1, 2, -1]}, "there is no class -1"),
        ({"labels": [1, 2, 0.5]}, "labels: 0.5 is not an integer"),
        ({"labels": 3}, "labels: give a sequence of integers"),
        ({"seeds": 3}, r"seeds: give a sequence of integers, such as range\(64\), not 3"),
        ({"seeds": "123"}, "seeds: give a sequence of integers"),
        ({"seeds": [1, "2"]}, "seeds: '2' is not an integer"),
        ({"steps": 0}, r"steps \(0\).* must be at least 1"),
        ({"steps": 2.5}, r"steps=2\.5: give a whole number"),
        ({"steps": "2"}, "steps='2': give a whole number"),
        ({"batch": True}, "batch=True: give a whole number"),
        ({"guidance": "2"}, "guidance='2': give a number"),
        ({"settings": 3}, "settings=3: give a mapping"),
        ({"sampler": "heun", "steps": 4}, "steps 4: heun takes an odd number of evaluations.*: give 3 or 5"),
        ({"sampler": "huen"}, "unknown sampler 'huen'; did you mean heun"),
        ({"guidance": 2.0}, "network.label_dropout"),
    ],
)
def test_wrong_arguments_of_sampling_are_refused(arguments: dict[str, Any], message: str, run: Path) -> None:
    model = udddm.load_model(run, device="cpu")
    with pytest.raises(ConfigError, match=message):
        udddm.sample(model, **({"seeds": [1, 2, 3]} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint": None}, "checkpoint=None: give the path or URL of a run"),
        ({"ema_length": "long"}, "ema_length='long': give a number"),
        ({"ema": 0.9, "ema_length": 0.1}, "give only one of them"),
    ],
)
def test_wrong_arguments_of_loading_are_refused(arguments: dict[str, Any], message: str, run: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        udddm.load_model(**({"checkpoint": run} | arguments))


def test_seeds_and_labels_may_be_arrays_and_tensors(run: Path) -> None:
    model = udddm.load_model(run, device="cpu")
    expected = model.sample([0, 1], labels=[3, 4])
    assert np.array_equal(udddm.sample(model, np.arange(2), labels=np.array([3, 4])), expected)
    assert np.array_equal(udddm.sample(run, torch.arange(2), labels=torch.tensor([3, 4])), expected)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="seeds: there are none"):
        udddm.sample(model, [])


# Results.


def test_results_are_frozen_dataclasses(run: Path) -> None:
    result = udddm.train(TINY, run_dir=run, device="cpu")  # the run is finished, so this reads its result
    assert isinstance(result, TrainResult) and dataclasses.is_dataclass(result)
    assert result.steps == result["steps"] == 2
    assert result.to_dict() == json.loads((run / "result.json").read_text())
    scores = udddm.Scores(n=3, fd=1.5, other={"mine": 2})
    assert scores["fd"] == 1.5 and scores["mine"] == 2 and scores.to_dict() == {"n": 3, "fd": 1.5, "mine": 2}
    for frozen, name in ((result, "steps"), (scores, "n"), (udddm.load_model(run, device="cpu"), "shape")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 0)
    for found in (result, scores):
        with pytest.raises(KeyError):
            found["nothing"]


# Custom factories.


class OwnStore(DeviceStore):
    pass


class OwnEngine(TorchEngine):
    pass


class OwnSchedule(VarianceExploding):
    pass


class OwnNetwork(torch.nn.Module):
    def __init__(self, context: NetworkContext):
        super().__init__()
        self.layer = torch.nn.Conv2d(context.shape[0], context.shape[0], 3, padding=1)

    def forward(
        self, noisy: torch.Tensor, c_noise: torch.Tensor, condition: torch.Tensor | None, labels: torch.Tensor | None
    ) -> torch.Tensor:
        out: torch.Tensor = self.layer(noisy)
        return out


def own_objective(context: ObjectiveContext) -> Objective:
    return EDM.create(context)


def own_sampler(task: SamplingTask) -> torch.Tensor:
    return torch.full((task.count, 1, 8, 8), 0.25)


def test_custom_factories_become_names_in_the_configuration(tmp_path: Path) -> None:
    result = udddm.train(
        TINY,
        run_dir=tmp_path,
        device="cpu",
        overrides={"sample.final": 3},
        store=OwnStore,
        network=OwnNetwork,
        objective=own_objective,
        engine=OwnEngine,
        schedule=OwnSchedule,
        sampler=own_sampler,
    )
    assert result.steps == 2
    found = recorded(tmp_path)
    assert found["store"]["kind"] == f"{__name__}:OwnStore"
    assert found["network"]["name"] == f"{__name__}:OwnNetwork"
    assert found["objective"]["name"] == f"{__name__}:own_objective"
    assert found["engine"]["name"] == f"{__name__}:OwnEngine"
    assert found["schedule"]["kind"] == f"{__name__}:OwnSchedule"
    assert found["sample"]["sampler"] == f"{__name__}:own_sampler"
    assert (np.load(tmp_path / "samples.npy") == 0.25).all()
    model = udddm.load_model(tmp_path, device="cpu", trust=True)
    assert isinstance(model.network, OwnNetwork) and isinstance(model.schedule, OwnSchedule)


def half(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)[:, :32]


def own_metric(given: MetricInput) -> dict[str, Any]:
    return {"mine": given.features.mean()}


def no_metric(given: MetricInput) -> float:
    return 3.0


def test_a_custom_metric_scores_from_python_and_during_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = np.full((20, 1, 8, 8), 0.5, np.float32)
    features = f"{__name__}:half"

    def scored(*metrics: Any) -> udddm.Scores:
        return udddm.evaluate(images, images[:9], features=features, metrics=metrics, device="cpu")

    scores = scored("frechet", own_metric)
    assert scores["mine"] == scores.other["mine"] == 0.5 and scores.fd is not None and scores.kid is None
    with pytest.raises(ConfigError, match="did you mean frechet"):
        scored("frechte")
    with pytest.raises(ConfigError, match="top level of a module"):
        scored(lambda given: {})
    with pytest.raises(ConfigError, match="no_metric returned a float; return a dict"):
        scored(no_metric)
    with pytest.raises(ConfigError, match="give a list of names or functions"):
        udddm.evaluate(images, images, features=features, metrics="frechet", device="cpu")
    evaluation = {"every_steps": 2, "count": 4, "features": features, "metrics": [f"{__name__}:own_metric"]}
    udddm.train({**TINY, "evaluate": evaluation}, run_dir=tmp_path / "run", device="cpu")
    [line] = (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()
    assert json.loads(line)["n"] == 4 and isinstance(json.loads(line)["mine"], float)


class InThisProcess(Launcher):
    """A custom launcher that runs the only rank in this process."""

    attempts: list[int] = []  # noqa: RUF012

    def available_workers(self, job: Job) -> int:
        return 1

    def run_attempt(self, job: Job, workers: int) -> dict[str, Any]:
        self.attempts.append(workers)
        return run_rank(job, None)


@pytest.mark.parametrize("backend", [InThisProcess, f"{__name__}:InThisProcess"])
def test_a_custom_launcher_runs_the_job(backend: Any, tmp_path: Path) -> None:
    InThisProcess.attempts.clear()
    assert udddm.train(TINY, run_dir=tmp_path, device="cpu", workers=(1, 8), backend=backend).steps == 2
    assert InThisProcess.attempts == [1]


def test_the_launcher_is_selected_by_name_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "RAY_JOB_ID", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    config = RunConfig()
    one, two = Job(config, "run"), Job(config, "run", workers=(1, 2))
    restarted = Job(config, "run", max_failures=1)
    assert choose("auto", one) is None and choose("local", one) is None
    assert choose("auto", two) == ("local", "several workers on this machine")
    assert choose("auto", restarted) == ("local", "restarts after failures")
    assert choose("ray", one) == ("ray", "requested")
    assert choose("mine:Launcher", one) == ("mine:Launcher", "requested")
    monkeypatch.setenv("RAY_JOB_ID", "01000000")
    assert choose("auto", one) == ("ray", "this is a Ray job")
    assert choose("local", two) == ("local", "several workers on this machine")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")  # as if torchrun had started this process
    assert choose("auto", two) is None and choose("local", two) is None


# Messages.


def test_the_messages_of_a_run_are_printed_once_and_can_be_silenced(
    untouched_logger: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no logging configured, `train` prints to stderr."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    udddm.train(TINY, run_dir=tmp_path / "loud", device="cpu")
    assert stderr.getvalue().count("run directory: ") == 1
    assert [type(handler) for handler in untouched_logger.handlers] == [StderrHandler]
    stderr.truncate(0)
    untouched_logger.setLevel(logging.WARNING)
    udddm.train(TINY, run_dir=tmp_path / "quiet", device="cpu")
    assert "run directory: " not in stderr.getvalue()


def test_configured_logging_receives_the_messages_and_no_handler_is_added(
    untouched_logger: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, stream = logging.getLogger(), io.StringIO()
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(stream)])
    monkeypatch.setattr(root, "level", logging.INFO)
    udddm.train(TINY, run_dir=tmp_path / "run", device="cpu")
    assert untouched_logger.handlers == [] and untouched_logger.propagate
    assert stream.getvalue().count("run directory: ") == 1
