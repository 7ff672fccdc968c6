"""The one seam to cloud storage: what a bucket holds, and its bytes. Keys and profiles come from the environment.

S3 through boto3 (AWS_ENDPOINT_URL and the other variables it knows), Google Cloud Storage through its own library. They
are imported when a first bucket is used: the command line stays quick.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from model.errors import UserError

SCHEMES = ("s3://", "gs://")
AWS = "the AWS credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE) and AWS_ENDPOINT_URL"
GOOGLE = "the Google credentials (GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`)"
EMULATOR = "STORAGE_EMULATOR_HOST"
"""What Google's library calls the address of a server that stands in for theirs."""
MISSING = ("404", "NoSuchKey")
REFUSED = ("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")


class Unreachable(UserError):
    """The service or the network does not do what it is asked for, which may pass."""


def is_remote(location: str) -> bool:
    """Whether `location` is an address in cloud storage."""
    return location.startswith(SCHEMES)


def objects(prefix: str) -> Iterator[tuple[str, int, str]]:
    """Address, bytes and tag (changes with the content) of every object whose address begins with `prefix`.

    Raises UserError when the bucket is missing, or cannot be listed with these credentials, and Unreachable.
    """
    try:
        with _plain(prefix):
            yield from _listed(prefix)
    except OSError as error:
        raise UserError(f"{prefix} cannot be listed: {error.strerror}.") from None


def _listed(prefix: str) -> Iterator[tuple[str, int, str]]:
    client, bucket, key = _opened(prefix)
    if prefix.startswith("gs://"):
        for blob in client.list_blobs(bucket, prefix=key):
            yield f"gs://{bucket}/{blob.name}", blob.size, blob.etag
        return
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key):
        for entry in page.get("Contents", ()):
            yield f"s3://{bucket}/{entry['Key']}", entry["Size"], entry["ETag"]


def fetch(url: str, file: IO[bytes], offset: int = 0, size: int | None = None) -> None:
    """Writes an object, or `size` bytes of it from `offset` on, to `file`.

    Raises FileNotFoundError or PermissionError for this one object, UserError for a bucket that is missing or
    credentials that cannot be used, and Unreachable.
    """
    with _plain(url):
        client, bucket, key = _opened(url)
        if url.startswith("gs://"):
            end = None if size is None else offset + size - 1
            client.bucket(bucket).blob(key).download_to_file(file, start=offset or None, end=end)
        elif size is None:
            client.download_fileobj(bucket, key, file)
        else:
            stretch = f"bytes={offset}-{offset + size - 1}"
            shutil.copyfileobj(client.get_object(Bucket=bucket, Key=key, Range=stretch)["Body"], file)


def read(url: str) -> bytes:
    """The bytes of an object. Raises as `fetch` does."""
    content = io.BytesIO()
    fetch(url, content)
    return content.getvalue()


def store(path: Path, url: str, threads: bool = True) -> None:
    """Copies a local file to `url`, in place of what is there; without `threads` in this thread alone, which takes
    longer. Raises as `fetch` does."""
    with _plain(url):
        client, bucket, key = _opened(url)
        if url.startswith("gs://"):
            client.bucket(bucket).blob(key).upload_from_filename(str(path))
        else:
            from boto3.s3.transfer import TransferConfig

            client.upload_file(str(path), bucket, key, Config=TransferConfig(use_threads=threads))


def remove(url: str) -> None:
    """Removes an object, where there is one. Raises as `fetch` does."""
    with contextlib.suppress(FileNotFoundError), _plain(url):
        client, bucket, key = _opened(url)
        if url.startswith("gs://"):
            client.bucket(bucket).blob(key).delete()
        else:
            client.delete_object(Bucket=bucket, Key=key)


def _opened(url: str) -> tuple[Any, str, str]:
    """The library's own client, the bucket and the key of an address."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    settings = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "GOOGLE_APPLICATION_CREDENTIALS", EMULATOR)
    return _client(scheme, os.getpid(), tuple(map(os.environ.get, settings))), bucket, key


@functools.lru_cache
def _client(scheme: str, _process: int, _settings: tuple[str | None, ...]) -> Any:
    """A client for what the environment says now. Its connections are not for a fork of this process to use as well."""
    if scheme == "gs":
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud.storage import Client

        try:
            return Client(project=None)  # which only what makes buckets asks for
        except DefaultCredentialsError:
            if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
                raise
            return Client.create_anonymous_client()  # for public buckets
    import boto3
    from botocore.config import Config

    # A job must not wait for minutes to learn that the network is gone.
    retries = {"mode": "standard", "max_attempts": 3}
    try:  # boto3.client would go on with the credentials that it saw first
        return boto3.Session().client("s3", config=Config(connect_timeout=10, read_timeout=60, retries=retries))
    except ValueError as error:  # boto3's, of AWS_ENDPOINT_URL or the region
        raise UserError(f"S3 cannot be used: {error}. Check {AWS}.") from None


os.register_at_fork(after_in_child=_client.cache_clear)  # connections are not to be shared with the parent


def _plain(url: str) -> contextlib.AbstractContextManager[None]:
    """Tells one object's faults, which are OSErrors, from those of the bucket, the credentials or the network."""
    return _plain_gs(url) if url.startswith("gs://") else _plain_s3(url)


@contextlib.contextmanager
def _plain_s3(url: str) -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        ParamValidationError,
        PartialCredentialsError,
        ProfileNotFound,
    )

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in MISSING:
            raise FileNotFoundError(errno.ENOENT, "no such object", url) from None
        if code in REFUSED:
            raise PermissionError(errno.EACCES, f"access is refused ({code}); check {AWS}", url) from None
        if code == "NoSuchBucket":
            what = f"there is no bucket {url.split('/')[2]}"
            raise UserError(f"{url} cannot be used: {what}. Check its name and {AWS}.") from None
        raise Unreachable(f"{url} cannot be reached: {error}") from error
    except (NoCredentialsError, PartialCredentialsError, ProfileNotFound, ParamValidationError) as error:
        raise UserError(f"{url} cannot be used: {error}. Check {AWS}.") from None
    except (BotoCoreError, Boto3Error) as error:
        raise Unreachable(f"{url} cannot be reached: {error}. If that lasts, check {AWS}.") from error


@contextlib.contextmanager
def _plain_gs(url: str) -> Iterator[None]:
    from google.api_core.exceptions import Forbidden, GoogleAPICallError, NotFound, RetryError, Unauthorized
    from google.auth.exceptions import GoogleAuthError, TransportError
    from requests import RequestException

    try:
        yield
    except NotFound:
        raise FileNotFoundError(errno.ENOENT, "no such object or bucket", url) from None
    except (Forbidden, Unauthorized):
        raise PermissionError(errno.EACCES, f"access is refused; check {GOOGLE}", url) from None
    except (GoogleAPICallError, RetryError, TransportError, RequestException) as error:
        raise Unreachable(f"{url} cannot be reached: {error}. If that lasts, check {GOOGLE}.") from error
    except GoogleAuthError as error:
        raise UserError(f"{url} cannot be used: {error}. Check {GOOGLE}.") from None
