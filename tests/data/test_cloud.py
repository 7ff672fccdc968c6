"""Google Cloud Storage, played by a stand-in with the calls that its library has: there is no server for it here.
S3 is tested with the sources, against a real server, but for what that never refuses."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError
from google.api_core.exceptions import Forbidden, NotFound
from google.auth.exceptions import DefaultCredentialsError

from data import cloud, storage
from model.errors import UserError

OBJECTS = {"music/a.wav": b"0123456789", "music/sub/b.wav": b"abc", "other/c.wav": b""}


class Blob:
    def __init__(self, name: str) -> None:
        self.name, self.size, self.etag = name, len(OBJECTS.get(name, b"")), f"tag of {name}"

    def download_to_file(self, file: Any, start: int | None = None, end: int | None = None) -> None:
        if self.name not in OBJECTS:
            raise NotFound("no")
        file.write(OBJECTS[self.name][start or 0 : None if end is None else end + 1])


class Client:
    def list_blobs(self, bucket: str, prefix: str) -> Any:
        if bucket != "here":
            raise Forbidden("no")
        return (Blob(name) for name in OBJECTS if name.startswith(prefix))

    def bucket(self, name: str) -> Any:
        return SimpleNamespace(blob=Blob)


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud, "_client", lambda scheme, settings: Client())


def test_listing_and_reading() -> None:
    entries = storage.files_below("gs://here/music/")
    assert [(entry.name, entry.size) for entry in entries] == [("a.wav", 10), ("sub/b.wav", 3)]
    assert storage.read_bytes(entries[0].location) == b"0123456789"
    assert storage.read_bytes(storage.stretch("gs://here/music/sub/b.wav", 1, 2)) == b"bc"
    assert storage.is_folder("gs://here/music")
    assert not storage.is_folder("gs://here/mus")


def test_faults_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        cloud.fetch("gs://here/none.wav", io.BytesIO())
    with pytest.raises(UserError, match="gs://nowhere/ cannot be listed: access is refused; check the Google credent"):
        storage.files_below("gs://nowhere/")

    def none(scheme: str, settings: Any) -> Any:
        raise DefaultCredentialsError("none found")

    monkeypatch.setattr(cloud, "_client", none)
    with pytest.raises(UserError, match=r"none found\. Check the Google credentials"):
        storage.files_below("gs://here/")


def test_keys_that_s3_refuses_are_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ClientError({"Error": {"Code": "InvalidAccessKeyId"}}, "ListObjectsV2")

    monkeypatch.setattr(cloud, "_client", lambda scheme, settings: SimpleNamespace(get_paginator=refuse))
    with pytest.raises(
        UserError, match=r"access is refused \(InvalidAccessKeyId\); check the AWS credentials"
    ) as error:
        storage.files_below("s3://here/music")
    assert "\n" not in str(error.value)
