"""Temporal ensembling (Laine & Aila 2017, arXiv 1610.02242) on 8x8 digits with ten labels per class.

    python examples/per_sample/temporal_ensembling.py --store zarr --url runs/digits/state --run runs/digits

The method keeps an exponential average of the network's predictions for every training sample, with and without label,
as the target of a consistency loss. Here that average is a `udddm.PerSampleState`; the rest is an ordinary PyTorch
loop. The same command continues after a crash, and ends with the same weights as without one. `--weight 0` trains on
the labels alone.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import udddm
from udddm.data.sources import digits

TEST = 397  # of 1,797 digits
MOMENTUM = 0.6  # the paper's alpha
RAMP = 0.4  # the part of training in which the weight of the consistency loss grows


def load_digits(labels_per_class: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images float32 [1797, 1, 8, 8] in [-1, 1], classes [1797], and whether a label is used; the test set is last."""
    source = digits()
    images = torch.stack([torch.as_tensor(source[i][0]) for i in range(len(source))])
    classes = torch.as_tensor([int(source[i][1]) for i in range(len(source))])
    train = len(images) - TEST
    order = torch.randperm(train, generator=torch.Generator().manual_seed(seed))
    known = torch.zeros(len(images), dtype=torch.bool)
    for label in range(10):
        known[order[classes[order] == label][:labels_per_class]] = True
    return images, classes, known


def network() -> nn.Module:
    """A small convolutional network with the dropout that makes two predictions of one image differ."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(32, 32, 3, padding=1), nn.LeakyReLU(0.1)),
        *(nn.MaxPool2d(2), nn.Dropout(0.5), nn.Conv2d(32, 64, 3, padding=1), nn.LeakyReLU(0.1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 10)),
    )


def losses(logits: Tensor, classes: Tensor, known: Tensor, target: Tensor, weight: float) -> Tensor:
    """Cross-entropy of the samples with labels, plus the squared distance of all to their targets (Algorithm 1)."""
    supervised = F.cross_entropy(logits[known], classes[known], reduction="sum") / len(logits)
    return supervised + weight * F.mse_loss(logits.softmax(1), target)


def ramp(progress: float) -> float:
    """The paper's ramp-up of the consistency loss, 0 to 1 over the first part of training."""
    return math.exp(-5 * (1 - min(progress / RAMP, 1)) ** 2) if progress > 0 else 0.0


def train(arguments: argparse.Namespace) -> float:
    """Train, or continue, and return the accuracy on the test set."""
    images, classes, known = load_digits(arguments.labels, arguments.seed)
    samples = len(images) - TEST
    fraction = float(known.sum()) / samples
    torch.manual_seed(arguments.seed)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    data = TensorDataset(torch.arange(samples), images[:samples], classes[:samples], known[:samples])
    state = udddm.PerSampleState(
        {"ensemble": ((10,), torch.float32)}, samples=samples, batch_size=100, store=arguments.store, url=arguments.url
    )

    def save(directory: Path) -> None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, directory / "loop.pt")

    with state:
        if (found := state.resume(arguments.run)) is not None:
            saved = torch.load(found / "loop.pt", weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        loader = DataLoader(data, batch_sampler=state.batch_sampler)
        while state.epoch < arguments.epochs:
            weight = arguments.weight * fraction * ramp(state.epoch / arguments.epochs)
            for ids, x, y, labeled in loader:
                torch.manual_seed(state.epoch * state.steps_per_epoch + state.step)  # dropout and noise, also resumed
                ensemble = state.read(ids)["ensemble"]
                target = ensemble / (1 - MOMENTUM ** max(state.epoch, 1))  # corrects the start from zeros
                logits = model(x + 0.15 * torch.randn_like(x))
                loss = losses(logits, y, labeled, target, weight)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                state.write(ensemble=MOMENTUM * ensemble + (1 - MOMENTUM) * logits.softmax(1))
            if state.epoch % arguments.every == 0 or state.epoch == arguments.epochs:
                state.snapshot(arguments.run, save)
    model.eval()
    with torch.no_grad():
        right = model(images[samples:]).argmax(1) == classes[samples:]
    return float(right.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Temporal ensembling on the digits.")
    parser.add_argument("--run", default="runs/temporal-ensembling", help="directory of the snapshots")
    parser.add_argument("--store", default="pinned", help="gpu, pinned or zarr")
    parser.add_argument("--url", help="location of a zarr store")
    for name, default in (("labels", 10), ("epochs", 60), ("every", 5), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--weight", type=float, default=30.0, help="maximum of the consistency loss")
    print(f"{train(parser.parse_args()):.4f}")


if __name__ == "__main__":
    main()
