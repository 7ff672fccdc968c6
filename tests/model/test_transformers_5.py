"""What is exported, loaded by the version of transformers that Stretto itself cannot use yet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

INSTALLED = Path(sys.prefix) / "transformers-5"


@pytest.mark.skipif(not (INSTALLED / ".installed").exists(), reason="tests/setup_transformers5.sh installed none")
def test_checkpoints_of_stages_compute_the_same_with_version_5():
    """Version 5 fills models anew after it has loaded them: a checkpoint's own code must let it know what is loaded."""
    paths = os.pathsep.join([str(INSTALLED), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(*arguments: str) -> str:
        found = subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
        )
        assert found.returncode == 0, found.stdout
        return found.stdout

    assert run("-c", "import transformers; print(transformers.__version__)").splitlines()[-1].startswith("5.")
    tests = Path(__file__).with_name("test_stock_formats.py")
    assert " passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests))
