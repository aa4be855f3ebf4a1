"""TF32 and deterministic algorithms, as far as they can be tested on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import sys, udddm, torch
config = udddm.load_config(None, [
    "network={base_channels: 4, channel_mult: [1], blocks_per_level: 1, attention_resolutions: [8], dropout: 0.1}",
    "train={steps: 6, batch_size: 64, torch_threads: 1, ema: [0.9], grad_clip: 1.0}", "objective.name=ect",
    "sample={every_steps: 0, final: 0}", *sys.argv[2:]])
result = udddm.train(config, run_dir=sys.argv[1], device="cpu")
print(torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic,
      torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
print(result.weights_sha256, result.ema_sha256, result.state_sha256)
"""


def run(directory: Path, *settings: str) -> list[str]:
    """Runs in a separate process, because the settings are global to PyTorch."""
    command = [sys.executable, "-c", RUN, str(directory), *settings]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return found.stdout.strip().splitlines()


@pytest.mark.slow
def test_deterministic_algorithms_train_with_the_same_bits_on_a_cpu(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    deterministic = run(tmp_path / "deterministic", "train.deterministic=true", "train.tf32=false")
    assert plain[0] == "False False True True" and deterministic[0] == "True True False False"
    assert plain[1] == deterministic[1]
