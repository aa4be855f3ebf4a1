"""CUDA graphs of a network's forward and backward pass, for `train.cuda_graphs`.

A step of a small network, or of a small batch, takes as long as the host needs to launch its thousands of kernels. A
graph launches all of them at once (https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
`torch.cuda.make_graphed_callables` does the same, but captures in a mode in which no other thread may use CUDA, as the
threads of the x0-state store do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from udddm.errors import ConfigError
from udddm.log import log
from udddm.networks.blocks import dropout_layers

WARM_UP = 3
"""Passes before a capture, in which libraries choose algorithms and allocate workspaces."""
MOST = 8
"""Combinations of shapes that are captured. A run has one or two; others run without a graph."""

Inputs = tuple[torch.Tensor | None, ...]


class GraphedNetwork(nn.Module):
    """Calls `network` through CUDA graphs, one pair for each combination of input shapes.

    Inputs are tensors or None, without gradients, and the output is one tensor. Calls with and without gradients share
    a graph. The output, and with `copy_gradients=False` the gradients of parameters, are valid until the next call.

    With `required=False`, a network that cannot be captured is called as it is, with a warning.

    The network may neither wait for the device nor choose its operations by values. Dropout draws new numbers in every
    call, from the state of torch's generator. Its probability is a constant of a graph: when that of any layer changes,
    all graphs are released, and new ones are captured.
    """

    def __init__(self, network: nn.Module, *, copy_gradients: bool, required: bool = True):
        super().__init__()
        self.network, self._copy_gradients, self._required = network, copy_gradients, required
        self._possible = True
        self._captured: dict[tuple[object, ...], _Captured] = {}
        self._dropout = dropout_layers(network)
        self._probabilities = [layer.p for layer in self._dropout]

    def forward(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        captured = self._graph(inputs)
        if captured is None:
            found: torch.Tensor = self.network(*inputs)
            return found
        given = [value for value in inputs if value is not None]
        output: torch.Tensor = _Replay.apply(captured, len(given), *given, *captured.parameters)  # type: ignore[no-untyped-call]
        return output

    def _graph(self, inputs: Inputs) -> _Captured | None:
        if not self._possible or not inputs or not all(value is None or value.is_cuda for value in inputs):
            return None
        probabilities = [layer.p for layer in self._dropout]
        if probabilities != self._probabilities:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the last replay may not be finished
            self._captured.clear()
            self._probabilities = probabilities
        key = (
            self.training,
            torch.is_autocast_enabled("cuda"),
            *(None if value is None else (value.shape, value.dtype) for value in inputs),
        )
        if key not in self._captured:
            if len(self._captured) == MOST:
                return None
            try:
                self._captured[key] = _Captured(self.network, inputs, self._copy_gradients)
            except ConfigError as error:
                if self._required:
                    raise
                self._possible = False
                log.warning(f"training goes on without CUDA graphs, more slowly: {error}")
                return None
        return self._captured[key]


@contextmanager
def aliased(network: nn.Module, parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Put other parameters with the same memory into `network`, and yield them in the order of `parameters`.

    The node that adds up the gradients of a parameter remembers the stream on which it was made. DDP keeps those nodes,
    whose stream is not the one of the capture, which would fail.
    """
    others = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in parameters}
    places = [
        (module, name, p)
        for module in network.modules()
        for name, p in module._parameters.items()
        if p is not None and id(p) in others
    ]
    for module, name, p in places:
        module._parameters[name] = others[id(p)]
    try:
        yield [others[id(p)] for p in parameters]
    finally:
        for module, name, p in places:
            module._parameters[name] = p


class _Captured:
    """A forward and a backward pass, with the memory of their inputs and outputs."""

    def __init__(self, network: nn.Module, inputs: Inputs, copy_gradients: bool):
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.copy_gradients = copy_gradients
        static = [None if value is None else value.detach().clone() for value in inputs]
        self.inputs = [value for value in static if value is not None]
        device = self.inputs[0].device
        kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        # Casts of weights that autocast keeps would not be part of the graph.
        autocast = torch.autocast("cuda", kind or torch.float16, enabled=kind is not None, cache_enabled=False)

        def forward() -> torch.Tensor:
            with torch.enable_grad(), autocast:
                found: torch.Tensor = network(*static)
                return found

        def backward(output: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor | None]:
            return list(torch.autograd.grad(output, leaves, gradient, allow_unused=True))

        with torch.random.fork_rng(devices=[device]), aliased(network, self.parameters) as leaves:
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    output = forward()
                    backward(output, torch.zeros_like(output))
                _refuse_hidden(forward(), self.parameters)
            torch.cuda.current_stream(device).wait_stream(stream)
            del output
            self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.forward, capture_error_mode="thread_local"):
                    output = forward()
                self.gradient = torch.zeros_like(output)
                with torch.cuda.graph(self.backward, pool=self.forward.pool(), capture_error_mode="thread_local"):
                    self.gradients = backward(output, self.gradient)
            except torch.OutOfMemoryError:  # reported as that of any other step
                raise
            except RuntimeError as error:
                reason = str(error).strip().partition("\n")[0]
                raise ConfigError(
                    f"train.cuda_graphs: the network cannot be captured ({reason}); it must not wait for the device. "
                    "Set train.cuda_graphs=false"
                ) from error
        self.output = output.detach()


def _refuse_hidden(output: torch.Tensor, parameters: list[nn.Parameter]) -> None:
    """Raise ConfigError if `output` depends on parameters that `aliased` did not find: they would have no gradient."""
    found = torch.autograd.grad(output, parameters, torch.zeros_like(output), allow_unused=True)
    if hidden := sum(gradient is not None for gradient in found):
        raise ConfigError(
            f"train.cuda_graphs: the network uses {hidden} parameters that are not attributes of its modules; set "
            "train.cuda_graphs=false"
        )


class _Replay(torch.autograd.Function):
    """A pass of the network, as one operation with all parameters as inputs."""

    @staticmethod
    def forward(ctx: Any, captured: _Captured, count: int, *given: torch.Tensor) -> torch.Tensor:
        ctx.captured, ctx.count = captured, count
        for static, value in zip(captured.inputs, given, strict=False):
            static.copy_(value)
        captured.forward.replay()
        return captured.output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        captured = ctx.captured
        captured.gradient.copy_(gradient)
        captured.backward.replay()
        found = captured.gradients
        if captured.copy_gradients:
            present = [g for g in found if g is not None]
            copies = iter(torch._foreach_mul(present, 1.0))
            found = [None if g is None else next(copies) for g in found]
        else:
            found = [None if g is None else g.detach() for g in found]
        return (None, None, *[None] * ctx.count, *found)
