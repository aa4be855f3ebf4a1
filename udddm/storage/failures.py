"""Classifies failed requests to an object store: retry, or stop with a remedy.

Throttling, server errors, timeouts and broken connections become `OSError` and are retried. Missing permissions,
expired credentials, a missing bucket and the like become `PermanentStorageError`. The messages are built here from the
status and error code of a reply. Those of the libraries repeat entire replies, in which S3 returns the sender's key id
and the signed text.
"""

from __future__ import annotations

import os
import re

from udddm.storage.base import PermanentStorageError

_RIGHTS = "allow these credentials to read, write, delete and list objects there"
_REGION = "set AWS_REGION to the bucket's region and check AWS_ENDPOINT_URL"
_BUCKET = "create the bucket or correct store.url"
_RENEW = "renew the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN)"
_REMEDIES = {  # S3 error code: (what it is, what to do)
    "AccessDenied": ("access is denied", _RIGHTS),
    "ExpiredToken": ("the credentials have expired", _RENEW),
    "TokenRefreshRequired": ("the credentials have expired", _RENEW),
    "InvalidToken": ("the session token is not valid", _RENEW),
    "InvalidAccessKeyId": ("the server does not know the access key", "check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL"),
    "SignatureDoesNotMatch": ("the signature does not match", "check AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"),
    "RequestTimeTooSkewed": ("this machine's clock is wrong", "set the clock"),
    "NoSuchBucket": ("the bucket does not exist", _BUCKET),
    "InvalidBucketName": ("the bucket's name is not valid", _BUCKET),
    "PermanentRedirect": ("the bucket is in another region", _REGION),
    "AuthorizationHeaderMalformed": ("the bucket is in another region", _REGION),
}
_TRANSIENT_CODES = {"RequestTimeout", "SlowDown", "Throttling", "OperationAborted", "ConditionalRequestConflict"} | {
    "BadDigest",  # damaged in transit: the next attempt sends the same bytes again
    "IncompleteBody",
    "XAmzContentSHA256Mismatch",
}
_TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504, 507}
_BROKEN = (  # a part of obstore's error description, and its meaning
    ("TimedOut", "no answer in time"),
    ("ConnectionRefused", "the server refuses connections"),
    ("dns error", "the server's name cannot be resolved"),
    ("IncompleteBody", "the reply was cut"),
    ("IncompleteMessage", "the connection was closed before the reply"),
    ("ConnectionReset", "the connection was reset"),
    ("Connect", "no connection to the server"),
)

_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")


def of_obstore(error: Exception, *, answered: bool) -> Exception:
    """FileNotFoundError, OSError or PermanentStorageError for an error of obstore.

    `answered`: an earlier request has succeeded.
    """
    text = str(error)
    head = text.partition("Debug source")[0]
    status = re.search(r"non-2xx status code: (\d{3})", head)
    code = re.search(r"<Code>([A-Za-z0-9.]{1,64})</Code>", head)
    name = code[1] if code else ""
    if "/latest/api/token" in head or "/latest/meta-data" in head:  # where obstore requests a role's credentials
        if answered:
            return OSError("this machine's role gave no new credentials")
        return PermanentStorageError(
            "there are no credentials in the environment, and this machine has no role",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    if "/computeMetadata/" in head or "/metadata/identity" in head:  # the same for Google and Azure
        if answered:
            return OSError("this machine's role gave no new credentials")
        return PermanentStorageError(
            "there are no credentials in the environment, and this machine has no role",
            "set GOOGLE_APPLICATION_CREDENTIALS, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
        )
    if isinstance(error, FileNotFoundError) and name != "NoSuchBucket":
        return FileNotFoundError("no such object")
    if status or name:
        return refusal(int(status[1]) if status else None, name)
    if "redirect without LOCATION" in text:
        return refusal(301, "PermanentRedirect")
    for mark, meaning in _BROKEN:
        if mark in text:
            return OSError(meaning + _proxy())
    if isinstance(error, ValueError):
        return PermanentStorageError("it is not a valid object name", "correct store.url")
    return OSError(f"the request failed ({type(error).__name__})")


def _proxy() -> str:
    """A hint if requests may go through a proxy, whose failures look like those of the server."""
    set_to = [name for name in _PROXIES if os.environ.get(name) or os.environ.get(name.lower())]
    return f" (through the proxy of {set_to[0]}; unset it, or add the server to NO_PROXY)" if set_to else ""


def of_fsspec(error: Exception) -> Exception:
    """FileNotFoundError, OSError or PermanentStorageError for an error of an fsspec file system."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError("no such object")
    status = next((s for n in ("status", "code", "status_code") if isinstance(s := getattr(error, n, None), int)), None)
    name = type(error).__name__
    if isinstance(error, PermissionError) or status in (401, 403) or "Credential" in name or "Auth" in name:
        return PermanentStorageError(f"access is denied ({name})", "give this machine's credentials access to it")
    if isinstance(error, NotImplementedError | TypeError | ValueError | AttributeError | LookupError):
        return PermanentStorageError(f"the file system does not support it ({name})", "use another store.url")
    if status is not None and 400 <= status < 500 and status not in _TRANSIENT:
        return PermanentStorageError(f"the server answered {status}", "check store.url and the server")
    shown = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else name
    return OSError(f"the request failed ({shown})")


def refusal(status: int | None, code: str) -> OSError | PermanentStorageError:
    """The error for a reply with this HTTP status and S3 error code ("" if unknown)."""
    shown = " ".join(str(part) for part in (status, code) if part)
    if code in _TRANSIENT_CODES or (status in _TRANSIENT and code not in _REMEDIES):
        return OSError(f"the server answered {shown}")
    if code in _REMEDIES:
        what, remedy = _REMEDIES[code]
        return PermanentStorageError(f"{what} ({shown})", remedy)
    if status in (401, 403):
        return PermanentStorageError(f"access is denied ({shown})", _RIGHTS)
    if status is not None and 300 <= status < 400:
        return PermanentStorageError(f"the server redirected the request ({shown})", _REGION)
    return PermanentStorageError(f"the server answered {shown}", "check store.url and the server")
