"""What tests of `stretto collect` share."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time

from helpers import ROOT

from data.collect.limits import Limits

LIMITS = Limits(per_second=1000, backoff=0.01, timeout=5, attempts=3)
SONG = bytes(range(256)) * 400
PATIENCE = 30


def write(path, rows):
    rows = [{"url": row} if isinstance(row, str) else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def listed(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def kept(tmp_path):
    """What `manifest.jsonl` leads to: contents by address, digests and sizes checked."""
    found = {}
    for row in listed(tmp_path / "out" / "manifest.jsonl"):
        contents = (tmp_path / "out" / row["path"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(contents), hashlib.sha256(contents).hexdigest())
        found[row["url"]] = contents
    return found


def reasons(tmp_path):
    return {row["url"]: row["reason"] for row in listed(tmp_path / "out" / "failed.jsonl")}


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def stretto(*arguments, **settings):
    command = [sys.executable, "-m", "launcher", "collect", "--per-second", "1000", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes, **settings)
