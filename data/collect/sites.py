"""The one way in to yt-dlp, which knows how many sites keep their audio. Imported when an address needs it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from data.collect.failure import Failure, Stopped
from data.collect.hosts import Hosts
from data.collect.limits import Limits

EXTRA = "pip install 'stretto[collect]'"
GENERIC = "generic"
"""The extractor that takes any address and guesses."""


def installed() -> bool:
    return importlib.util.find_spec("yt_dlp") is not None


def knows(url: str) -> bool:
    """Whether `url` is a page of a site for which yt-dlp has an extractor."""
    return installed() and any(extractor.suitable(url) for extractor in _extractors())


def fetch(url: str, stem: Path, agent: str, hosts: Hosts, limits: Limits, count: Callable[[int], None]) -> Path:
    """Fetches the audio of a page to a file that is named `stem` and a suffix, and returns its path.

    `count(bytes)` is told what arrives. What has come of it is gone on with another time. Raises Failure and Stopped.
    """
    import yt_dlp

    arrived = 0

    def report(status: dict[str, Any]) -> None:
        nonlocal arrived
        if hosts.stopped:
            raise Stopped
        now = status.get("downloaded_bytes") or 0
        if now > limits.largest:
            raise Failure("too large", f"more than {limits.largest:,} bytes")
        count(max(0, now - arrived))
        arrived = now

    options = {
        "format": "bestaudio",
        "outtmpl": f"{str(stem).replace('%', '%%')}.%(ext)s",
        "allowed_extractors": ["default", f"-{GENERIC}"],
        "playlist_items": "0",  # of a list of pages nothing is fetched
        "noplaylist": True,
        "max_filesize": limits.largest,
        "retries": limits.attempts,
        "socket_timeout": limits.timeout,
        "sleep_interval_requests": 1 / limits.per_second,
        "http_headers": {"User-Agent": agent},
        "fixup": "never",
        "cachedir": False,
        "progress_hooks": [report],
        "noprogress": True,
        "quiet": True,
        "logger": _Silence(),
    }
    try:
        with yt_dlp.YoutubeDL(options) as downloader:
            found = downloader.extract_info(url)
    except yt_dlp.utils.YoutubeDLError as error:
        raise Failure("site", _plain(error)) from None
    if found.get("_type", "video") != "video":
        raise Failure("list", "a list of pages: name each of them")
    files = [Path(file["filepath"]) for file in found.get("requested_downloads") or []]
    if not files or not files[0].is_file():
        raise Failure("too large", f"yt-dlp fetched nothing; a file may have {limits.largest:,} bytes")
    return files[0]


@cache
def _extractors() -> list[Any]:
    from yt_dlp.extractor import gen_extractor_classes

    return [extractor for extractor in gen_extractor_classes() if extractor.IE_NAME != GENERIC]


def _plain(error: Exception) -> str:
    """The first line of what yt-dlp says, without colours, addresses and what it asks its users to report."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).removeprefix("ERROR: ")
    text = re.split(r"\n|; please report| \(caused by", text)[0]
    return re.sub(r"https?://\S+", "…", text)[:300]


class _Silence:
    """What yt-dlp would print would break the progress bar."""

    def debug(self, _: str) -> None: ...

    info = warning = error = debug
