"""Fixtures that tests of several folders use, and the table of what conversions give at the end of the session."""

from __future__ import annotations

import logging

import pytest
from buckets import BUCKET, KEYS
from helpers import CONVERSIONS, free_port
from nodes import nodes, skip_reason


def pytest_terminal_summary(terminalreporter):
    """What the tests have recorded, in whichever process they ran."""
    reports = terminalreporter.stats.get("passed", [])
    rows = [value for report in reports for name, value in report.user_properties if name == CONVERSIONS]
    if rows:
        terminalreporter.section("largest difference of a logit from the training engine's")
        columns = list(rows[0][1])
        terminalreporter.write_line(f"{'trained with':<16}" + "".join(f"{name:>14}" for name in columns))
        for cell, differences in sorted(rows):
            figures = "".join(f"{differences[name]:>14.1e}" for name in columns)
            terminalreporter.write_line(f"{cell:<16}{figures}")


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
    for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    client.delete_bucket(Bucket=BUCKET)


@pytest.fixture(scope="session")
def google_server():
    """Google Cloud Storage in memory, with an empty bucket."""
    from gcp_storage_emulator.server import create_server

    port = free_port()
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET) as started:
        yield started, f"http://127.0.0.1:{port}"


@pytest.fixture
def gs(google_server, monkeypatch):
    """The address of an empty bucket."""
    started, address = google_server
    started.wipe(keep_buckets=True)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    return f"gs://{BUCKET}"


@pytest.fixture
def bucket(request):
    """The address of an empty bucket, in S3 where a test does not ask for `each_cloud`."""
    scheme = getattr(request, "param", "s3")
    request.getfixturevalue(scheme)
    return f"{scheme}://{BUCKET}"


@pytest.fixture
def cluster(tmp_path):
    """Two nodes, `alpha` and `beta`."""
    if reason := skip_reason():
        pytest.skip(reason)
    with nodes(tmp_path / "cluster", "alpha", "beta") as started:
        yield started
