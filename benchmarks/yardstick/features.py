"""The yardstick's feature spaces for udddm-evaluate: PYTHONPATH=benchmarks/yardstick, --features features:digits."""

from functools import cache

import torch
import yardstick
from safetensors.torch import load_file


@cache
def _network(name: str, size: int, device: torch.device) -> yardstick.Classifier:
    network = yardstick.Classifier(size)
    network.load_state_dict(load_file(yardstick.HERE / f"{name}.safetensors"))
    return network.to(device).eval()


def digits(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, 1, 8, 8] -> features [B, 64], logits [B, 10]."""
    network = _network("digits", 8, images.device)
    features = network.features(images)
    return features, network.head(features)


def fashion_mnist(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, 1, 28, 28] -> features [B, 64], logits [B, 10]."""
    network = _network("fashion-mnist", 28, images.device)
    features = network.features(images)
    return features, network.head(features)
