"""Sources of audio: what `data.audio` may name. A new kind is a file here and a line in the table below."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data import storage
from data.cloud import is_remote
from data.config import DataConfig
from data.raw_shards import INDEX
from data.sources.base import AUDIO_SUFFIXES, Source
from data.sources.folder import FolderSource, suffix
from data.sources.manifest import MANIFESTS, ManifestSource
from data.sources.mds import MdsSource
from data.sources.webdataset import WebDatasetSource
from data.storage import Entry
from model.errors import UserError

SOURCES: dict[str, Callable[[DataConfig, list[Entry]], Source]] = {
    "folder": FolderSource,
    "manifest": lambda config, entries: ManifestSource(config),
    "mds": lambda config, entries: MdsSource(config),
    "webdataset": WebDatasetSource,
}


def open_source(config: DataConfig) -> Source:
    """The source that `config.audio` names, of the kind of `config.format` or found by what is there.

    Raises UserError where there is nothing, or nothing of that kind.
    """
    assert config.audio is not None
    place = storage.absolute(config.audio)
    config = config.model_copy(update={"audio": place})
    kind, entries = _by_name(place), []
    if kind is None:
        if config.format == "manifest":
            raise UserError(f"data.format is manifest, but the name of {place} does not end in {', '.join(MANIFESTS)}.")
        if not storage.is_folder(place):
            raise UserError(f"data.audio must be a folder of audio, a manifest or tar files; {place} {_what(place)}.")
        entries = storage.files_below(place)
        kind = _by_content(entries)
    kind = kind if config.format == "auto" else config.format
    if config.captions is not None and kind != "folder":
        raise UserError(
            f"data.captions goes with a folder of files, not with {place} ({kind}): write them beside the audio."
        )
    return SOURCES[kind](config, entries)


def sources_fingerprint(config: DataConfig) -> str:
    """Changes when a file of the source is added, removed or changed, by names, sizes and times or tags.

    No audio is read, so it is quick. Raises UserError where the source as a whole cannot be used.
    """
    return open_source(config).fingerprint()


def _by_name(place: str) -> str | None:
    """The kind of what is no folder."""
    if not is_remote(place) and Path(place).is_dir():
        return None
    if place.lower().endswith(MANIFESTS):
        return "manifest"
    return "webdataset" if place.endswith(".tar") or "{" in place.rpartition("/")[2] else None


def _by_content(entries: list[Entry]) -> str:
    """The kind of a folder with these files."""
    if any(entry.name == INDEX for entry in entries) and any(".mds" in entry.name for entry in entries):
        return "mds"
    suffixes = {suffix(entry.name) for entry in entries}
    return "webdataset" if ".tar" in suffixes and not suffixes & AUDIO_SUFFIXES else "folder"


def _what(place: str) -> str:
    if is_remote(place):
        return "holds no objects"
    return "is a file" if storage.is_file(place) else "does not exist"
