"""Settings of PyTorch's kernels that affect speed and rounding: TF32 and deterministic algorithms."""

from __future__ import annotations

import os

import torch

from udddm.config import TrainConfig


def configure(config: TrainConfig) -> None:
    """Apply `train.tf32` and `train.deterministic` to this process. Call it before the first kernel runs.

    Deterministic algorithms are set as in PyTorch's notes on reproducibility. An operation without one raises a
    RuntimeError that names it. On a CPU, the kernels used here are deterministic with either setting.
    """
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.backends.cudnn.allow_tf32 = config.tf32
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is initialized
        # By default every new tensor would be filled with NaN.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic
