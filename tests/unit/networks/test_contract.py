"""A network that does not keep its contract is one error that names the network and what it has to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import udddm
from udddm.cli.command import USAGE
from udddm.cli.train import main as train_command
from udddm.errors import ConfigError
from udddm.networks import NetworkContext

TRAIN = {"steps": 1, "batch_size": 64, "ema": [0.9]}


class Convolution(nn.Module):
    def __init__(self, context: NetworkContext):
        super().__init__()
        self.layer = nn.Conv2d(context.shape[0], context.shape[0], 3, padding=1)

    def forward(self, noisy: torch.Tensor, c_noise: torch.Tensor, condition: Any, labels: Any) -> Any:
        return self.layer(noisy)


class Smaller(Convolution):
    def forward(self, *arguments: Any) -> Any:
        return super().forward(*arguments)[:, :, :4]


class Pair(Convolution):
    def forward(self, *arguments: Any) -> Any:
        return super().forward(*arguments), None


class TwoArguments(Convolution):
    def forward(self, noisy: torch.Tensor, c_noise: torch.Tensor) -> Any:  # type: ignore[override]
        return self.layer(noisy)


class Exhausting(Convolution):
    def forward(self, *arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")


class NoContext(nn.Module):
    def __init__(self) -> None:
        super().__init__()


class NoParameters(nn.Module):
    def __init__(self, context: NetworkContext):
        super().__init__()

    def forward(self, noisy: torch.Tensor, c_noise: torch.Tensor, condition: Any, labels: Any) -> Any:
        return noisy


def number(context: NetworkContext) -> int:
    return 3


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Smaller, r"the network returned \[\d+, 1, 4, 8\]; return a tensor \[\d+, 1, 8, 8\], as its input"),
        (Pair, "the network returned a tuple; return a tensor"),
        (TwoArguments, r"is called as forward\(noisy, c_noise, condition, labels\): too many positional arguments"),
        (NoContext, r"is called as .*:NoContext\(context\)"),
        (NoParameters, "the network has no parameters to train"),
        (number, r"it returned a int; return a torch\.nn\.Module"),
        (Exhausting, r"out of memory \(.*20 GiB\): set train\.grad_accumulation=2 \(it is 1\)"),
    ],
)
def test_a_network_that_breaks_its_contract_is_named(network: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        udddm.train({"train": TRAIN}, run_dir=tmp_path / "run", network=network, device="cpu")
    assert "network" in str(caught.value)


def test_a_built_in_network_that_cannot_be_built_is_refused_before_the_run_exists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", "digits", "--run-dir", str(tmp_path / "run"), "--device", "cpu"]
    assert train_command([*arguments, "network.attention_resolutions=5"]) == USAGE
    assert "network.attention_resolutions" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
