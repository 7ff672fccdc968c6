"""A bundle whose models were never trained, made in a second: every part is real, and small."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from model import artifact
from model.bundle import CODEC, JOINT, KIND, QUANTIZERS
from model.config import (
    STAGES,
    CodecConfig,
    ConditionConfig,
    EncodersConfig,
    JointEmbedderConfig,
    StageModelConfig,
    TransformerConfig,
)
from model.encoders.mel import MelCodec
from model.encoders.towers import TwoTowers, fit_tokenizer
from model.fields import ACOUSTIC, CONDITIONING, SEMANTIC, TokenField
from model.kmeans import ResidualKMeans
from model.stage import StageTransformer, build_stage

ENCODERS = EncodersConfig(
    codec=CodecConfig(quantizers=3, codebook_size=32), joint=JointEmbedderConfig(dim=16, width=64)
)
WINDOW_SECONDS = 1.0
FIELDS = {
    CONDITIONING: TokenField(CONDITIONING, 0.2, 2, 16),
    SEMANTIC: TokenField(SEMANTIC, 25, 1, 32),
    ACOUSTIC: TokenField(ACOUSTIC, 25, 3, 32),
}
TRANSFORMER = TransformerConfig(dim=32, layers=1, heads=1)
PROMPTS = ["a slow flute", "a fast low bell with drums"]


def fitted_parts(encoders: EncodersConfig = ENCODERS) -> tuple[MelCodec, TwoTowers, dict[str, torch.Tensor]]:
    """A codec, a joint embedder and the centroids of the conditioning."""
    towers = TwoTowers(encoders.joint, fit_tokenizer(PROMPTS, 128)).eval()
    codec = MelCodec(encoders.codec)
    codec.quantizer.fit([codec.vectors(0.3 * torch.randn(4, 32_000).cumsum(1).sin()).flatten(0, 1)])
    conditioning = ResidualKMeans(2, 16, encoders.joint.dim)
    words = " ".join(PROMPTS).split()
    # Embeddings of untrained towers lie close together: only centroids among them tell the prompts apart.
    conditioning.fit([towers.embed_text([" ".join(words[i:j]) for j in range(len(words) + 1) for i in range(j)])])
    return codec, towers, {CONDITIONING: conditioning.centroids}


def random_stage(
    config: StageModelConfig, quantizers: dict[str, torch.Tensor], fields: dict[str, TokenField] = FIELDS
) -> StageTransformer:
    """With weights large enough for the prompt and every code to matter."""
    stage = build_stage(config, fields, quantizers)
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return stage


def make_bundle(
    folder: Path,
    *,
    captions: bool = True,
    encoders: EncodersConfig = ENCODERS,
    stages: dict[str, StageModelConfig] | None = None,
) -> Path:
    """Writes a bundle to `folder`, of `stages` where they are not `stage_configs()`."""
    stages = stages or stage_configs()
    torch.manual_seed(0)
    codec, towers, quantizers = fitted_parts(encoders)
    with artifact.create(folder, KIND, "0" * 16) as (partial, info):
        for name, config in stages.items():
            save_file(random_stage(config, quantizers).state_dict(), partial / f"{name}.safetensors")
        save_file(quantizers, partial / QUANTIZERS)
        for part, model in ((CODEC, codec), (JOINT, towers)):
            (partial / part).mkdir(parents=True)
            model.save(partial / part)
        info.update(
            fields={name: field.to_json() for name, field in FIELDS.items()},
            captions=captions,
            encoders=encoders.model_dump(mode="json"),
            sampling={},
            stages={name: config.model_dump(mode="json") for name, config in stages.items()},
        )
    return folder


def stage_configs(transformer: TransformerConfig = TRANSFORMER) -> dict[str, StageModelConfig]:
    described = ConditionConfig(field=CONDITIONING, paths=["prefix", "summed"])
    common = {"window_seconds": WINDOW_SECONDS, "transformer": transformer}
    parts = {
        "semantic": {"field": SEMANTIC, "conditions": [described]},
        "coarse": {
            "field": ACOUSTIC,
            "last": 1,
            "conditions": [described, ConditionConfig(field=SEMANTIC, paths=["aligned"])],
        },
        "fine": {
            "field": ACOUSTIC,
            "first": 1,
            "conditions": [ConditionConfig(field=ACOUSTIC, last=1, paths=["aligned"])],
        },
    }
    return {name: StageModelConfig(**parts[name], **common) for name in STAGES}
