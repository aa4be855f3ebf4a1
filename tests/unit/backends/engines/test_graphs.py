"""CUDA graphs: what can be tested without a GPU. On one, benchmarks/gpu.py compares runs (P2 to P6)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from udddm import networks
from udddm.backends import engines
from udddm.backends.distributed.ranks import Ranks
from udddm.backends.engines.ddp import channels_last, cuda_graphs
from udddm.backends.engines.graphs import GraphedNetwork, _refuse_hidden, aliased
from udddm.config import RunConfig, resolve
from udddm.errors import ConfigError
from udddm.objectives import teacher_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def config(network: dict[str, object] | None = None, **train: object) -> RunConfig:
    return resolve({"train": {"steps": 8, **train}, "network": network or {}})


@pytest.mark.parametrize(
    ("train", "world", "device", "expected"),
    [
        ({}, 1, GPU, True),
        ({}, 1, CPU, False),
        ({"cuda_graphs": True}, 1, CPU, False),
        ({}, 2, GPU, False),
        ({"cuda_graphs": True}, 2, GPU, True),
        ({"cuda_graphs": False}, 1, GPU, False),
        ({"compile": True}, 1, GPU, False),
        ({"compile": True, "cuda_graphs": True}, 1, GPU, True),
        ({"deterministic": True}, 1, GPU, False),
        ({"grad_accumulation": 2}, 1, GPU, False),
    ],
)
def test_where_graphs_are_used(train: dict[str, object], world: int, device: torch.device, expected: bool) -> None:
    assert cuda_graphs(config(**train), Ranks(0, world, device)) is expected


def test_networks_of_others_are_captured_only_on_request() -> None:
    named: dict[str, object] = {"name": "somebody.network:build"}
    assert not cuda_graphs(config(named), Ranks(0, 1, GPU))
    assert cuda_graphs(config(named, cuda_graphs=True), Ranks(0, 1, GPU))


def test_the_memory_format_follows_the_device() -> None:
    assert channels_last(config().train, CPU)
    assert not channels_last(config().train, GPU)
    assert channels_last(config(compile=True).train, GPU)
    assert channels_last(config(channels_last=True).train, GPU)
    assert not channels_last(config(channels_last=False).train, CPU)


def test_deepspeed_refuses_graphs() -> None:
    with pytest.raises(ConfigError, match=r"train\.cuda_graphs is not supported with engine\.name=deepspeed"):
        chosen = resolve({"train": {"steps": 8, "cuda_graphs": True}, "engine": {"name": "deepspeed"}})
        engines.build(networks.for_run(chosen, (1, 8, 8)), chosen, Ranks(0, 1, CPU), 8)


def test_an_engine_with_graphs_evaluates_every_row() -> None:
    class Graphs:
        equal_forward_calls, static_shapes = False, True

    plain = config({"dropout": 0.0})
    assert teacher_of(plain, Graphs()).every_row
    assert not teacher_of(plain).every_row


def test_on_a_cpu_the_network_is_called_directly() -> None:
    network = nn.Linear(3, 3)
    graphed, x = GraphedNetwork(network, copy_gradients=False), torch.randn(2, 3)
    assert torch.equal(graphed(x), network(x))
    graphed(x).sum().backward()
    assert network.weight.grad is not None


def test_a_network_that_cannot_be_captured_trains_without_graphs_unless_they_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ConfigError("train.cuda_graphs: the network cannot be captured")

    class OnGPU(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    monkeypatch.setattr("udddm.backends.engines.graphs._Captured", fail)
    network, x = nn.Linear(3, 3), torch.randn(2, 3).as_subclass(OnGPU)
    graphed = GraphedNetwork(network, copy_gradients=False, required=False)
    assert torch.equal(graphed(x), network(x)) and torch.equal(graphed(x), network(x))
    assert caplog.text.count("training goes on without CUDA graphs") == 1
    with pytest.raises(ConfigError, match="cannot be captured"):
        GraphedNetwork(network, copy_gradients=False)(x)


def test_aliases_have_the_memory_of_the_parameters_and_nodes_of_their_own() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    network[2].weight = network[0].weight  # tied
    parameters, x = list(network.parameters()), torch.randn(2, 3)
    wanted, before = network(x), dict(network.named_parameters())
    with aliased(network, parameters) as leaves:
        assert [a.data_ptr() for a in leaves] == [p.data_ptr() for p in parameters]
        assert network[0].weight is network[2].weight and not any(a is p for a in leaves for p in parameters)
        found = network(x)
        gradients = torch.autograd.grad(found.sum(), leaves)
        _refuse_hidden(network(x), parameters)
    assert torch.equal(found, wanted)
    assert all(p is before[name] for name, p in network.named_parameters())
    for gradient, expected in zip(gradients, torch.autograd.grad(wanted.sum(), parameters), strict=True):
        assert torch.equal(gradient, expected)


def test_parameters_that_are_not_attributes_are_refused() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.alias = [self.weight]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.alias[0]

    network = Hidden()
    parameters = list(network.parameters())
    with aliased(network, parameters), pytest.raises(ConfigError, match="1 parameters that are not attributes"):
        _refuse_hidden(network(torch.ones(2, 3)), parameters)
