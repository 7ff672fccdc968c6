"""The one seam to cloud storage: what a bucket holds, and its bytes. Keys and profiles come from the environment.

S3 through boto3 (AWS_ENDPOINT_URL and the other variables it knows), Google Cloud Storage through its own library, both
by the clients of cloudpathlib. These are imported when a first bucket is used: the command line stays quick.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
from collections.abc import Iterator
from typing import IO, Any

from model.errors import UserError

SCHEMES = ("s3://", "gs://")
AWS = "the AWS credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE) and AWS_ENDPOINT_URL"
GOOGLE = "the Google credentials (GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`)"
MISSING = ("404", "NoSuchKey")
REFUSED = ("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")


def is_remote(location: str) -> bool:
    """Whether `location` is an address in cloud storage."""
    return location.startswith(SCHEMES)


def objects(prefix: str) -> Iterator[tuple[str, int, str]]:
    """Address, bytes and tag (changes with the content) of every object whose address begins with `prefix`.

    Raises UserError when the bucket is missing, or cannot be listed with these credentials.
    """
    with _plain(prefix):
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

    Raises FileNotFoundError or PermissionError for this one object, and UserError for a bucket that is missing or
    cannot be reached.
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


def _opened(url: str) -> tuple[Any, str, str]:
    """The library's own client, the bucket and the key of an address."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    settings = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "GOOGLE_APPLICATION_CREDENTIALS")
    return _client(scheme, tuple(map(os.environ.get, settings))), bucket, key


@functools.lru_cache
def _client(scheme: str, _settings: tuple[str | None, ...]) -> Any:
    """A client for what the environment says now."""
    import cloudpathlib

    return (cloudpathlib.GSClient() if scheme == "gs" else cloudpathlib.S3Client()).client


os.register_at_fork(after_in_child=_client.cache_clear)  # connections are not to be shared with the parent


def _plain(url: str) -> contextlib.AbstractContextManager[None]:
    """Tells one object's faults, which are OSErrors, from those of the bucket, the credentials or the network."""
    return _plain_gs(url) if url.startswith("gs://") else _plain_s3(url)


@contextlib.contextmanager
def _plain_s3(url: str) -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in MISSING:
            raise FileNotFoundError(errno.ENOENT, "no such object", url) from None
        if code in REFUSED:
            raise PermissionError(errno.EACCES, f"access is refused ({code}); check {AWS}", url) from None
        what = f"there is no bucket {url.split('/')[2]}" if code == "NoSuchBucket" else str(error)
        raise UserError(f"{url} cannot be read: {what}. Check its name and {AWS}.") from None
    except (BotoCoreError, Boto3Error) as error:
        raise UserError(f"{url} cannot be read: {error}. Check {AWS}.") from None


@contextlib.contextmanager
def _plain_gs(url: str) -> Iterator[None]:
    from google.api_core.exceptions import Forbidden, GoogleAPICallError, NotFound, Unauthorized
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except NotFound:
        raise FileNotFoundError(errno.ENOENT, "no such object or bucket", url) from None
    except (Forbidden, Unauthorized):
        raise PermissionError(errno.EACCES, f"access is refused; check {GOOGLE}", url) from None
    except (GoogleAPICallError, GoogleAuthError) as error:
        raise UserError(f"{url} cannot be read: {error}. Check {GOOGLE}.") from None
