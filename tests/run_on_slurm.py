"""`stretto run RECIPE -o RUN --slurm`, until the command line has it."""

from __future__ import annotations

import sys
from pathlib import Path

from data.processes import plain_errors
from launcher import batch
from launcher.backends.slurm import Slurm
from launcher.recipe import load_recipe


def main() -> int:
    name, path, *rest = sys.argv[1:]
    options = [word for word in rest if word.startswith("--")]
    only = [word.removeprefix("--only=") for word in options if word.startswith("--only=")]
    recipe, run = load_recipe(name, [word for word in rest if word not in options]), Path(path).absolute()
    return batch.run(
        recipe, run, Slurm(run, recipe.slurm), only, dry_run="--dry-run" in options, wait="--wait" in options
    )


if __name__ == "__main__":
    with plain_errors():
        sys.exit(main())
