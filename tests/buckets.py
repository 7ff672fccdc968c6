"""A bucket as moto's server plays S3 on the loopback, for copies of checkpoints. Its fixtures are in conftest.py."""

from __future__ import annotations

import os
import shutil

from model import artifact

BUCKET = "checkpoints"
KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


def environment():
    """What leads the ranks to the server."""
    return {name: os.environ[name] for name in (*KEYS, "AWS_ENDPOINT_URL")}


def keys(s3, prefix=""):
    return [entry["Key"] for entry in s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]


def steps_there(s3):
    """The steps that have a manifest in the bucket, newest first."""
    return sorted((int(key.split("/")[-2][5:]) for key in keys(s3) if key.endswith(artifact.MANIFEST)), reverse=True)


def lose(run):
    """The disk of a run is gone but for what a new start makes anew."""
    for path in (run / "coarse").iterdir():
        if path.name != "stage.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
