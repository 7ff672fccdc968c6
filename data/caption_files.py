"""Captions of a user's own audio: from a captions file (JSON lines or CSV), or from NAME.txt beside each file."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from model.errors import UserError

FILE_COLUMNS = ("file", "path", "audio", "file_name")
CAPTION_COLUMNS = ("caption", "captions", "text")
FOUND_BY_NAME = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")


def captions_file(named: str | None, folder: Path) -> Path | None:
    """The captions file of an audio folder: the one `named` in the recipe, or the one found at the folder's top.

    Found are the names of FOUND_BY_NAME, the first there is, or else the one CSV with columns for file and caption.
    Raises UserError when the named one is missing or several CSVs qualify.
    """
    if named is not None:
        path = next((path for path in (Path(named).expanduser(), folder / named) if path.is_file()), None)
        if path is None:
            raise UserError(f"data.captions names {named}, which is not a file, neither here nor in {folder}.")
        return path.absolute()
    for name in FOUND_BY_NAME:
        if (folder / name).is_file():
            return folder / name
    tables = [path for path in sorted(folder.glob("*.csv")) if path.is_file() and _is_captions_table(path)]
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise UserError(f"{folder} holds several tables of captions ({names}): say which with data.captions.")
    return tables[0] if tables else None


class Captions:
    """The captions of a captions file, by audio file.

    A row names its audio by path from the audio folder or from the captions file's folder, by absolute path, or by a
    file name that occurs once in the folder. `missing` lists (name, line) of rows whose audio is not there.
    """

    def __init__(self, path: Path | None, folder: Path, files: list[Path]) -> None:
        self.missing: list[tuple[str, int]] = []
        self._captions: dict[Path, list[str]] = {}
        if path is None:
            return
        finder = _Finder(folder, path.parent, files)
        for line, name, texts in _rows(path):
            file = finder.find(name)
            if file is None:
                self.missing.append((name, line))
            else:
                self._captions.setdefault(file, []).extend(texts)

    def of(self, file: Path) -> tuple[str, ...]:
        """The captions of an audio file without repeats: its rows', or else the lines of NAME.txt beside it.

        Raises UnicodeDecodeError when NAME.txt is not UTF-8 text.
        """
        found = self._captions.get(file) or _lines(file.with_suffix(".txt"))
        return tuple(dict.fromkeys(clean for text in found if (clean := _clean(text))))


class _Finder:
    """Audio files by the names people give them."""

    def __init__(self, folder: Path, beside: Path, files: list[Path]) -> None:
        self.roots = (folder, beside)
        self.by_path = {_normal(file.as_posix()): file for file in files}
        counts = Counter(_normal(file.name) for file in files)
        self.by_name = {name: file for file in files if counts[name := _normal(file.name)] == 1}

    def find(self, name: str) -> Path | None:
        for spelling in dict.fromkeys((_normal(name), _normal(name.replace("\\", "/")))):
            for root in self.roots:
                path = _normal((root / spelling).as_posix())  # an absolute path replaces the root
                if path in self.by_path:
                    return self.by_path[path]
            if "/" not in spelling and spelling in self.by_name:
                return self.by_name[spelling]
        return None


def _normal(path: str) -> str:
    """One spelling for each path: without "./", accents composed (some systems store them apart)."""
    return unicodedata.normalize("NFC", PurePosixPath(path).as_posix())


def _clean(text: str) -> str:
    """On one line, without what no text may hold (half of a surrogate pair)."""
    return " ".join(text.split()).encode("utf-8", "replace").decode()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else []


def _rows(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Line number, file name and captions of each row. Raises UserError with the line of a malformed one."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _table_rows(path, file) if path.suffix.lower() == ".csv" else _json_rows(path, file)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8.") from None


def _json_rows(path: Path, file: Any) -> Iterator[tuple[int, str, list[str]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}). Each line must be one object.") from None
        if not isinstance(row, dict):
            raise UserError(f'{path}:{number}: not an object such as {{"file": "a.wav", "caption": "..."}}.')
        yield number, *_name_and_captions(path, number, row)


def _table_rows(path: Path, file: Any) -> Iterator[tuple[int, str, list[str]]]:
    reader = _table(file)
    try:
        names = reader.fieldnames or ()
        if not (_column(names, FILE_COLUMNS) and _column(names, CAPTION_COLUMNS)):
            raise UserError(
                f"{path}:1: its header has no column for the file ({', '.join(FILE_COLUMNS)}) or none for the caption "
                f"({', '.join(CAPTION_COLUMNS)})."
            )
        for row in reader:
            yield reader.line_num, *_name_and_captions(path, reader.line_num, row)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.reader.line_num}: not a CSV row ({error}).") from None


def _table(file: Any) -> csv.DictReader:
    """A reader that takes the separator from the header: some spreadsheets write semicolons or tabs."""
    header = file.readline()
    file.seek(0)
    return csv.DictReader(file, delimiter=max(",;\t", key=header.count), skipinitialspace=True, strict=True)


def _is_captions_table(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = _table(file).fieldnames or ()
    except (UnicodeDecodeError, csv.Error):
        return False
    return _column(names, FILE_COLUMNS) is not None and _column(names, CAPTION_COLUMNS) is not None


def _column(names: Any, wanted: tuple[str, ...]) -> str | None:
    """The key among `names` that is one of `wanted`, in any case, the first wanted first."""
    lowered = {name.strip().lower(): name for name in names if isinstance(name, str)}
    return next((lowered[name] for name in wanted if name in lowered), None)


def _name_and_captions(path: Path, number: int, row: dict) -> tuple[str, list[str]]:
    file_column, caption_column = _column(row, FILE_COLUMNS), _column(row, CAPTION_COLUMNS)
    if file_column is None or caption_column is None:
        needed = " or ".join(FILE_COLUMNS if file_column is None else CAPTION_COLUMNS)
        raise UserError(f"{path}:{number}: the row has no {needed}.")
    name, captions = row[file_column], row[caption_column]
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise UserError(f"{path}:{number}: {file_column} must be the name of an audio file.")
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{path}:{number}: {caption_column} must be text or a list of texts.")
    return name.strip(), captions
