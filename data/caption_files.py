"""Captions of a folder of audio from a captions file, JSON lines or CSV."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data import storage
from data.cloud import is_remote
from data.tables import NOT_UTF8, TABLES, column, header, rows
from model.errors import UserError

FILE_COLUMNS = ("file", "path", "audio", "file_name")
CAPTION_COLUMNS = ("caption", "captions", "text")
FOUND_BY_NAME = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")
MALFORMED = "malformed row"


def captions_file(named: str | None, folder: str, names: Sequence[str]) -> str | None:
    """Where the captions file of an audio folder is, which holds files called `names`: the one `named` in the recipe,
    or the one found at the folder's top.

    Found are the names of FOUND_BY_NAME, the first there is, or else the one CSV with columns for file and caption.
    Raises UserError when the named one is missing or several CSVs qualify.
    """
    if named is not None:
        return _named(named, folder, names)
    top = {name for name in names if "/" not in name}
    for name in FOUND_BY_NAME:
        if name in top:
            return storage.join(folder, name)
    tables = [name for name in sorted(top) if name.endswith(".csv") and _has_columns(storage.join(folder, name))]
    if len(tables) > 1:
        raise UserError(
            f"{folder} holds several tables of captions ({', '.join(tables)}): say which with data.captions."
        )
    return storage.join(folder, tables[0]) if tables else None


class Captions:
    """The captions of a captions file, by the name of an audio file.

    A row names its audio by path from the audio folder or from the captions file's folder, by absolute path, or by a
    file name that occurs once in the folder. `missing` lists (name, line) of rows whose audio is not there, `malformed`
    (name, reason, detail) of rows that are none.

    Raises UserError when the file cannot be read, or its header has no column for the file or none for the caption.
    """

    def __init__(self, path: str | None, folder: str, files: Mapping[str, str]) -> None:
        """`files` are the names of the audio files in `folder`, and where they are."""
        self.missing: list[tuple[str, int]] = []
        self.malformed: list[tuple[str, str, str]] = []
        self._captions: dict[str, list[str]] = {}
        if path is None:
            return
        if path.lower().endswith(TABLES) and not _has_columns(path):
            raise UserError(
                f"{path}:1: its header has no column for the file ({', '.join(FILE_COLUMNS)}) or none for the caption "
                f"({', '.join(CAPTION_COLUMNS)})."
            )
        finder = _Finder((folder, storage.parent(path)), files)
        try:
            for line, row in rows(path):
                self._add(line, row, finder, path.rpartition("/")[2])
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from None
        except UnicodeError:
            raise UserError(f"{path} is not a text file: save it as UTF-8.") from None

    def of(self, name: str) -> tuple[str, ...]:
        """The captions of an audio file without repeats."""
        return tuple(dict.fromkeys(text for caption in self._captions.get(name, ()) if (text := clean(caption))))

    def _add(self, line: int, row: dict[str, Any] | str, finder: _Finder, table: str) -> None:
        try:
            if isinstance(row, str):
                raise ValueError(row)
            name, captions = _name_and_captions(row)
        except ValueError as error:
            self.malformed.append((f"{table}:{line}", MALFORMED, f"line {line}: {error}"))
            return
        file = finder.find(name)
        if file is None:
            self.missing.append((name, line))
        else:
            self._captions.setdefault(file, []).extend(captions)


class _Finder:
    """Audio files by the names people give them."""

    def __init__(self, roots: tuple[str, str], files: Mapping[str, str]) -> None:
        self.roots = roots
        self.by_path = {_normal(location): name for name, location in files.items()}
        counts = Counter(_normal(PurePosixPath(name).name) for name in files)
        self.by_name = {last: name for name in files if counts[last := _normal(PurePosixPath(name).name)] == 1}

    def find(self, name: str) -> str | None:
        for spelling in dict.fromkeys((_normal(name), _normal(name.replace("\\", "/")))):
            for root in self.roots:
                path = _normal(storage.join(root, name if is_remote(name) else spelling))
                if path in self.by_path:
                    return self.by_path[path]
            if "/" not in spelling and spelling in self.by_name:
                return self.by_name[spelling]
        return None


def clean(text: str) -> str:
    """On one line, without what no text may hold (half of a surrogate pair)."""
    return " ".join(text.split()).encode("utf-8", "replace").decode()


def _normal(path: str) -> str:
    """One spelling for each path: without "./", accents composed (some systems store them apart)."""
    return unicodedata.normalize("NFC", PurePosixPath(path).as_posix())


def _named(named: str, folder: str, names: Sequence[str]) -> str:
    if is_remote(named):
        return named
    if is_remote(folder) and named in names:
        return storage.join(folder, named)
    for path in (Path(named).expanduser(), Path(folder) / named):
        if path.is_file():
            return str(path.absolute())
    raise UserError(f"data.captions names {named}, which is not a file, neither here nor in {folder}.")


def _has_columns(path: str) -> bool:
    try:
        names = header(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    return column(names, FILE_COLUMNS) is not None and column(names, CAPTION_COLUMNS) is not None


def _name_and_captions(row: dict[str, Any]) -> tuple[str, list[str]]:
    """Raises ValueError in words."""
    file_column, caption_column = column(row, FILE_COLUMNS), column(row, CAPTION_COLUMNS)
    if file_column is None or caption_column is None:
        raise ValueError(f"the row has no {' or '.join(FILE_COLUMNS if file_column is None else CAPTION_COLUMNS)}")
    name, captions = row[file_column], row[caption_column]
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ValueError(f"{file_column} must be the name of an audio file")
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{caption_column} must be text or a list of texts")
    if any(NOT_UTF8.search(caption) for caption in captions):
        raise ValueError(f"{caption_column} is not UTF-8 text")
    return name.strip(), captions
