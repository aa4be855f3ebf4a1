"""Variables of the environment that are empty or end with a newline, as in secrets of Kubernetes."""

from __future__ import annotations

import os
from typing import Any

import pytest

from udddm.errors import StoreError
from udddm.storage import open_object_store
from udddm.storage.base import Retry

pytest.importorskip("obstore")


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:9", "ACCESS_KEY_ID": "KEY", "SECRET_ACCESS_KEY": "S"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    return monkeypatch


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://bucket/x", "AWS_ACCESS_KEY_ID"),
        ("s3://bucket/x", "AWS_SESSION_TOKEN"),
        ("s3://bucket/x", "AWS_REGION"),
        ("az://bucket/x", "AZURE_STORAGE_ACCOUNT_KEY"),
    ],
)
@pytest.mark.parametrize("value", ["hidden\n", " hidden", "hid\tden"])
def test_a_variable_with_a_newline_is_named_and_not_shown(
    url: str, name: str, value: str, variables: pytest.MonkeyPatch
) -> None:
    variables.setenv(name, value)
    with pytest.raises(StoreError, match=f"the environment variable {name} begins or ends with") as raised:
        open_object_store(url)
    assert "hid" not in str(raised.value)


def test_an_empty_variable_counts_as_unset(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("AWS_ENDPOINT_URL_S3", "")
    variables.setenv("AWS_SESSION_TOKEN", " ")
    objects = open_object_store("s3://bucket/x")
    objects.retry = Retry(attempts=1)
    with pytest.raises(StoreError, match="the server refuses connections"):
        objects.get("a")


def test_a_panic_of_the_client_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def get(*arguments: Any) -> None:
        raise PanicException("called `Result::unwrap()` on an `Err` value: KEY")

    objects = open_object_store("s3://bucket/x")
    monkeypatch.setattr(objects._obstore, "get", get)  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match=r"the request could not be made\. Checkpoints are intact") as raised:
        objects.get("a")
    assert "KEY" not in str(raised.value)
