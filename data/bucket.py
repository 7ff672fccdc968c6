"""Small files and listings of an S3 bucket. The usual environment says where and as whom: AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_PROFILE and so on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from urllib.parse import urlparse

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from model.errors import UserError

SETTINGS = Config(connect_timeout=10, read_timeout=60, retries={"mode": "standard", "max_attempts": 3})
MISSING = {"NoSuchKey", "404"}
FAILURES = (BotoCoreError, Boto3Error, ClientError)
"""What boto3 raises where a bucket does not do what it is asked for."""


def read(address: str) -> bytes | None:
    """The contents of `s3://bucket/key`; None where there is no such object.

    Raises UserError where the bucket or the credentials are wrong, or it does not answer.
    """
    bucket, key = _parts(address)
    with _plain_errors(address):
        client = boto3.client("s3", config=SETTINGS)
        try:
            return client.get_object(Bucket=bucket, Key=key)["Body"].read()
        except ClientError as error:
            if error.response["Error"]["Code"] in MISSING:
                return None
            raise


def sizes(address: str) -> dict[str, int]:
    """Name → bytes of the objects right below the prefix `s3://bucket/prefix`. Raises UserError as `read` does."""
    bucket, prefix = _parts(address)
    with _plain_errors(address):
        pages = boto3.client("s3", config=SETTINGS).get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=bucket, Prefix=f"{prefix}/", Delimiter="/")
        entries = [entry for page in found for entry in page.get("Contents", [])]
    return {entry["Key"].removeprefix(f"{prefix}/"): entry["Size"] for entry in entries}


def _parts(address: str) -> tuple[str, str]:
    parsed = urlparse(address)
    return parsed.netloc, parsed.path.strip("/")


@contextlib.contextmanager
def _plain_errors(address: str) -> Iterator[None]:
    try:
        yield
    except (*FAILURES, ValueError) as error:  # ValueError: of AWS_ENDPOINT_URL or the region
        raise UserError(f"{address} cannot be read: {error}") from None
