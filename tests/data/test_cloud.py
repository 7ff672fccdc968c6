"""The seam to cloud storage, by the libraries of both clouds against servers on the loopback."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError
from buckets import BUCKET, each_cloud, put
from google.api_core.exceptions import Forbidden
from helpers import free_port

from data import cloud, storage
from model.errors import UserError


@pytest.fixture
def music(bucket: str, tmp_path: Path) -> str:
    """A bucket with three objects."""
    contents = {"music/a b.wav": b"0123456789", "music/sub/\u00e9.wav": b"abc", "other/c.wav": b"c"}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    put(tmp_path, bucket)
    return bucket


@each_cloud
def test_listing_and_reading(music: str) -> None:
    entries = storage.files_below(f"{music}/music/")
    assert [(entry.name, entry.size) for entry in entries] == [("a b.wav", 10), ("sub/\u00e9.wav", 3)]
    assert storage.read_bytes(entries[0].location) == b"0123456789"
    assert storage.read_bytes(storage.stretch(entries[1].location, 1, 2)) == b"bc"
    assert storage.is_folder(f"{music}/music")
    assert not storage.is_folder(f"{music}/mus")


@each_cloud
def test_storing_and_removing(music: str, tmp_path: Path) -> None:
    path, url = tmp_path / "new", f"{music}/music/a b.wav"
    before = storage.tags([url])
    path.write_bytes(b"else")
    cloud.store(path, url, threads=False)
    assert cloud.read(url) == b"else"
    assert storage.tags([url]) != before
    cloud.remove(url)
    cloud.remove(url)
    with pytest.raises(FileNotFoundError, match="no such object"):
        cloud.read(url)
    assert len(list(cloud.objects(f"{music}/"))) == 2


@each_cloud
def test_a_bucket_that_is_not_there_is_one_plain_line(bucket: str, tmp_path: Path) -> None:
    nowhere = bucket.replace(BUCKET, "nowhere")
    with pytest.raises(UserError, match=r"nowhere/x/ cannot be .*no .*bucket.*") as error:
        storage.files_below(f"{nowhere}/x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_server_that_does_not_answer_may_come_back(scheme: str, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (server | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr("google.cloud.storage.retry.DEFAULT_RETRY._timeout", 0.5)
    with pytest.raises(cloud.Unreachable, match=f"{scheme}://{BUCKET}/x cannot be reached"):
        cloud.fetch(f"{scheme}://{BUCKET}/x", io.BytesIO())


@pytest.mark.parametrize(
    ("scheme", "refusal", "words"),
    [
        ("s3", ClientError({"Error": {"Code": "AccessDenied"}}, "x"), r"\(AccessDenied\); check the AWS credentials"),
        ("gs", Forbidden("no"), "; check the Google credentials"),
    ],
)
def test_refused_keys_are_one_plain_line(
    monkeypatch: pytest.MonkeyPatch, scheme: str, refusal: Exception, words: str
) -> None:
    """The servers of these tests let everybody in."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise refusal

    client = SimpleNamespace(get_paginator=refuse, list_blobs=refuse)
    monkeypatch.setattr(cloud, "_client", lambda *settings: client)
    with pytest.raises(UserError, match=rf"music/ cannot be listed: access is refused ?{words}") as error:
        storage.files_below(f"{scheme}://here/music")
    assert "\n" not in str(error.value)


def test_a_file_of_credentials_that_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none are named, buckets that are open to all can be read."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"gs://here/ cannot be used: .*none\.json.*Check the Google credentials"):
        storage.files_below("gs://here/")
