"""From audio to token shards. The bodies import what they need when they run: the command line stays quick."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launcher.stage import Context, Stage, picked
from model import artifact

if TYPE_CHECKING:
    from launcher.recipe import Recipe
    from model.config import CodecConfig, EncodersConfig, JointEmbedderConfig, SemanticEncoderConfig

SHARED_KEYS = ("seed", "data.audio", "data.clip_seconds", "data.validation")
BUILTIN_KEYS = (*SHARED_KEYS, "data.clips", "data.sample_rate")
OWN_KEYS = (
    *SHARED_KEYS,
    *(
        f"data.{name}"
        for name in (
            "format", "captions", "shortest_seconds", "test", "split_by", "silence_db", "most_clipped", "duplicates",
            "channels", "loudness", "tag_captions",
        )
    ),
)  # fmt: skip
FILES = "the files in data.audio"
TOKENS_NEED = ("corpus", "codec", "embedding", "quantizers")
PLACES = tuple(f"quantizers.{name}.centroids" for name in ("conditioning", "semantic"))
"""Where given quantizers lie, which does not matter."""
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
    from data.indexing import index_audio

    return index_audio(context.folder, data, seed, context.progress)


def codec_keys(recipe: Recipe) -> dict[str, Any]:
    return {**picked("seed", "encoders.codec")(recipe), **_weights("codec", recipe.encoders.codec)}


def codec(context: Context) -> dict[str, Any]:
    from trainer.fitting import fit_codec

    encoders, seed = context.recipe.encoders, context.recipe.seed
    info = fit_codec(context.run / "corpus", encoders.codec, seed, context.folder, context.progress)
    if encoders.check:
        from model.encoders import load_codec
        from model.encoders.check import check_codec

        check_codec(load_codec(context.folder, encoders.codec))
    return {**info, **_fingerprints(encoders, "codec")}


def embedding_keys(recipe: Recipe) -> dict[str, Any]:
    # The hop says where clips are embedded later, not how the towers are trained.
    keys = picked("seed", "encoders.joint", without=(HOP,))(recipe)
    return {**keys, **_weights("joint", recipe.encoders.joint)}


def embedding(context: Context) -> dict[str, Any]:
    from trainer.embedding import train_embedder

    encoders, seed = context.recipe.encoders, context.recipe.seed
    info = train_embedder(context.run / "corpus", encoders.joint, seed, context.folder, context.progress)
    if encoders.check:
        from model.encoders import load_joint_embedder
        from model.encoders.check import check_joint

        check_joint(load_joint_embedder(context.folder, encoders.joint))
    return {**info, **_fingerprints(encoders, "joint")}


def quantizers_keys(recipe: Recipe) -> dict[str, Any]:
    keys = picked("seed", "quantizers", "encoders.semantic", HOP, without=PLACES)(recipe)
    return {**keys, **_weights("semantic", recipe.encoders.semantic), **_given(recipe)}


def _given(recipe: Recipe) -> dict[str, Any]:
    """For quantizers that are given and not fitted, what changes with their centroids."""
    from trainer.given_quantizers import find_given

    found = {name: find_given(name, config, recipe.encoders) for name, config in recipe.quantizers}
    return {f"the centroids of quantizers.{name}": given.manifest["files"] for name, given in found.items() if given}


def quantizers(context: Context) -> dict[str, Any]:
    from trainer.fitting import fit_quantizers

    recipe = context.recipe
    if recipe.encoders.check:
        from model.encoders import load_semantic_encoder
        from model.encoders.check import check_semantic

        check_semantic(load_semantic_encoder(recipe.encoders.semantic))
    info = fit_quantizers(
        context.run / "corpus",
        context.run / "embedding",
        recipe.encoders,
        recipe.quantizers,
        recipe.seed,
        context.folder,
        context.progress,
        context.ranks,
    )
    return {**info, **_fingerprints(recipe.encoders, "semantic", "joint")}


def tokens_keys(recipe: Recipe) -> dict[str, Any]:
    from data.steps import steps_digests

    keys = picked("encoders.semantic", HOP, "tokens", without=("tokens.batch_seconds",))(recipe)
    return {**keys, **_weights("semantic", recipe.encoders.semantic), **steps_digests(recipe.tokens.steps)}


def tokens(context: Context) -> dict[str, Any]:
    from data.shard_writer import check_place
    from data.tokenise import tokenise

    recipe = context.recipe
    if recipe.tokens.upload and (context.ranks is None or context.ranks.leads):
        check_place(recipe.tokens.upload, artifact.made_for(context.folder))
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
    return {**info, **_fingerprints(recipe.encoders, "codec", "semantic", "joint")}


def publish_tokens(context: Context) -> None:
    """Lets shards that are kept elsewhere stand on their own there: the manifest comes last."""
    from data.shard_writer import upload

    if context.recipe.tokens.upload:
        upload(context.folder, context.recipe.tokens.upload, artifact.MANIFEST)


def _fingerprints(encoders: EncodersConfig, *names: str) -> dict[str, Any]:
    """What a manifest says of the encoders that were used: it changes with the bytes of their weights."""
    from model.encoders import encoder_fingerprint

    return {"encoders": {name: encoder_fingerprint(getattr(encoders, name)) for name in names}}


def data_ranks(recipe: Recipe) -> int:
    return recipe.data.ranks


def _weights(name: str, config: CodecConfig | SemanticEncoderConfig | JointEmbedderConfig) -> dict[str, Any]:
    """For a pretrained encoder, what changes with the bytes of its weights."""
    from model.encoders import encoder_fingerprint

    builtin = {"mel", "mel_chroma", "towers"}
    return {} if config.kind in builtin else {f"the weights of encoders.{name}": encoder_fingerprint(config)}


STAGES = (
    Stage("corpus", (), corpus_keys, 1, corpus),
    Stage("codec", ("corpus",), codec_keys, 2, codec),
    Stage("embedding", ("corpus",), embedding_keys, 1, embedding),
    Stage("quantizers", ("corpus", "embedding"), quantizers_keys, 2, quantizers, data_ranks),
    Stage("tokens", TOKENS_NEED, tokens_keys, 2, tokens, data_ranks, resumed=True, sealed=publish_tokens),
)
