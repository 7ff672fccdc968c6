"""What DeepSpeed's NVMe offload needs in tests: libaio, and async_io compiled with it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from helpers import run_command

COMPILES = 900
"""Seconds that compiling async_io may take; three minutes on two cores."""
OWN = Path(sys.prefix) / "torch_extensions"
# torch's own place is shared by all virtual environments, and each compiles anew what another has left there.
EXTENSIONS = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(OWN)))


@cache
def missing() -> str | None:
    """What NVMe offload lacks here, in words. Compiles async_io where that is all."""
    compiler = shutil.which("c++")
    program = "#include <libaio.h>\nint main(void) { return 0; }\n"
    command = [str(compiler), "-x", "c++", "-", "-laio", "-o", os.devnull]
    if compiler is None or subprocess.run(command, input=program, text=True, capture_output=True).returncode:
        return "libaio or a C++ compiler is missing: tests/setup_libaio.sh installs it"
    EXTENSIONS.mkdir(parents=True, exist_ok=True)
    with (EXTENSIONS / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if EXTENSIONS == OWN:  # where nobody else compiles
            for killed in EXTENSIONS.glob("*/lock"):  # torch would wait for whoever left it, for ever
                killed.unlink()
        settings = {"DS_ACCELERATOR": "cpu", "MAX_JOBS": str(os.cpu_count())}
        try:
            # The compiler holds the lock too: it may outlive this process.
            built = run_command(
                ["nvme"], COMPILES, cwd=Path(__file__).parent, env={**os.environ, **settings}, pass_fds=[lock.fileno()]
            )
        except AssertionError as error:
            return str(error)
    return f"DeepSpeed's async_io does not compile: {built.stderr[-2000:]}" if built.returncode else None


@pytest.fixture(scope="session")
def nvme() -> None:
    """Skips where DeepSpeed cannot move anything to NVMe."""
    if lacks := missing():
        pytest.skip(lacks)


if __name__ == "__main__":
    from deepspeed.ops.op_builder import AsyncIOBuilder

    AsyncIOBuilder().load(verbose=False)
