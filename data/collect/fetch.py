"""Fetching one file over http: politely, in pieces that are kept, and going on where it ended."""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.cookiejar import DefaultCookiePolicy
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import NoReturn
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from urllib3.util import Retry

from data.collect.failure import Failure, Stopped, Transient
from data.collect.hosts import Hosts, Visit
from data.collect.limits import Limits
from data.collect.manifest import http_address
from data.collect.partial import Note, Partial
from data.collect.robots import Robots

NAME = "stretto"
CHUNK = 1 << 16
CONNECT_SECONDS = 15
REDIRECTS = 10
LARGEST_ROBOTS = 500_000
"""Bytes of a robots.txt that are read, as RFC 9309 (section 2.5) has it."""
LATER = frozenset({408, 425, 429, 500, 502, 503, 504})
REASONS = {401: "not allowed", 403: "not allowed", 404: "not found", 410: "not found", 451: "not allowed"}
PAGE = "page"
PAGE_START = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html)\b", re.IGNORECASE)
PAGES = ("text/html", "application/xhtml+xml")
COMPRESSED = frozenset({"gzip", "x-gzip", "deflate", "br", "zstd", "compress"})
SUFFIX_OF_TYPE = {
    "audio/aac": ".aac",
    "audio/aiff": ".aiff",
    "audio/flac": ".flac",
    "audio/m4a": ".m4a",
    "audio/mp3": ".mp3",
    "audio/mp4": ".m4a",
    "audio/mpeg": ".mp3",
    "audio/ogg": ".ogg",
    "audio/opus": ".opus",
    "audio/vnd.wave": ".wav",
    "audio/wav": ".wav",
    "audio/wave": ".wav",
    "audio/webm": ".webm",
    "audio/x-aiff": ".aiff",
    "audio/x-flac": ".flac",
    "audio/x-m4a": ".m4a",
    "audio/x-ms-wma": ".wma",
    "audio/x-wav": ".wav",
    "application/ogg": ".ogg",
    "video/mp4": ".mp4",
    "video/webm": ".webm",
}
SUFFIXES = frozenset({*SUFFIX_OF_TYPE.values(), ".aif", ".au", ".caf", ".oga", ".w64", ".wave"})
UNKNOWN_SUFFIX = ".audio"


def user_agent() -> str:
    return f"{NAME}/{version(NAME)} (collects audio named in a manifest)"


def audio_suffix(url: str) -> str | None:
    """The end of an address's path where it is one that audio files have."""
    suffix = PurePosixPath(urlsplit(url).path).suffix.lower()
    return suffix if suffix in SUFFIXES else None


def host_of(url: str) -> str:
    """Host and port, as hosts are told apart."""
    return urlsplit(url).netloc.rpartition("@")[2].lower()


class Fetcher:
    """Fetches files for many threads. `count(bytes)` is told what arrives."""

    def __init__(self, hosts: Hosts, limits: Limits, count: Callable[[int], None]) -> None:
        self._hosts = hosts
        self._limits = limits
        self._count = count
        self._robots = Robots(NAME)
        self._closed: dict[str, float] = {}
        self._session = requests.Session()
        self._session.headers.update({"User-Agent": user_agent(), "Accept": "*/*", "Accept-Encoding": "identity"})
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
        adapter = requests.adapters.HTTPAdapter(pool_connections=64, pool_maxsize=limits.connections)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def fetch(self, address: str, partial: Partial, visit: Visit) -> str:
        """Completes `partial` with what `address` holds, and returns the suffix that its name should have.

        Raises Failure, Transient where another try may help, and Stopped. What has come stays in `partial`.
        """
        note = partial.note()
        if note and note.total == partial.bytes:
            return note.suffix
        headers = {"Range": f"bytes={partial.bytes}-", "If-Range": note.validator} if note and note.validator else {}
        with self._follow(address, headers, visit) as response:
            if response.status_code == 206 and note and _first_byte(response) == partial.bytes:
                total = note.total
            elif response.status_code == 200:
                note = _note(response, address)
                total = note.total
                partial.begin(note)
            else:
                partial.drop()
                raise Transient("bad answer", "the server sent another part of the file than it was asked for")
            self._require_size(total or 0)
            self._receive(response, partial)
        if total is not None and partial.bytes != total:
            raise Transient("incomplete", f"{partial.bytes:,} of {total:,} bytes came")
        if not partial.bytes:
            raise Failure("empty", "the file has no bytes")
        return note.suffix

    @contextmanager
    def _follow(self, url: str, headers: dict[str, str], visit: Visit) -> Iterator[requests.Response]:
        """The answer at the end of all redirects. Each step is checked and waits like any other request."""
        for _ in range(REDIRECTS + 1):
            self._obey_robots(url, visit)
            with self._get(url, headers, visit) as response:
                target = self._session.get_redirect_target(response)
                if target is None:
                    self._judge(response)
                    yield response
                    return
                url = http_address(urljoin(url, target))
        raise Failure("too many redirects", f"more than {REDIRECTS}")

    @contextmanager
    def _get(
        self, url: str, headers: dict[str, str], visit: Visit, redirects: bool = False
    ) -> Iterator[requests.Response]:
        """The answer to one request, with every fault of the connection in words."""
        host = host_of(url)
        visit.reserve(host)
        if (left := self._closed.get(host, 0.0) - time.monotonic()) > 0:
            raise Failure("busy", f"the host asked to be left alone for {left / 60:.0f} more minutes")
        visit.spend()
        limits = self._limits
        timeout = (min(CONNECT_SECONDS, limits.timeout), limits.timeout)
        try:
            with self._session.get(
                url, headers=headers, stream=True, allow_redirects=redirects, timeout=timeout
            ) as response:
                yield response
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, UnicodeError):
            raise Failure("malformed address", "it does not read as an address") from None
        except (requests.Timeout, urllib3.exceptions.TimeoutError):
            raise Transient("timeout", f"no answer for {limits.timeout:g} s") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _connection_failure(error) from None

    def _obey_robots(self, url: str, visit: Visit) -> None:
        visit.reserve(host_of(url))  # before the lock of the rules is held: its holder must not wait for the others
        rules = self._robots.rules(url, lambda address: self._robots_file(address, visit))
        self._hosts.slow_down(host_of(url), rules.interval)
        if not rules.allow(url):
            raise Failure("robots.txt", "the robots.txt of the host does not allow it")

    def _robots_file(self, url: str, visit: Visit) -> tuple[int, str]:
        with self._get(url, {}, visit, redirects=True) as response:
            if response.status_code in LATER or response.status_code >= 500:
                self._come_back_later(response, "robots.txt")
            text = response.raw.read(LARGEST_ROBOTS, decode_content=True)
            return response.status_code, text.decode("utf-8", "replace")

    def _judge(self, response: requests.Response) -> None:
        """Raises what the status and the headers say of an answer that brings no audio."""
        status = response.status_code
        if status in LATER:
            self._come_back_later(response, "busy" if status in (429, 503) else "server error")
        if status not in (200, 206, 416):
            raise Failure(REASONS.get(status, "refused"), _status(response))
        if _content_type(response) in PAGES:
            raise Failure(PAGE, "a page, not a file")
        if response.headers.get("Content-Encoding", "").lower() in COMPRESSED:
            raise Failure("compressed", "the server sends it compressed, though it was asked not to")

    def _come_back_later(self, response: requests.Response, reason: str) -> NoReturn:
        """Raises Transient. Where the server says how long to wait, that holds for all of its files."""
        host = host_of(response.url)
        try:
            wait = Retry().parse_retry_after(response.headers.get("Retry-After", ""))
        except urllib3.exceptions.InvalidHeader:
            raise Transient(reason, _status(response)) from None
        if wait > self._limits.longest_wait:
            self._closed[host] = time.monotonic() + wait
            raise Failure(reason, f"{_status(response)}: come back in {wait / 60:.0f} minutes")
        self._hosts.pause(host, wait)
        raise Transient(reason, _status(response), wait)

    def _require_size(self, size: int) -> None:
        if size > self._limits.largest:
            raise Failure("too large", f"more than {self._limits.largest:,} bytes")

    def _receive(self, response: requests.Response, partial: Partial) -> None:
        size, pace = partial.bytes, _Pace(self._limits)
        with partial.path.open("ab") as file:
            while chunk := response.raw.read1(CHUNK, decode_content=False):
                if not size and PAGE_START.match(chunk):
                    raise Failure(PAGE, "a page, not a file")
                file.write(chunk)
                size += len(chunk)
                self._count(len(chunk))
                self._require_size(size)
                pace.check(len(chunk))
                if self._hosts.stopped:
                    raise Stopped


class _Pace:
    """Notices a server that keeps a connection open and sends next to nothing."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._since, self._bytes = time.monotonic(), 0

    def check(self, received: int) -> None:
        self._bytes += received
        seconds = time.monotonic() - self._since
        if seconds < self._limits.timeout:
            return
        if self._bytes < self._limits.slowest * seconds:
            raise Transient("timeout", f"only {self._bytes:,} bytes came in {seconds:.0f} s")
        self._since, self._bytes = time.monotonic(), 0


def _note(response: requests.Response, address: str) -> Note:
    tag = response.headers.get("ETag", "")
    strong = tag if tag.startswith('"') else ""  # a weak one does not promise the same bytes
    length = response.headers.get("Content-Length", "")
    suffix = SUFFIX_OF_TYPE.get(_content_type(response)) or audio_suffix(address) or audio_suffix(response.url)
    return Note(
        strong or response.headers.get("Last-Modified"),
        int(length) if length.isdecimal() else None,
        suffix or UNKNOWN_SUFFIX,
    )


def _content_type(response: requests.Response) -> str:
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def _first_byte(response: requests.Response) -> int | None:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _status(response: requests.Response) -> str:
    return f"{response.status_code} {response.reason or ''}".rstrip()


def _connection_failure(error: BaseException) -> Failure:
    """What the system says at the root of a fault: the fault itself would show addresses with all they hold."""
    root: OSError | None = None
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            root = seen
        wrapped = seen.args[0] if seen.args else None
        wrapped = getattr(wrapped, "reason", wrapped)
        seen = seen.__cause__ or seen.__context__ or (wrapped if isinstance(wrapped, BaseException) else None)
    if isinstance(root, ssl.SSLCertVerificationError):
        return Failure("certificate", root.verify_message)
    return Transient("connection", str(root.strerror) if root else "the connection broke")
