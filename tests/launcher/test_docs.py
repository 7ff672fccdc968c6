"""The reference of recipes names every key there is, with its default."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic.fields import FieldInfo

from data.config import DataConfig, TokensConfig
from data.steps.config import CaptionsConfig, ChromaConfig, FeaturesConfig, VocalsConfig
from launcher.kubernetes_config import KubernetesConfig, TolerationConfig
from launcher.placement import PlacementConfig
from launcher.recipe import EvaluationConfig, Recipe
from launcher.restarts import RestartsConfig
from launcher.slurm_config import SlurmConfig
from model.config import (
    CodecConfig,
    ConditionConfig,
    Config,
    JointEmbedderConfig,
    KMeansConfig,
    SamplingConfig,
    SemanticEncoderConfig,
    StageModelConfig,
    TransformerConfig,
)
from trainer.config import TrainConfig

DOCS = Path(__file__).parents[2] / "docs"
TABLES = {
    "Top level": Recipe,
    "`data`": DataConfig,
    "`tokens`": TokensConfig,
    "`codec`": CodecConfig,
    "`semantic`": SemanticEncoderConfig,
    "`joint`": JointEmbedderConfig,
    "`quantizers`": KMeansConfig,
    "`model`": StageModelConfig,
    "`model.conditions`": ConditionConfig,
    "`model.transformer`": TransformerConfig,
    "`train`": TrainConfig,
    "`sampling`": SamplingConfig,
    "`evaluation`": EvaluationConfig,
    "`placement`": PlacementConfig,
    "`restarts`": RestartsConfig,
    "`slurm`": SlurmConfig,
}
STEPS = {
    "`vocals`": VocalsConfig,
    "`chroma`": ChromaConfig,
    "`features`": FeaturesConfig,
    "`captions`": CaptionsConfig,
}


def rows(heading: str, page: str = "recipes.md") -> dict[str, str]:
    """Key → default of the first table after a line that begins with `heading`."""
    text = (DOCS / page).read_text()
    after = re.split(rf"(?m)^(?:## )?{re.escape(heading)}(?=[\s,:]|$)", text)[1]
    table = after[after.index("| key") :].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines()[2:]]
    return dict(pair for names, defaults in cells for pair in _pairs(names, defaults))


def _pairs(names: str, defaults: str) -> Iterator[tuple[str, str]]:
    keys = [key.strip("` ") for key in names.split(",")]
    yield from zip(keys, [part.strip() for part in defaults.split(",")] if len(keys) > 1 else [defaults], strict=True)


def is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Config)


@pytest.mark.parametrize(("heading", "config"), TABLES.items(), ids=TABLES.keys())
def test_every_key_is_documented_with_its_default(heading: str, config: type[Config]) -> None:
    documented = rows(heading)
    sections = {name for name, field in Recipe.model_fields.items() if is_section(field)} if config is Recipe else set()
    assert set(documented) - {"stage_defaults"} == set(config.model_fields) - sections
    check_defaults(documented, config)


@pytest.mark.parametrize(("heading", "config"), STEPS.items(), ids=STEPS.keys())
def test_every_key_of_a_step_is_documented_with_its_default(heading: str, config: type[Config]) -> None:
    documented = rows(heading, "steps.md")
    assert {*documented, "kind"} == set(config.model_fields)
    check_defaults(documented, config)


@pytest.mark.parametrize(("heading", "config"), [("Every key", KubernetesConfig), ("A toleration", TolerationConfig)])
def test_every_key_of_kubernetes_is_documented_with_its_default(heading: str, config: type[Config]) -> None:
    documented = rows(heading, "kubernetes.md")
    assert set(documented) == set(config.model_fields)
    check_defaults(documented, config)


def check_defaults(documented: dict[str, str], config: type[Config]) -> None:
    for key, shown in documented.items():
        field = config.model_fields.get(key)
        if field is None or shown == "–" or config is SamplingConfig:
            continue
        default: Any = list(field.default) if isinstance(field.default, tuple) else field.default
        assert (yaml.safe_load(shown) if shown != "empty" else "") == default, key


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in DOCS.glob("*.md"):
        for target, anchor in re.findall(r"\]\(([\w./-]+)(#[\w-]+)?\)", page.read_text()):
            assert (DOCS / target).is_file(), (page.name, target)
            headings = re.findall(r"(?m)^#+ (.+)$", (DOCS / target).read_text())
            assert not anchor or anchor[1:] in [heading.lower().replace(" ", "-") for heading in headings]
