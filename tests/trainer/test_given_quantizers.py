"""A recipe may name quantizers: they are used as they are, and refused in words where they do not fit it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_encoders import MERT, noise, save_mert

from launcher.graph import origins
from launcher.recipe import load_recipe
from model import artifact
from model.config import EncodersConfig, KMeansConfig, SemanticEncoderConfig
from model.encoders import encoder_fingerprint, feature_dim, load_semantic_encoder
from model.errors import UserError
from trainer.given_quantizers import find_given

SHAPES = {"conditioning": (3, 16, 128), "semantic": (1, 32, 92)}
"""As the built-in encoders of the quickstart make them."""


def give(folder: Path, standardised: bool = False, seed: int = 0, **shapes: tuple[int, int, int]) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with artifact.create(folder, "quantizers", "g" * 16) as (partial, info):
        shapes = shapes or SHAPES
        save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
                  partial / "quantizers.safetensors")  # fmt: skip
        for name, shape in shapes.items():
            info[name] = dict(zip(("levels", "codebook_size", "dim"), shape, strict=True))
        if "semantic" in shapes:
            info["semantic"]["standardised"] = standardised
    return folder


@pytest.fixture
def given(tmp_path):
    return give(tmp_path / "given")


def overrides(folder: Path) -> list[str]:
    return [
        f"quantizers.{name}.{key}={value}"
        for name, (levels, size, _) in SHAPES.items()
        for key, value in (("centroids", folder), ("levels", levels), ("codebook_size", size))
    ]


def fingerprints(*words: str) -> dict[str, str]:
    return {name: origin.fingerprint for name, origin in origins(load_recipe("quickstart", words)).items()}


def test_other_centroids_rebuild_what_depends_on_them_and_another_place_does_not(tmp_path, given):
    plain, first = fingerprints(), fingerprints(*overrides(given))
    assert {name for name in plain if plain[name] == first[name]} == {"corpus", "codec", "embedding"}
    moved = shutil.move(given, tmp_path / "moved")
    assert fingerprints(*overrides(moved)) == first
    other = fingerprints(*overrides(give(tmp_path / "other", seed=1)))
    assert other["quantizers"] != first["quantizers"]


def test_a_place_is_made_absolute(given, monkeypatch):
    monkeypatch.chdir(given.parent)
    assert load_recipe("quickstart", overrides(Path("given"))).quantizers.semantic.centroids == str(given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["quantizers.semantic.centroids=nowhere"], r"quantizers.semantic.centroids: .*nowhere is not a finished"),
        (["quantizers.conditioning.levels=8"], r"quantizers.conditioning.levels is 8, but that of .*given is 3"),
        (["quantizers.semantic.codebook_size=64"], r"quantizers.semantic.codebook_size is 64, but that of .* is 32"),
        (["encoders.joint.dim=64"], r"vectors of 128 numbers, but encoders.joint \(towers\) makes vectors of 64"),
        (["encoders.semantic.standardise=true"], r"standardise is true, but .*that are not standardised: set it to fa"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(given, change, words):
    with pytest.raises(UserError, match=words):
        fingerprints(*overrides(given), *change)


def test_a_damaged_or_half_empty_folder_is_said_before_anything_starts(tmp_path, given):
    only = give(tmp_path / "only", semantic=SHAPES["semantic"])
    with pytest.raises(UserError, match="only holds no conditioning quantizer"):
        fingerprints(*overrides(only))
    file = given / "quantizers.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"quantizers.conditioning.centroids: .*has changed"):
        fingerprints(*overrides(given))


def test_the_width_of_a_pretrained_encoder_is_known_without_its_weights(tmp_path):
    config = SemanticEncoderConfig(**MERT, weights=str(save_mert(tmp_path / "mert")))
    assert feature_dim(config) == load_semantic_encoder(config).dim == 32
    give(tmp_path / "given", semantic=(1, 8, 768))
    kmeans = KMeansConfig(codebook_size=8, centroids=str(tmp_path / "given"))
    with pytest.raises(UserError, match=r"768 numbers, but encoders.semantic \(mert\) makes vectors of 32"):
        find_given("semantic", kmeans, EncodersConfig(semantic=config))


def test_features_are_standardised_as_the_predecessor_does():
    """And by default they are not, and have the fingerprint that they had before there was a choice."""
    plain, config = SemanticEncoderConfig(), SemanticEncoderConfig(standardise=True)
    x = noise(16_000, 0.5)
    features = load_semantic_encoder(plain).features(x)
    expected = (features - features.mean(-1, keepdim=True)) / torch.sqrt(features.var(-1, keepdim=True) + 1e-7)
    encoder = load_semantic_encoder(config)
    assert torch.equal(encoder.features(x), expected)
    assert (encoder.sample_rate, encoder.rate_hz, encoder.dim) == (16_000, 25, 92)
    assert encoder_fingerprint(plain) == "a7f6b28b3f2b5c16"
    assert encoder_fingerprint(config) != encoder_fingerprint(plain)
    assert "encoders.semantic.standardise" not in origins(load_recipe("quickstart"))["tokens"].keys
    changed = fingerprints("encoders.semantic.standardise=true")
    assert {name for name, value in fingerprints().items() if changed[name] == value} == {
        "corpus",
        "codec",
        "embedding",
    }
