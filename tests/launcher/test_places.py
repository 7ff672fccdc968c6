"""Buckets and other tokens that a run needs are looked at before it starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from launcher.graph import origins
from launcher.places import check_places
from launcher.recipe import load_recipe
from launcher.runner import run
from launcher.stages import STAGES
from model import artifact
from model.counting import token_fields
from model.errors import UserError


def check(*changes: str, stages: tuple[str, ...] = ("tokens", "coarse", "fine")) -> None:
    recipe = load_recipe("quickstart", changes)
    check_places(recipe, origins(recipe), [stage for stage in STAGES if stage.name in stages])


def made(folder: Path, rate: float | None = None, **inputs: str) -> Path:
    """Tokens as the quickstart's own, but for these."""
    recipe = load_recipe("quickstart")
    fields = {name: field.to_json() for name, field in token_fields(recipe.encoders, recipe.quantizers).items()}
    fields["acoustic"]["rate_hz"] = rate or fields["acoustic"]["rate_hz"]
    joint = recipe.encoders.joint
    with artifact.create(folder, "tokens", "other", {**origins(recipe)["tokens"].inputs, **inputs}) as (_, info):
        info |= {"fields": fields, "hop_seconds": joint.hop_seconds, "embedding_seconds": joint.window_seconds}
    return folder


def test_buckets_that_cannot_be_used_are_all_named(s3: Any, gs: str, tmp_path: Path) -> None:
    upload = ("tokens.upload=s3://nowhere/tokens", "stages.coarse.train.upload=gs://nowhere/x")
    with pytest.raises(UserError) as error:
        check(*upload)
    assert re.search(r"^tokens\.upload: s3://nowhere/tokens/ .* no bucket nowhere", str(error.value))
    assert re.search(r"^stages\.coarse\.train\.upload: gs://nowhere/x/ .*", str(error.value), re.MULTILINE)
    check(*upload, stages=("fine",))
    check(f"tokens.upload={gs}/tokens", f"stages.fine.train.upload={gs}/copies")


def test_nothing_is_begun(s3: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokens\.upload: s3://nowhere"):
        run(load_recipe("quickstart", ["tokens.upload=s3://nowhere/tokens"]), tmp_path / "run")
    assert not (tmp_path / "run" / "corpus").exists()


def test_tokens_that_cannot_be_mixed_are_told_apart(tmp_path: Path) -> None:
    check(f"stages.coarse.train.mix=[{{tokens: {made(tmp_path / 'alike')}}}]")
    with pytest.raises(UserError, match=r"coarse\.train\.mix.: rate_hz of acoustic is 25.* the first and 50"):
        check(f"stages.coarse.train.mix=[{{tokens: {made(tmp_path / 'faster', rate=50.0)}}}]")
    with pytest.raises(UserError, match="the codec that made them differs"):
        check(f"stages.coarse.train.mix=[{{tokens: {made(tmp_path / 'other', codec='0123')}}}]")
