"""From audio to token shards. The bodies import what they need when they run: the command line stays quick."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launcher.stage import Context, Stage, picked

if TYPE_CHECKING:
    from launcher.recipe import Recipe
    from model.config import CodecConfig, JointEmbedderConfig, SemanticEncoderConfig

SHARED_KEYS = ("seed", "data.audio", "data.clip_seconds", "data.validation")
BUILTIN_KEYS = (*SHARED_KEYS, "data.clips", "data.sample_rate")
OWN_KEYS = (*SHARED_KEYS, "data.captions", "data.shortest_seconds", "data.silence_db")
FILES = "the files in data.audio"
TOKENS_NEED = ("corpus", "codec", "embedding", "quantizers")
HOP = "encoders.joint.hop_seconds"


def corpus_keys(recipe: Recipe) -> dict[str, Any]:
    if recipe.data.audio is None:
        return picked(*BUILTIN_KEYS)(recipe)
    from data.sources import sources_fingerprint

    return {**picked(*OWN_KEYS)(recipe), FILES: sources_fingerprint(recipe.data)}


def corpus(context: Context) -> dict[str, Any]:
    data, seed = context.recipe.data, context.recipe.seed
    if data.audio is None:
        from data.builtin import write_corpus

        return write_corpus(context.folder, data, seed, context.progress)
    from data.sources import index_folder

    return index_folder(context.folder, data, seed, context.progress)


def codec_keys(recipe: Recipe) -> dict[str, Any]:
    return {**picked("seed", "encoders.codec")(recipe), **_weights("codec", recipe.encoders.codec)}


def codec(context: Context) -> dict[str, Any]:
    from trainer.fitting import fit_codec

    config, seed = context.recipe.encoders.codec, context.recipe.seed
    return fit_codec(context.run / "corpus", config, seed, context.folder, context.progress)


def embedding_keys(recipe: Recipe) -> dict[str, Any]:
    # The hop says where clips are embedded later, not how the towers are trained.
    keys = picked("seed", "encoders.joint", without=(HOP,))(recipe)
    return {**keys, **_weights("joint", recipe.encoders.joint)}


def embedding(context: Context) -> dict[str, Any]:
    from trainer.embedding import train_embedder

    config, seed = context.recipe.encoders.joint, context.recipe.seed
    return train_embedder(context.run / "corpus", config, seed, context.folder, context.progress)


def quantizers_keys(recipe: Recipe) -> dict[str, Any]:
    keys = picked("seed", "quantizers", "encoders.semantic", HOP)(recipe)
    return {**keys, **_weights("semantic", recipe.encoders.semantic)}


def quantizers(context: Context) -> dict[str, Any]:
    from trainer.fitting import fit_quantizers

    recipe = context.recipe
    return fit_quantizers(
        context.run / "corpus",
        context.run / "embedding",
        recipe.encoders,
        recipe.quantizers,
        recipe.seed,
        context.folder,
        context.progress,
    )


def tokens_keys(recipe: Recipe) -> dict[str, Any]:
    from data.steps import steps_digests

    keys = picked("encoders.semantic", HOP, "tokens", without=("tokens.batch_seconds",))(recipe)
    return {**keys, **steps_digests(recipe.tokens.steps)}


def tokens(context: Context) -> dict[str, Any]:
    from data.tokenise import tokenise

    recipe = context.recipe
    corpus, codec, embedding, quantizers = (context.run / name for name in TOKENS_NEED)
    info, files = tokenise(
        corpus,
        codec,
        embedding,
        quantizers,
        recipe.encoders,
        recipe.tokens,
        context.folder,
        context.progress,
        context.ranks,
        recipe.data.workers,
    )
    context.files.update(files)
    return info


def _weights(name: str, config: CodecConfig | SemanticEncoderConfig | JointEmbedderConfig) -> dict[str, Any]:
    """For a pretrained encoder, what changes with the bytes of its weights."""
    from model.encoders import encoder_fingerprint

    builtin = {"mel", "mel_chroma", "towers"}
    return {} if config.kind in builtin else {f"the weights of encoders.{name}": encoder_fingerprint(config)}


STAGES = (
    Stage("corpus", (), corpus_keys, 1, corpus),
    Stage("codec", ("corpus",), codec_keys, 1, codec),
    Stage("embedding", ("corpus",), embedding_keys, 1, embedding),
    Stage("quantizers", ("corpus", "embedding"), quantizers_keys, 1, quantizers),
    Stage(
        "tokens",
        TOKENS_NEED,
        tokens_keys,
        2,
        tokens,
        lambda recipe: recipe.data.ranks,
        resumed=True,
    ),
)
