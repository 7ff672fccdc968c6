"""Arguments that several commands take, and what is asked of their values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from model.errors import UserError, nearest

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A built-in recipe (quickstart ...) or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Keys of the recipe to change: data.clips=500, or stage_defaults.train.steps=100 for every stage.",
    ),
]
BY_STAGE = "NUMBER|STAGE=NUMBER,..."
RunOption = Annotated[Path, typer.Option("--run", metavar="RUN", help="A run folder made by `stretto run`.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by `stretto run`.")]


def one_of(name: str, names: tuple[str, ...], purpose: str) -> None:
    if name not in names:
        raise UserError(f"there is nothing called {name!r} {purpose}.{nearest(name, names)} Choose {', '.join(names)}.")
