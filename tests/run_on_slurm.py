"""What `stretto run RECIPE -o RUN --slurm` does, until the command line has it."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from data.processes import plain_errors
from launcher import batch
from launcher.backends.slurm import Slurm
from launcher.graph import origins, plan_stages, state_of
from launcher.recipe import load_recipe
from launcher.run_folder import RunFolder


def main() -> None:
    name, path, *rest = sys.argv[1:]
    only = [word.removeprefix("--only=") for word in rest if word.startswith("--only=")]
    recipe = load_recipe(name, rest[len(only) :])
    found = origins(recipe)
    with RunFolder.opened(Path(path), recipe) as folder:
        backend = Slurm(folder.path, recipe.slurm)
        states = state_of(folder.path, recipe, found)
        todo = plan_stages(states, only)
        handles = batch.living(folder, found, backend)
        backend.check(recipe, [stage for stage in todo if stage.name not in handles])
        folder.adopt(recipe)
        for stage, state in states.items():
            if state.done:
                folder.record(stage, state="done", reused=True, error=None, made_from=found[stage].to_json())
        batch.submit_all(folder, recipe, found, states, todo, backend, Console())


if __name__ == "__main__":
    with plain_errors():
        main()
