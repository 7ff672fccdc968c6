"""`python -m launcher.host_report`: one line of JSON about the host it runs on, for the launcher to compare.

It is asked of every host before a run, and of one that answers again, so it imports little and takes little time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from data.lock import can_lock

CODE = Path(__file__).parent.parent
"""Where our packages lie."""
OUR_PACKAGES = ("model", "data", "trainer", "launcher", "ds_configs")
SOURCE = {".py", ".yaml", ".json"}
PACKAGES = ("stretto", "torch", "deepspeed", "mosaicml-streaming", "transformers", "numpy")
"""Those that must be the same on every host: ranks of different versions disagree, or misread each other's files."""


def report(folder: Path | None = None, marker: str = "") -> dict[str, Any]:
    """What `main` prints. `folder` is where a run is or is to be made; `marker` is a file that it must hold."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "code": source_digest(CODE),
        "place": str(CODE),
        "gpus": len(list(Path("/dev").glob("nvidia[0-9]*"))),
        "cores": len(os.sched_getaffinity(0)),
        "reached_at": connection[2] if len(connection) == 4 else None,
        "reached_from": connection[0] if len(connection) == 4 else None,
        "folder": describe_folder(folder, marker) if folder else None,
        "time": time.time(),
    }


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def source_digest(root: Path) -> str:
    """Of the names and the text of all our source."""
    digest = hashlib.sha256()
    files = (path for name in OUR_PACKAGES for path in (root / name).rglob("*") if path.suffix in SOURCE)
    for path in sorted(files):
        text = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(text)}\n".encode() + text)
    return digest.hexdigest()[:16]


def describe_folder(folder: Path, marker: str) -> dict[str, Any]:
    """Whether `folder` is there, holds `marker` and can be written, and how many bytes its disk has free.

    The marker is looked up by its name: a shared file system may show an old list of names for a while.
    """
    if not folder.is_dir():
        return {"path": str(folder), "there": False, "marked": False, "refused": None, "free": 0}
    refused = None
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"stretto")
            file.flush()
            os.fsync(file.fileno())
            if not can_lock(file):
                refused = "its disk must be mounted with file locks (flock)"
    except OSError as error:
        refused = error.strerror or str(error)
    free = shutil.disk_usage(folder).free
    marked = bool(marker) and (folder / marker).exists()
    return {"path": str(folder), "there": True, "marked": marked, "refused": refused, "free": free}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, help="A folder that all hosts are to share.")
    parser.add_argument("--marker", default="", help="The name of a file that it holds.")
    arguments = parser.parse_args()
    print(json.dumps(report(arguments.run, arguments.marker)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
