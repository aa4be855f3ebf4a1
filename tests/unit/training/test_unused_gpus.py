"""A run that leaves GPUs of its machine unused says how to use them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from udddm.training.rank import unused_gpus


@pytest.mark.parametrize(
    ("device", "ranks", "here", "expected"),
    [
        ("cuda", 1, 2, ["2 GPUs here, 1 used: --workers 2 uses all of them"]),
        ("cuda", 1, 8, ["8 GPUs here, 1 used: --workers 8 uses all of them"]),
        ("cuda", 1, 1, []),
        ("cuda", 2, 4, []),
        ("cpu", 1, 2, []),
    ],
)
def test_the_number_of_gpus_is_told(
    device: str, ranks: int, here: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    one: Any = SimpleNamespace(device=torch.device(device), world_size=ranks)
    assert unused_gpus(one) == expected
