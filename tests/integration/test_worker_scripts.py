"""Scripts that cannot start workers end with one error that describes the fix."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import numpy as np, udddm

class Data:
    def __init__(self, change=None):
        self.change = change
    def __len__(self):
        return 64
    def __getitem__(self, index):
        return np.zeros((3, 8, 8), np.uint8)

def run(dataset, workers=2, run_dir="run"):
    network = {"base_channels": 8, "channel_mult": [1], "blocks_per_level": 1, "attention_resolutions": []}
    config = {"network": network, "train": {"steps": 1, "batch_size": 8}}
    udddm.train(config, dataset=dataset, run_dir=run_dir, workers=workers, max_failures=workers - 1, device="cpu")

"""
GUARDED = 'if __name__ == "__main__":\n    run(Data())'
ONLY_ONCE = "import os\nos.mkdir('only-once')\n"


@pytest.mark.parametrize(
    ("call", "stdin", "message"),
    [
        ("run(Data())", False, 'move the call under `if __name__ == "__main__":`'),
        (
            "run(Data(), workers=1, run_dir='one')\nrun(Data())",
            False,
            'move the call under `if __name__ == "__main__":`',
        ),
        (ONLY_ONCE + GUARDED, False, "exited with code 1 while it imported the script"),
        ('if __name__ == "__main__":\n    run(Data(lambda x: x))', False, "the data set cannot be sent to a worker"),
        (GUARDED, True, "save the program as a script"),
    ],
    ids=["no guard", "no guard, one worker first", "an error at import", "lambda", "stdin"],
)
def test_a_script_that_cannot_start_workers_ends_with_one_error(
    tmp_path: Path, call: str, stdin: bool, message: str
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT + call + "\n")
    done = subprocess.run(
        [sys.executable, "-" if stdin else "script.py"],
        input=SCRIPT + call + "\n" if stdin else None,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert done.stderr.count("Traceback") == (1 if "only-once" not in call else 3)  # the workers' own
    assert "restarting" not in done.stderr
    assert not (tmp_path / "run" / "run.json").exists()
