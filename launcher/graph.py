"""The stage graph: what every artifact is made of, and which of those on disk are still what the recipe asks for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from launcher import stages
from launcher.recipe import Recipe, read_run_recipe
from launcher.run_folder import read_state
from launcher.stage import Stage, flatten
from model import artifact
from model.errors import UserError, nearest

FITTED = ("codec", "embedding", "quantizers")
"""What one run can take over from another."""
STAGE_FILE = "stage.json"
"""Beside the checkpoints of a trained stage: the fingerprint they belong to."""


@dataclass(frozen=True)
class Origin:
    """All that a stage's artifact is made of; its fingerprint changes with any of it."""

    name: str
    version: int
    keys: dict[str, Any]
    """Values of the recipe, by dotted name."""
    inputs: dict[str, str]
    """The artifacts it reads, with their fingerprints."""
    taken_over: str | None = None
    """The fingerprint of another run's artifact that this one is a copy of."""

    @property
    def fingerprint(self) -> str:
        return self.taken_over or artifact.fingerprint(self.name, self.version, self.keys, self.inputs)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StageState:
    """How a stage stands on disk: done; outdated, with why; partial, to be resumed; or missing."""

    name: str
    state: Literal["done", "outdated", "partial", "missing"]
    reasons: tuple[str, ...] = ()
    """In words: which key or input changed, or what is wrong with the files."""

    @property
    def done(self) -> bool:
        return self.state == "done"


def stage_named(name: str) -> Stage:
    """Raises UserError with the nearest valid name where there is no such stage."""
    names = [stage.name for stage in stages.STAGES]
    if name not in names:
        raise UserError(f"there is no stage {name!r}.{nearest(name, names)} The stages are {', '.join(names)}.")
    return stages.STAGES[names.index(name)]


def check_graph(graph: Sequence[Stage]) -> None:
    """Raises UserError with every need that no stage makes, or that is not made before: stages are listed in an order
    in which they can be built, so a circle shows as one of its needs."""
    problems = []
    names = [stage.name for stage in graph]
    for place, stage in enumerate(graph):
        for need in stage.needs:
            if need not in names:
                problems.append(f"stage {stage.name!r} needs {need!r}, which there is not.{nearest(need, names)}")
            elif names.index(need) >= place:
                problems.append(f"stage {stage.name!r} needs {need!r}, which is not made before it: is it a circle?")
    if problems:
        raise UserError("\n".join(problems))


def origins(recipe: Recipe) -> dict[str, Origin]:
    """What every stage's artifact would be made of, in order. Nothing on disk is read but the user's own files.

    Raises UserError where these, the weights of a pretrained encoder or the run of `fitted_from` cannot be found.
    """
    check_graph(stages.STAGES)
    found: dict[str, Origin] = {}
    for stage in stages.STAGES:
        if recipe.fitted_from is not None and stage.name in FITTED:
            found[stage.name] = _taken_over(stage, Path(recipe.fitted_from), recipe)
            continue
        inputs = {need: found[need].fingerprint for need in stage.needs}
        found[stage.name] = Origin(stage.name, stage.version, stage.keys(recipe), inputs)
    return found


def _taken_over(stage: Stage, run: Path, recipe: Recipe) -> Origin:
    """The origin of a stage whose artifact is copied from `run`. Raises UserError where that does not fit `recipe`."""
    other = read_run_recipe(run)
    for section in ("encoders", "quantizers"):
        mine, theirs = (flatten(getattr(which, section).model_dump(mode="json")) for which in (recipe, other))
        for key in (key for key in mine if mine[key] != theirs.get(key)):
            raise UserError(
                f"fitted_from: {section}.{key} is {mine[key]!r} here and {theirs.get(key)!r} in {run}: they must agree."
            )
    made, wrong = problems(run / stage.name, stage)
    if made is None or wrong:
        raise UserError(f"fitted_from: {wrong[0]}. `stretto run` finishes that run.")
    return Origin(stage.name, stage.version, {"fitted_from": str(run)}, {}, made)


def state_of(run: Path, recipe: Recipe, found: dict[str, Origin] | None = None) -> dict[str, StageState]:
    """How every stage of `recipe` stands in the folder `run`, which need not exist (`found`: its origins, if known)."""
    record = read_state(run)["stages"]
    found = found or origins(recipe)
    return {
        stage.name: _state(run, stage, found[stage.name], record.get(stage.name, {}).get("made_from"))
        for stage in stages.STAGES
    }


def _state(run: Path, stage: Stage, origin: Origin, made_from: dict[str, Any] | None) -> StageState:
    folder = run / stage.name
    if (folder / artifact.MANIFEST).exists():
        found, wrong = problems(folder, stage)
        if not wrong and found == origin.fingerprint:
            return StageState(stage.name, "done")
        return StageState(stage.name, "outdated", tuple(wrong or differences(made_from, origin)))
    if stage.trained and any(folder.glob("checkpoints/step-*")):
        if _checkpoints_of(folder) == origin.fingerprint:
            return StageState(stage.name, "partial", ("it was stopped before its end",))
        return StageState(stage.name, "outdated", tuple(differences(made_from, origin)))
    if stage.resumed and artifact.began(folder, origin.fingerprint):
        return StageState(stage.name, "partial", ("it was stopped before its end",))
    return StageState(stage.name, "missing")


def problems(folder: Path, stage: Stage) -> tuple[str | None, list[str]]:
    """The fingerprint of a finished artifact, and what is wrong with its files: missing or of another size.

    Raises NewerFormat for one of a later Stretto: it is not to be made anew.
    """
    try:
        found = artifact.read(folder, stage.makes)
    except artifact.NewerFormat:
        raise
    except UserError as error:
        return None, [str(error)]
    return found.fingerprint, artifact.problems(found, digests=False)


def _checkpoints_of(folder: Path) -> str | None:
    try:
        return json.loads((folder / STAGE_FILE).read_text())["fingerprint"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None


def differences(made_from: dict[str, Any] | None, origin: Origin) -> list[str]:
    """In words, what differs between what an artifact was made from and what it would be made from now."""
    if made_from is None:
        return ["it was made from something else, of which there is no record"]
    lines = list(_key_differences(made_from["keys"], origin.keys))
    lines += [f"{name} changed" for name, value in origin.inputs.items() if made_from["inputs"].get(name) != value]
    if made_from["version"] != origin.version:
        lines.append("this version of Stretto makes it in another way")
    return lines or ["it was made from something else, of which there is no record"]


def _key_differences(before: dict[str, Any], now: dict[str, Any]) -> Iterable[str]:
    for name in dict.fromkeys([*now, *before]):
        if before.get(name) == now.get(name):
            continue
        # A digest tells a reader nothing.
        yield f"{name} changed" if name.startswith("the ") else f"{name}: {before.get(name)!r} → {now.get(name)!r}"


def plan_stages(states: dict[str, StageState], only: Iterable[str]) -> list[Stage]:
    """The stages to build, in order: all that are not done, or those of them in `only`.

    Raises UserError for an unknown name, and where a stage in `only` needs one that neither is done nor in `only`.
    """
    chosen = {stage_named(name).name for name in only}
    todo = [stage for stage in stages.STAGES if not states[stage.name].done and (not chosen or stage.name in chosen)]
    building = {stage.name for stage in todo}
    for stage in todo:
        lacking = [need for need in stage.needs if not states[need].done and need not in building]
        if lacking:
            raise UserError(
                f"stage {stage.name!r} needs {', '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not up "
                f"to date. Build them too: {' '.join(f'--only {need}' for need in lacking)}, or leave --only away."
            )
    return todo
