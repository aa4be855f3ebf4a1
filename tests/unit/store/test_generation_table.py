"""The table of generations: deleting old ones beside a background thread that is finishing one of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from udddm.config import OrderConfig
from udddm.order import Order
from udddm.storage import open_object_store
from udddm.store import Encoding
from udddm.store.generations import Generations
from udddm.store.zarr import GenerationTable


def test_a_generation_that_is_being_finished_keeps_its_checksums(tmp_path: Path) -> None:
    """The next epoch may begin after `finish` has found that the generation is needed, and before it reads them."""
    order = Order.build(OrderConfig(lanes=1, chunk=4, window=1), 0, 8, 4, (1, 2, 2))
    generations = Generations(open_object_store(str(tmp_path)), order, (1, 2, 2), Encoding("fp32"), compression="none")
    table = GenerationTable(generations, range(1), "")
    for chunk in range(2):
        table.save(1, 0, chunk, np.ones((4, 1, 2, 2), np.float32))
    with table._writing(1) as needed:
        table.discard_before(2)
        assert needed and set(table.written(1)[0]) == {0, 1}
    table.discard_before(2)
    assert table.written(1) == {0: {}} and not table.generations.existing()
