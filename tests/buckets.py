"""Buckets on the loopback: moto's server plays S3, gcp-storage-emulator Google's. Their fixtures are in conftest.py."""

from __future__ import annotations

import os
import shutil

import pytest

from data import cloud
from model import artifact

BUCKET = "checkpoints"
each_cloud = pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
"""Runs a test with the fixture `bucket` of each kind."""
KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


def environment():
    """What leads the ranks to the servers."""
    names = (*KEYS, "AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST")
    return {name: os.environ[name] for name in names if name in os.environ}


def put(folder, address):
    """Copies all files below `folder` to `address`."""
    for path in folder.rglob("*"):
        if path.is_file():
            cloud.store(path, f"{address}/{path.relative_to(folder).as_posix()}")


def keys(address):
    """The names of all objects below `address`, with its own path in the bucket."""
    return [url.split("/", 3)[3] for url, _, _ in cloud.objects(f"{address}/")]


def steps_there(bucket):
    """The steps that have a manifest in the bucket, newest first."""
    return sorted(
        (int(key.split("/")[-2][5:]) for key in keys(bucket) if key.endswith(artifact.MANIFEST)), reverse=True
    )


def lose(run):
    """The disk of a run is gone but for what a new start makes anew."""
    for path in (run / "coarse").iterdir():
        if path.name != "stage.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
