"""`python -m launcher.worker --run RUN --stage NAME`: makes the artifact of one stage that is not trained.

`deepspeed --module launcher.worker ...` does so on several ranks, for a stage that takes them.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.processes import die_with_parent, plain_errors
from data.progress import Progress
from launcher.graph import Origin, problems, stage_named
from launcher.recipe import read_run_recipe
from launcher.run_folder import read_state
from launcher.stage import Body, Context
from model import artifact
from model.errors import UserError

if TYPE_CHECKING:
    from data.ranks import Ranks


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launcher.worker", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder made by `stretto run`")
    parser.add_argument("--stage", required=True, help="a stage that is not trained, such as corpus or tokens")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed command")
    arguments = parser.parse_args()
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with plain_errors(arguments.run):
        progress = Progress(arguments.run / "progress" / f"{arguments.stage}.json")
        made_from = read_state(arguments.run)["stages"].get(arguments.stage, {}).get("made_from")
        if made_from is None:
            raise UserError(f"nothing asked for stage {arguments.stage!r}: start it with `stretto run --only`.")
        origin, path = Origin(**made_from), arguments.run / arguments.stage
        if stage_named(arguments.stage).ranks is None:
            build(arguments.run, origin, progress, path)
            return
        from data.ranks import Ranks

        with Ranks.joined() as ranks:
            build(arguments.run, origin, progress, path, ranks=ranks)


def build(
    run: Path, origin: Origin, progress: Progress, path: Path, body: Body | None = None, ranks: Ranks | None = None
) -> None:
    """Makes the artifact of a stage at `path`, from the others in `run`, by the stage's body or another.

    Where there are several `ranks` all call it: rank 0 checks what is needed, names the folder and seals it.

    Raises UserError where an input is missing or is not what the artifact is to be made from.
    """
    recipe, stage = read_run_recipe(run), stage_named(origin.name)
    if origin.taken_over is not None:
        if ranks is None or ranks.leads:
            take_over(Path(origin.keys["fitted_from"]) / stage.name, origin, path)
        return
    body = body or stage.body
    if body is None:
        raise UserError(f"stage {stage.name!r} is trained: start it with `stretto train {stage.name} --run {run}`.")
    if ranks is not None and not ranks.leads:
        body(Context(run, recipe, Path(ranks.broadcast(None)), Progress(), ranks))
        return
    for need, expected in origin.inputs.items():
        check_input(run, stage.name, need, expected)

    def sealed(folder: Path) -> None:
        stage.sealed(Context(run, recipe, folder, progress))

    made = (path, stage.makes, origin.fingerprint, origin.inputs)
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        if stage.resumed:
            folder, info, files = stack.enter_context(artifact.resume(*made, sealed))
        else:
            folder, info = stack.enter_context(artifact.create(*made))
        if ranks is not None:
            ranks.broadcast(str(folder))
        info.update(body(Context(run, recipe, folder, progress, ranks, files)))


def take_over(source: Path, origin: Origin, path: Path) -> None:
    """Copies another run's artifact, whose fingerprint stays. Raises UserError where it is no longer the same."""
    found = artifact.read(source)
    wrong = artifact.problems(found) or ["it was made anew"] * (found.fingerprint != origin.fingerprint)
    if wrong:
        raise UserError(f"fitted_from: {source} cannot be taken over: {wrong[0]}.")
    with artifact.create(path, found.kind, found.fingerprint, found.manifest["inputs"]) as (folder, info):
        for name in found.manifest["files"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, folder / name)
        info.update(found.info)


def check_input(run: Path, stage: str, need: str, expected: str) -> None:
    """Raises UserError unless the artifact `need` is whole and has the fingerprint that `stage` is to be made from."""
    found, wrong = problems(run / need, stage_named(need))
    if wrong:
        raise UserError(f"stage {stage!r} cannot start: {wrong[0]}. `stretto run` makes what it needs.")
    if found != expected:
        raise UserError(
            f"stage {stage!r} and its input {need!r} do not match: {run / need} has fingerprint {found}, "
            f"the recipe asks for {expected}. `stretto run` makes it anew."
        )


if __name__ == "__main__":
    main()
