"""Fixtures that tests of several folders use."""

from __future__ import annotations

import logging

import pytest
from buckets import BUCKET, KEYS, keys


@pytest.fixture(scope="session")
def server():
    """The environment that leads to it."""
    from moto.server import ThreadedMotoServer  # takes a second to import

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    started = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    yield {**KEYS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    started.stop()


@pytest.fixture
def s3(server, monkeypatch):
    """A client, and an empty bucket."""
    import boto3

    for name, value in server.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield client
    for key in keys(client):
        client.delete_object(Bucket=BUCKET, Key=key)
    client.delete_bucket(Bucket=BUCKET)
