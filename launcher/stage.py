"""A stage: one node of the graph, which makes one artifact from those before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.progress import Progress
    from data.ranks import Ranks
    from launcher.recipe import Recipe


@dataclass(frozen=True)
class Context:
    """What a stage's body gets."""

    run: Path
    recipe: Recipe
    folder: Path
    """To be filled: it becomes the artifact when the body returns."""
    progress: Progress
    ranks: Ranks | None = None
    """The processes that make it together, for a stage that takes several; each calls the body."""
    files: dict[str, Any] = field(default_factory=dict)
    """What the body of a stage that is resumed has digested already, as `artifact.describe_files` would say it."""


Keys = Callable[["Recipe"], dict[str, Any]]
Body = Callable[[Context], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """`needs` are the stages whose artifacts it reads, `keys` gives the parts of the recipe it depends on."""

    name: str
    needs: tuple[str, ...]
    keys: Keys
    version: int
    """Raised when the code would make something else of the same inputs."""
    body: Body | None
    """Fills the folder and returns what its manifest says; None for a stage that the trainer trains."""
    ranks: Callable[[Recipe], int] | None = None
    """How many processes a body may take; one when not given."""
    resumed: bool = False
    """Whether the body goes on with what an interrupted one left in the folder."""
    sealed: Callable[[Context], None] = lambda context: None
    """What is done to a stage that is resumed when all of its folder is written."""

    @property
    def trained(self) -> bool:
        return self.body is None

    @property
    def ranked(self) -> bool:
        """Whether several processes may make it together."""
        return self.trained or self.ranks is not None

    @property
    def makes(self) -> str:
        """The kind of its artifact."""
        return "stage" if self.trained else self.name


LATER = {"encoders.semantic.standardise": False}
"""Keys that recipes did not have from the start, with what was done then: as such they count for nothing, and what was
made before stays up to date."""


def picked(*keys: str, without: tuple[str, ...] = ()) -> Keys:
    """The values of the recipe at and below the dotted `keys`, by their dotted names, but for those in `without`."""

    def pick(recipe: Recipe) -> dict[str, Any]:
        values = flatten(recipe.model_dump(mode="json"))
        return {
            name: value
            for name, value in values.items()
            if any(below(name, key) for key in keys)
            and not any(below(name, key) for key in without)
            and (name not in LATER or value != LATER[name])
        }

    return pick


def below(name: str, key: str) -> bool:
    """Whether the dotted `name` is `key` or lies under it."""
    return name == key or name.startswith(f"{key}.")


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted names; lists are values."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat.update(flatten(item, f"{prefix}{name}.") if isinstance(item, dict) else {f"{prefix}{name}": item})
    return flat
