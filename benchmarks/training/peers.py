"""A network of the paper's size on a CPU next to diffusers' UNet2DModel with about as many parameters.

    pip install diffusers
    python benchmarks/training/peers.py --json benchmarks/results/peers.json

One forward and backward pass in float32, with the same images, noise levels, loss and dropout. Each network is in a
separate process, in the memory format in which runs have it (diffusers': both formats), and they take turns, so that
changes of the machine's speed affect all of them equally. Ratios of images/s are medians over rounds. The memory is the
largest resident size of the process, less its size before the network is built. GFLOP are those of a forward and a
backward pass of one image in convolutions, matrix products and attention.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from udddm import load_config, networks
from udddm.backends.engines import ddp

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu_steps.peers import diffusers_network
from gpu_steps.workloads import SMALLER, parameters
from report import about, heading, write_report

SHAPE = (3, 32, 32)
OURS, RECOMPUTED = "udddm", "udddm, train.recompute"
CHANNELS_FIRST, CHANNELS_LAST = "diffusers", "diffusers, channels last"
NETWORKS = (OURS, RECOMPUTED, CHANNELS_FIRST, CHANNELS_LAST)


def built(name: str, small: bool) -> nn.Module:
    """One of NETWORKS, with random weights."""
    config = load_config("cifar10", [f"train.recompute={name == RECOMPUTED}", *(SMALLER if small else ())])
    ours = name in (OURS, RECOMPUTED)
    network = networks.for_run(config, SHAPE) if ours else networks.outline(config.network, SHAPE)
    channels_last = ddp.channels_last(config.train, torch.device("cpu")) if ours else name == CHANNELS_LAST
    if not ours:
        other = diffusers_network(parameters(network), small, dropout=config.network.dropout)
        if isinstance(other, str):
            raise SystemExit(f"diffusers {other}")
        network = other
    if channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.train()


def resident() -> float:
    """The largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def serve(name: str, batch: int, small: bool, threads: int, pipe: Connection) -> None:
    """Answer each message with the seconds of one pass, and the last one (None) with what the process is."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    diffusers_network(1_000_000, small=True, dropout=0)  # what importing and first use take is not the network's memory
    before = resident()
    network: Any = built(name, small)
    x0, level = torch.rand(batch, *SHAPE) * 2 - 1, torch.rand(batch) * 2
    noisy = x0 + level[:, None, None, None] * torch.randn_like(x0)
    while pipe.recv() is not None:
        began = time.perf_counter()
        output = network(noisy, level)
        loss = (getattr(output, "sample", output) - x0).square().mean()
        loss.backward()
        network.zero_grad(set_to_none=True)
        del output, loss
        pipe.send(time.perf_counter() - began)
    taken = {"memory_mb": resident() - before, "process_mb": resident()}
    with FlopCounterMode(display=False) as counter:
        output = network(noisy[:1], level[:1])
        getattr(output, "sample", output).sum().backward()
    pipe.send({"parameters": parameters(network), "gflop": counter.get_total_flops() / 1e9, **taken})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true", help="small networks, for a test of this program")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    head = about("diffusers")
    lines = [heading(head), f"{arguments.threads} threads"]
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in NETWORKS:
        pipes[name], theirs = context.Pipe()
        given = (name, arguments.batch, arguments.small, arguments.threads, theirs)
        processes.append(context.Process(target=serve, args=given, daemon=True))
        processes[-1].start()
        theirs.close()  # a child that fails closes its end, and the next recv() raises EOFError
    seconds: dict[str, list[float]] = {name: [] for name in NETWORKS}
    for number in range(arguments.rounds + 1):
        for name, pipe in pipes.items():
            pipe.send("pass")
            spent = pipe.recv()
            if number:  # the first round is a warm-up
                seconds[name].append(spent)
    found = {}
    for name, pipe in pipes.items():
        pipe.send(None)
        found[name] = pipe.recv() | {"seconds": [round(value, 4) for value in seconds[name]]}
    for process in processes:
        process.join()
    rates = {name: arguments.batch / statistics.median(values) for name, values in seconds.items()}
    lines.append(f"{'':26}{'parameters':>12}{'GFLOP':>7}{'images/s':>10}{'MB':>6}   udddm over it: images/s, memory")
    for name, row in found.items():
        row["udddm_speed"] = statistics.median(b / a for a, b in zip(seconds[OURS], seconds[name], strict=True))
        row["udddm_memory"] = found[OURS]["memory_mb"] / row["memory_mb"]
        lines.append(
            f"{name:26}{row['parameters']:12,}{row['gflop']:7.1f}{rates[name]:10.2f}{row['memory_mb']:6.0f}"
            f"{row['udddm_speed']:25.3f}{row['udddm_memory']:8.3f}"
        )
    print("\n".join(lines))
    write_report(arguments.json, head, {"batch": arguments.batch, "networks": found}, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
