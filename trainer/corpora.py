"""The corpora that a stage is trained on: brought to this node and checked before the first step."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from data.cloud import is_remote
from data.mixture import Mixture, Selection
from data.shard_cache import fetch_split, least_cache
from data.token_corpus import (
    TRAIN,
    VALIDATION,
    TokenCorpus,
    artifact_manifest,
    copy_metadata,
    disagreements,
    index_problems,
)
from model import artifact
from model.errors import UserError
from trainer.agreement import raise_alike, said
from trainer.setup import StageSetup

if TYPE_CHECKING:
    from trainer.engine import Engine


def cache_folder(setup: StageSetup) -> Path:
    """Where this node keeps what this stage of this run fetches; no other job uses it."""
    root = Path(setup.config.train.cache or setup.run / "cache")
    return root / platform.node() / f"{setup.stage}-{artifact.fingerprint(str(setup.run.absolute()))}"


def mixture(setup: StageSetup) -> Mixture:
    """What the recipe says the stage is trained on. Raises UserError where a corpus is not what it names."""
    train = setup.config.train
    others = (_other(setup, number) for number in range(len(train.mix)))
    weights = (train.own_weight, *(other.weight for other in train.mix))
    phases = [
        Selection(tuple(phase.weights or weights), (train.filter, phase.filter), phase.steps)
        for phase in train.curriculum
    ]
    corpora = (TokenCorpus.read(setup.tokens), *others)
    return Mixture(corpora, tuple(phases or [Selection(weights, (train.filter,))]), train.shuffle_block)


def validation_corpus(setup: StageSetup) -> TokenCorpus:
    """The run's own corpus with its validation shards in place, after `prepare`."""
    own = TokenCorpus.read(setup.tokens)
    if not own.cached(VALIDATION):
        return own
    return replace(own, folder=cache_folder(setup) / own.fingerprint, remote=None)


def training_cache(setup: StageSetup) -> int | None:
    """Bytes that training shards may take, where the recipe sets a limit."""
    limit = setup.config.train.cache_bytes
    return None if limit is None else limit - _validation_bytes(TokenCorpus.read(setup.tokens))


def prepare(setup: StageSetup, engine: Engine) -> None:
    """Brings what is in buckets and describes the corpora, and the run's own validation shards, to this node; checks
    that corpora go together, and their shards. The ranks share the work.

    Raises the same UserError on all ranks where something is not what it should be.
    """
    cache, leads = cache_folder(setup), int(os.environ.get("LOCAL_RANK", "0")) == 0

    def agreed(problem: str | None) -> None:
        raise_alike([found for found in engine.gather(problem) if found is not None])

    agreed(said(lambda: _fetch_metadata(setup), cache) if leads else None)
    agreed(said(lambda: _check(setup), cache) if engine.rank == 0 else None)
    for corpus in mixture(setup).corpora:
        damaged = engine.gather(corpus.damage((engine.rank, engine.world_size)))
        if wrong := [problem for part in damaged for problem in part]:
            raise UserError(f"the token shards are damaged: {'; '.join(wrong)}.\n{_remedy(setup, corpus)}")
    agreed(said(lambda: _fetch_validation(setup), cache) if leads else None)


def _other(setup: StageSetup, number: int) -> TokenCorpus:
    address = setup.config.train.mix[number].tokens
    if is_remote(address):
        return TokenCorpus.read(_metadata(setup, number), address.rstrip("/"))
    return TokenCorpus.read(Path(artifact_manifest(address)[0]))


def _metadata(setup: StageSetup, number: int) -> Path:
    return cache_folder(setup) / f"mix-{number}"


def _fetch_metadata(setup: StageSetup) -> None:
    """Also removes what was kept of corpora that are no longer used."""
    for number, other in enumerate(setup.config.train.mix):
        if is_remote(other.tokens):
            address, _ = artifact_manifest(other.tokens)
            copy_metadata(address, _metadata(setup, number))
    used = {corpus.fingerprint for corpus in mixture(setup).corpora}
    used |= {_metadata(setup, number).name for number in range(len(setup.config.train.mix))}
    cache = cache_folder(setup)
    for folder in cache.iterdir() if cache.exists() else ():
        if folder.name not in used:
            shutil.rmtree(folder)


def _check(setup: StageSetup) -> None:
    own, *others = mixture(setup).corpora
    problems: list[str] = []
    for other in others:
        where = f"{own.address} and {other.address} cannot be mixed (train.mix)"
        problems += disagreements(own.manifest, other.manifest, where)
    if len({corpus.fingerprint for corpus in others}) < len(others):
        problems.append("train.mix names the same tokens twice: name them once, with the sum of the weights.")
    if problems:
        raise UserError("\n".join(problems))
    for corpus, splits in ((own, (TRAIN, VALIDATION)), *((other, (TRAIN,)) for other in others)):
        if wrong := [problem for split in splits for problem in index_problems(corpus, split)]:
            raise UserError(f"an index does not match its shards: {'; '.join(wrong)}.\n{_remedy(setup, corpus)}")
    if problem := next(_cache_problems(setup), None):
        raise UserError(problem)


def _remedy(setup: StageSetup, corpus: TokenCorpus) -> str:
    if corpus.folder == setup.tokens:
        return f"Move {setup.tokens} away and run the same command again: it makes them anew."
    return f"Bring a whole copy of them to {corpus.address}."


def _cache_problems(setup: StageSetup) -> Iterator[str]:
    limit, corpora = setup.config.train.cache_bytes, mixture(setup).corpora
    if limit is None:
        return
    if not any(corpus.cached(TRAIN) for corpus in corpora):
        yield (
            "train.cache_limit is set, but no corpus is in a bucket or compressed: their shards are read where they "
            "lie, and nothing is cached. Leave it away."
        )
        return
    validation = _validation_bytes(corpora[0])
    least = validation + least_cache(corpora, TRAIN, setup.config.train.workers)
    if limit < least:
        kept = f", with the validation shards' {validation:,}" if validation else ""
        yield (
            f"train.cache_limit is {limit:,} bytes, too small for shards of this size with so many ranks and workers: "
            f"it must be at least {least:,} bytes{kept}. Raise it, or use fewer workers."
        )


def _validation_bytes(own: TokenCorpus) -> int:
    """What the run's own validation shards take of the cache, where they all stay."""
    return sum(entry["raw_data"]["bytes"] for entry in own.index(VALIDATION)) if own.cached(VALIDATION) else 0


def _fetch_validation(setup: StageSetup) -> None:
    own = TokenCorpus.read(setup.tokens)
    if own.cached(VALIDATION):
        fetch_split(own, VALIDATION, cache_folder(setup))
