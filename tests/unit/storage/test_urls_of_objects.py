"""URLs and environments that obstore would panic at, or whose mistake it does not name."""

import os

import pytest

from udddm.errors import StoreError
from udddm.storage import open_object_store

NAMES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    for name in NAMES:
        monkeypatch.setenv(name, "http://127.0.0.1:9" if "URL" in name else "x")


@pytest.mark.parametrize("url", ["s3://bucket/x/../y", "s3://bucket/a//b", "gs://bucket/./a"])
def test_parts_that_no_key_can_have_are_named(url: str) -> None:
    with pytest.raises(StoreError, match=r"leave out empty parts \(//\), \. and \.\.") as raised:
        open_object_store(url)
    assert url in str(raised.value) and "AWS_" not in str(raised.value)


@pytest.mark.parametrize(("url", "what"), [("s3://bucket/a#1", "part after #"), ("s3://bucket/a?b", "query")])
def test_what_is_not_allowed_in_a_url_is_named(url: str, what: str) -> None:
    with pytest.raises(StoreError, match=rf"remove the {what} from the URL"):
        open_object_store(url)


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"])
@pytest.mark.parametrize("value", ["KEY\n", " KEY", "K\x00EY".replace("\x00", "\x01")])
def test_a_variable_with_a_line_break_is_named_without_its_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=f"the environment variable {name} ") as raised:
        open_object_store("s3://bucket/run")
    assert "KEY\n" not in str(raised.value)


def test_a_variable_that_is_set_to_nothing_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "")
    objects = open_object_store("s3://bucket/run")
    assert "AWS_ENDPOINT_URL_S3" not in os.environ
    assert objects.uri("") == "s3://bucket/run"


@pytest.mark.parametrize(("alias", "scheme"), [("s3a", "s3"), ("s3n", "s3"), ("S3", "s3"), ("gcs", "gs")])
def test_other_names_of_a_scheme_are_the_same_store(alias: str, scheme: str) -> None:
    """Compared by its URL, the store of a run would otherwise be another one."""
    assert open_object_store(f"{alias}://bucket/run").uri("state") == f"{scheme}://bucket/run/state"
