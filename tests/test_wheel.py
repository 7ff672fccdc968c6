"""What is installed from a wheel is complete: recipes, DeepSpeed configurations, the report's template."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile

from helpers import ROOT, run_command

PARTS = ("model", "data", "trainer", "launcher", "ds_configs", "pyproject.toml", "README.md", "LICENSE")
PROGRAM = """
from importlib import resources
import ds_configs, launcher
from launcher.recipe import load_recipe
print(launcher.__file__)
for name in ("quickstart", "musiclm_small", "musiclm_large"):
    for stage in ("semantic", "coarse", "fine"):
        ds_configs.read(getattr(load_recipe(name, []).stages, stage).train.zero)
assert (resources.files("launcher") / "templates" / "report.html").is_file()
"""


def test_recipes_and_configurations_come_with_the_wheel(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, source / part)
    # Without isolation nothing is downloaded.
    built = run_command(["build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)])
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("stretto-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        assert any(
            "stretto = launcher.cli:main" in archive.read(name).decode()
            for name in archive.namelist()
            if name.endswith("entry_points.txt")
        )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(tmp_path / "installed"))
