"""What newcomers type wrong: each mistake is answered by one line that says what is meant and how to write it."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest

from udddm.cli.command import USAGE
from udddm.cli.main import main

RELEASE = str(Path(__file__).parents[3] / "benchmarks" / "results" / "fashion-mnist" / "consistency")
MISTAKES = [
    # Commands and options.
    ("trian --config digits", "did you mean udddm train?"),
    ("--config digits", "start with a command, such as udddm train --config digits"),
    ("train digits", "digits: write --config digits"),
    ("train digit", "did you mean --config digits?"),
    ("train own.yaml", "own.yaml: write --config own.yaml"),
    ("train --conifg digits", "there is no --conifg; did you mean --config?"),
    ("train --config", "--config needs a value: --config NAME|FILE"),
    (
        "train --continue runs/mine --config digits steps=2x",
        "has its own configuration, data and directory: drop digits",
    ),
    ("train --continue runs/none steps=2x", "--continue runs/none: there is no run"),
    ("train --config digits --run-dir s3://bucket/x --new", "--new is for local directories"),
    ("train --config digits --profile five", "--profile 'five': give a whole number"),
    ("train --config digits loggers=wandbb", "unknown logger 'wandbb'; did you mean wandb?"),
    ("sample RELEASE --save jpg", "--save: 'jpg': the choices are npy, npz, png, grid, separated by commas"),
    ("sample RELEASE --autoencoder vae", "--autoencoder and --moments go together"),
    ("train --config digits --steps 500", "there is no --steps; write train.steps=500"),
    ("train --config digits --batch-size=32", "there is no --batch-size; write train.batch_size=32"),
    ("train --config digits --lr 1e-3", "there is no --lr; write train.learning_rate=1e-3"),
    ("train --config digits --device gpu", "--device: 'gpu' is unknown; did you mean cuda?"),
    ("train --config digits --workers two", "'two': write a number of workers, or MIN:MAX"),
    (
        "train --config digits --max-failures many",
        "--max-failures 'many': give a whole number, such as --max-failures 0",
    ),
    # Presets and files.
    ("train --config digit", "did you mean digits? The presets are cifar10, "),
    ("train --config configs/digits.yaml", "did you mean the preset digits (--config digits)?"),
    ("train --config cifar-10", "did you mean cifar10?"),
    ("train --config own.yaml", "own.yaml: train.stepps: unknown key; did you mean train.steps?"),
    ("train --config pictures", "this directory holds no config.yaml"),
    # Settings.
    (
        "train --config digits train.lerning_rate=1e-3",
        "train.lerning_rate: unknown key; did you mean train.learning_rate?",
    ),
    ("train --config digits learning_rte=1e-3", "learning_rte: unknown key; did you mean train.learning_rate?"),
    ("train --config digits train.classes=10", "did you mean network.classes?"),
    ("train --config digits train.steps 500", "train.steps: write train.steps=500"),
    ("train --config digits train.steps=many", "train.steps: give a whole number (got 'many')"),
    ("train --config digits train.steps=1.5", "train.steps: give a whole number (got 1.5)"),
    ("train --config digits lr=-1", "train.learning_rate: Input should be greater than 0 (got -1)"),
    ("train --config digits train.precision=bf61", "did you mean bf16? The choices are fp32, bf16, fp16"),
    ("train --config digits data.flip=often", "data.flip: give true or false (got 'often')"),
    ("train --config digits store=zar", "store.kind: unknown x0-state store 'zar'; did you mean zarr?"),
    (
        "train --config digits --store s3",
        "store.kind: unknown x0-state store 's3'; the choices are none, gpu, pinned, zarr",
    ),
    ("train --config digits objective=itc", "objective.name: unknown objective 'itc'; did you mean ict?"),
    ("train --config digits train=500", "train: this is a section; set one of its keys, such as train.epochs=..."),
    ("train --config digits network={base_channels: 8}", "put the setting in quotes"),
    ("train --config digits train.betas=0.9", "train.betas: give a list such as [0.9, 0.999]"),
    ("train --config digits --set seed", "seed: write key=value"),
    ("train --config digits steps=", "the length of the run is missing: set train.steps or train.epochs"),
    ("train --config digits epochs=2 train.lr_shedule=cosine", "did you mean train.lr_schedule?"),
    ("train --config digits batch_size=30 order.lanes=8", "order.lanes (8) must divide train.batch_size (30)"),
    # Data.
    ("train --config digits data=cifar-10", "data.name: unknown data set 'cifar-10'; did you mean cifar10?"),
    ("train --config digits data.path=pictures", "to train on pictures, set data.name=folder"),
    ("train --config digits data=folder", "needs data.path"),
    (
        "train --config digits classes=9",
        "network.classes is 9, whose labels are 0..8, but the data set has labels in 0..9",
    ),
    # Samples and scores.
    ("sample", "give a run or a checkpoint, such as udddm sample runs/digits"),
    ("sample digits", "digits is a preset, not a run: train it first, with udddm train --config digits"),
    ("sample mine", "mine does not exist; did you mean runs/mine?"),
    ("sample nothing", "nothing does not exist; the runs here are runs/mine"),
    ("sample RELEASE --stpes 4", "there is no --stpes; did you mean --steps?"),
    ("sample RELEASE --count 0", "--count: 0 must be at least 1"),
    ("sample RELEASE --seeds 9-0", "'9-0': the last seed is below the first"),
    ("sample RELEASE --labels 10", "there is no class 10; the model has 10 classes, numbered from 0"),
    ("sample RELEASE --sampler hune", "unknown sampler 'hune'; did you mean heun?"),
    ("sample RELEASE --guidance 2", "the network was not trained without labels"),
    ("evaluate", "give either a run, such as udddm evaluate runs/digits, or --samples FILE"),
    ("evaluate --samples nowhere.npy", "nowhere.npy: this file does not exist"),
    ("evaluate RELEASE steps=4", "write --steps 4"),
    ("evaluate RELEASE --metrics recall", "unknown metric 'recall'; did you mean precision-recall?"),
    ("evaluate runs/mnie", "runs/mnie does not exist; did you mean runs/mine?"),
    # Exports.
    ("export", "give a run, a checkpoint or a release, such as udddm export runs/digits --to onnx"),
    ("export RELEASE", "give a format: --to safetensors, onnx, diffusers, hub, web"),
    ("export RELEASE --to onxn", "--to: 'onxn' is unknown; did you mean onnx?"),
    ("export runs/mne --to onnx", "runs/mne does not exist; did you mean runs/mine?"),
    ("export RELEASE --to onnx --out pictures", "pictures has files; name a new folder"),
    ("export RELEASE --to onnx --out own.yaml", "own.yaml is a file; name a new folder"),
    ("export RELEASE --to hub --precision fp16", "--precision has no effect with --to hub; it is for --to onnx, web"),
    ("export RELEASE --to onnx --runtime pictures", "--runtime has no effect with --to onnx; it is for --to web"),
    ("export RELEASE --to web --runtime pictures", "--runtime pictures has no file dist/ort.wasm.bundle.min.mjs"),
    ("export RELEASE --to onnx --repo user/name", "--repo has no effect with --to onnx"),
    ("export RELEASE --to onnx --ema 0.5 --ema-length 0.1", "not allowed with argument --ema"),
    ("export hf://model --to onnx", "write hf://user/model, or hf://user/model@revision"),
    # Other commands.
    ("store", "give a command: info, verify, view"),
    ("store info runs/mne", "runs/mne does not exist; did you mean runs/mine?"),
    ("store inof runs/digits", "did you mean info?"),
    ("store info runs/mine --treads 3", "there is no --treads"),
    ("store bench runs/mine --thraeds 3", "there is no --thraeds; did you mean --threads?"),
    ("store plan --samples 10 --shape 32x32", "write the shape as CHANNELSxHEIGHTxWIDTH, such as 3x32x32"),
    ("config shwo digits", "did you mean show?"),
    ("config show", "NAME|FILE"),
    ("completion fish", "The choices are bash, zsh"),
]


@pytest.mark.parametrize(("line", "meant"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_answered_by_one_line_that_says_what_is_meant(
    line: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    np.save(tmp_path / "pictures" / "x.npy", np.zeros(1))
    (tmp_path / "own.yaml").write_text("train: {stepps: 3}\n")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "run.json").touch()
    before = sorted(tmp_path.rglob("*"))
    try:
        code = main(shlex.split(line.replace("RELEASE", RELEASE)))
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    assert code == USAGE, printed.err
    assert meant in printed.err, printed.err
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    assert printed.out == "" and sorted(tmp_path.rglob("*")) == before
