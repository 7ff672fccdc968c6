"""Recipes: one YAML file that names everything, checked before anything starts."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from data.cloud import is_remote
from data.config import DataConfig, TokensConfig
from launcher.kubernetes_config import KubernetesConfig
from launcher.placement import PlacementConfig
from launcher.recipe_checks import check
from launcher.recipe_errors import plain_lines
from launcher.restarts import RestartsConfig
from launcher.slurm_config import SlurmConfig
from model.config import STAGES, Config, EncodersConfig, QuantizersConfig, SamplingConfig
from model.errors import UserError, nearest
from trainer.config import StageConfig

DEFAULTS = "stage_defaults"
RECIPE = "recipe.yaml"
YAML_SUFFIXES = (".yaml", ".yml")


class EvaluationConfig(Config):
    """What is made and judged at the end of a run."""

    prompts: int = Field(32, ge=2)
    """Held-out prompts generated at the end of the run (or as many as there are captions); each is compared with what
    another asked for."""
    seconds: PositiveFloat = 5.0


class StagesConfig(Config):
    """The three transformers, in the order in which they make music."""

    semantic: StageConfig
    coarse: StageConfig
    fine: StageConfig


class Recipe(Config):
    """All of a run. In a recipe file, `stage_defaults` holds what every stage starts from."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    description: str = ""
    seed: int = Field(0, ge=0)
    parallel: PositiveInt = 1
    """Stages that may run on this machine at the same time."""
    placement: PlacementConfig = PlacementConfig()
    restarts: RestartsConfig = RestartsConfig()
    environment: list[str] = Field([])
    """Names of further variables that cross from here to every host."""
    slurm: SlurmConfig = SlurmConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()
    fitted_from: str | None = None
    """Another run, whose codec, embedding and quantizers are taken over in place of fitting them here: the tokens of
    both then mean the same and can be mixed (train.mix)."""
    data: DataConfig = DataConfig()
    encoders: EncodersConfig = EncodersConfig()
    quantizers: QuantizersConfig = QuantizersConfig()
    tokens: TokensConfig = TokensConfig()
    stages: StagesConfig
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


def builtin_names() -> list[str]:
    """The recipes that come with Stretto."""
    files = (Path(file.name) for file in (resources.files("launcher") / "recipes").iterdir())
    return sorted(file.stem for file in files if file.suffix in YAML_SUFFIXES)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """A built-in recipe, or one in a YAML file, with dotted `a.b.c=value` overrides, resolved and checked.

    Later words win, from weakest to strongest: the file's `stage_defaults`, the file's own keys of a stage, overrides
    of `stage_defaults.…` (they reach every stage), overrides of `stages.NAME.…`. Paths are made absolute. Raises
    UserError with one plain line for each thing that is wrong.
    """
    values = _read_yaml(*_find(name_or_path))
    if Path(name_or_path).suffix in YAML_SUFFIXES:
        values.setdefault("name", Path(name_or_path).stem)
    return _resolve(values, overrides)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every key written out: what a run folder keeps."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def read_run_recipe(run: Path) -> Recipe:
    """The recipe a run folder was made by. Raises UserError where there is none, or it does not read."""
    path = run / RECIPE
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{run} is not a run folder: it has no {RECIPE}. `stretto run RECIPE -o {run}` makes one."
        ) from None
    return _resolve(_read_yaml(text, str(path)), ())


def _find(name_or_path: str) -> tuple[str, str]:
    """The text of a recipe, and what to call it in messages."""
    if name_or_path in builtin_names():
        file = resources.files("launcher") / "recipes" / f"{name_or_path}.yaml"
        return file.read_text(encoding="utf-8"), f"recipe {name_or_path}"
    path = Path(name_or_path)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), name_or_path
        except UnicodeDecodeError:
            raise UserError(f"{name_or_path} is not a recipe: it does not read as text.") from None
    if path.suffix in YAML_SUFFIXES or path.is_dir():
        raise UserError(f"{name_or_path} is not a recipe file.")
    names = ", ".join(builtin_names())
    hint = nearest(name_or_path, builtin_names())
    raise UserError(f"there is no recipe {name_or_path!r}.{hint}\nName a YAML file, or one of these: {names}.")


def _read_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} does not read as YAML: {_yaml_problem(error)}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{where} is not a recipe: it must hold keys and values such as `name: my-recipe`.")
    return values


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def _resolve(values: dict[str, Any], overrides: Sequence[str]) -> Recipe:
    """Defaults merged under the stages, overrides applied, everything checked."""
    defaults = values.pop(DEFAULTS, None) or {}
    stages = values.get("stages") or {}
    own = copy.deepcopy(stages)
    if not isinstance(defaults, dict):
        raise UserError(f"{DEFAULTS} must hold keys such as model and train.")
    if isinstance(stages, dict):
        values["stages"] = {name: merge(defaults, stage) for name, stage in stages.items()}
    pairs = [parse_override(override) for override in overrides]
    # What is said of one stage is stronger than what is said of all, whatever their order.
    for path, value in sorted(pairs, key=lambda pair: pair[0][0] != DEFAULTS):
        if path[0] != DEFAULTS:
            _set(values, path, value)
            continue
        if len(path) == 1:
            raise UserError(f"{DEFAULTS} is a section: name a key of it, such as {DEFAULTS}.train.steps=500.")
        _set(defaults, path[1:], value)
        for name in STAGES:
            _set(values, ("stages", name, *path[1:]), value)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(plain_lines(error, Recipe, own, defaults))) from None
    recipe = _with_absolute_paths(recipe)
    problems = check(recipe)
    if problems:
        raise UserError("\n".join(problems))
    return recipe


def merge(below: Any, above: Any) -> Any:
    """`above` laid over `below`: mappings key by key, anything else whole."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return copy.deepcopy(below if above is None and isinstance(below, dict) else above)
    return {
        **copy.deepcopy(below),
        **{name: merge(below.get(name), value) if name in below else value for name, value in above.items()},
    }


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """`a.b.c=value` as the path and the value, which is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key.strip()):
        raise UserError(f"{text!r} is not an override: write it as key=value, such as data.clips=500.")
    try:
        return tuple(key.strip().split(".")), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"the value of override {text!r} does not read as YAML: {_yaml_problem(error)}.") from None


def _set(values: Any, path: tuple[str, ...], value: Any) -> None:
    """Puts `value` at `path`, making the sections on the way; a part that is a number counts in a list from 0."""
    for place, part in enumerate(path):
        last = place == len(path) - 1
        key: Any = part
        if isinstance(values, list):
            if not part.isdigit() or int(part) >= len(values):
                raise UserError(f"{'.'.join(path)}: {part} is not one of its {len(values)} entries, counted from 0.")
            key = int(part)
        elif not isinstance(values, dict):
            raise UserError(f"{'.'.join(path)}: {'.'.join(path[:place])} is a value and has no keys below it.")
        elif values.get(part) is None and not last:
            values[part] = {}
        if last:
            values[key] = value
        values = values[key]


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """Stages run in other folders: what names a file here must name it there."""
    values = recipe.model_dump(mode="json")
    trains = [stage["train"] for stage in values["stages"].values()]
    always = [(values["data"], "audio"), (values["data"], "captions"), (values, "fitted_from")]
    always += [(train, key) for train in trains for key in ("cache", "init_from")]
    always += [(kmeans, "centroids") for kmeans in values["quantizers"].values()]
    named = [(values["encoders"][name], "weights") for name in ("codec", "semantic", "joint")]
    named += [(values["encoders"]["joint"], "tokenizer")]
    named += [(step, "weights") for step in values["tokens"]["steps"] if step["kind"] == "vocals"]
    for train in trains:
        named += [(train, "zero"), *((other, "tokens") for other in train["mix"])]
    # Weights may be a hub's, and a ZeRO choice one of ours: only what exists here is a path.
    named = [(section, key) for section, key in named if section[key] and Path(section[key]).expanduser().exists()]
    for section, key in [*always, *named]:
        if section[key] is not None and not is_remote(section[key]):
            section[key] = str(Path(section[key]).expanduser().absolute())
    return Recipe.model_validate(values)
