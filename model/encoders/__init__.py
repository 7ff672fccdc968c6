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
    return encoder_class(SEMANTIC_ENCODERS, config.kind)(config)


def load_joint_embedder(folder: Path, config: JointEmbedderConfig) -> JointEmbedder:
    """The joint embedder kept in `folder`; a pretrained one is read from `config.weights`."""
    return encoder_class(JOINT_EMBEDDERS, config.kind).load(folder, config)


def encoder_fingerprint(config: CodecConfig | SemanticEncoderConfig | JointEmbedderConfig) -> str:
    """Changes with the configuration and, for a pretrained encoder, with the bytes of its weights."""
    from model.artifact import fingerprint
    from model.encoders.pretrained import SECTIONS, weights_digest

    if config.kind not in SECTIONS:
        return fingerprint(config.model_dump(mode="json"), None)
    # Where the files lie does not matter.
    return fingerprint(config.model_dump(mode="json", exclude={"weights", "tokenizer"}), weights_digest(config))
