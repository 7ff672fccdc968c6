"""The frozen encoders, one class each, chosen by `kind`. A new one is a new file and a line in one of these tables."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.config import CodecConfig, JointEmbedderConfig, SemanticEncoderConfig
    from model.encoders.base import Codec, JointEmbedder, SemanticEncoder

# module:class, imported when asked for: none should wait for the libraries of another.
CODECS = {"mel": "model.encoders.mel:MelCodec", "encodec": "model.encoders.encodec:EncodecCodec"}
SEMANTIC_ENCODERS = {
    "mel_chroma": "model.encoders.chroma:MelChroma",
    "mert": "model.encoders.hubert:HubertEncoder",
    "hubert": "model.encoders.hubert:HubertEncoder",
}
JOINT_EMBEDDERS = {"towers": "model.encoders.towers:TwoTowers", "clap": "model.encoders.clap:ClapEmbedder"}


def encoder_class(table: dict[str, str], kind: str) -> Any:
    """The class that `kind` names in one of the tables above."""
    module, name = table[kind].split(":")
    return getattr(import_module(module), name)


def load_codec(folder: Path, config: CodecConfig) -> Codec:
    """The codec kept in `folder` (an artifact's or a bundle's); a pretrained one is read from `config.weights`."""
    return encoder_class(CODECS, config.kind).load(folder, config)


def load_semantic_encoder(config: SemanticEncoderConfig) -> SemanticEncoder:
    """The semantic encoder that `config` describes: it has no fitted parts of its own."""
    encoder = encoder_class(SEMANTIC_ENCODERS, config.kind)(config)
    if not config.standardise:
        return encoder
    from model.encoders.standardised import Standardised

    return Standardised(encoder)


def feature_dim(config: SemanticEncoderConfig) -> int:
    """Numbers in a feature of the semantic encoder that `config` describes, found without its weights.

    Raises UserError where there are none.
    """
    return encoder_class(SEMANTIC_ENCODERS, config.kind).feature_dim(config)


def load_joint_embedder(folder: Path, config: JointEmbedderConfig) -> JointEmbedder:
    """The joint embedder kept in `folder`; a pretrained one is read from `config.weights`."""
    return encoder_class(JOINT_EMBEDDERS, config.kind).load(folder, config)


def encoder_fingerprint(config: CodecConfig | SemanticEncoderConfig | JointEmbedderConfig) -> str:
    """Changes with the configuration and, for a pretrained encoder, with the bytes of its weights."""
    from model.artifact import fingerprint
    from model.encoders.pretrained import SECTIONS, weights_digest

    values = config.model_dump(mode="json")
    if not values.get("standardise"):
        values.pop("standardise", None)  # it came later, and older fingerprints stay
    if config.kind not in SECTIONS:
        return fingerprint(values, None)
    # Where the files lie does not matter.
    described = {name: value for name, value in values.items() if name not in ("weights", "tokenizer")}
    return fingerprint(described, weights_digest(config))
