"""robots.txt (RFC 9309) of each host, asked for once."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from urllib.parse import urlsplit
from urllib.robotparser import RobotFileParser


class Rules:
    """What one host lets `agent` do."""

    def __init__(self, agent: str, lines: list[str]) -> None:
        self._agent = agent
        self._parser = RobotFileParser()
        self._parser.parse(lines)

    def allow(self, url: str) -> bool:
        return self._parser.can_fetch(self._agent, url)

    @property
    def interval(self) -> float:
        """Seconds from one request to the next that the host asks for; 0 where it does not."""
        rate = self._parser.request_rate(self._agent)
        return max(float(self._parser.crawl_delay(self._agent) or 0), rate.seconds / rate.requests if rate else 0.0)


class Robots:
    def __init__(self, agent: str) -> None:
        self._agent = agent
        self._rules: dict[str, Rules] = {}
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def rules(self, url: str, fetch: Callable[[str], tuple[int, str]]) -> Rules:
        """The rules of the host of `url`. Where they are not known, `fetch` is given the address of a robots.txt and
        returns the status and the text of the answer; what it raises is raised."""
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc.rpartition('@')[2].lower()}"
        with self._locks[origin]:
            if origin not in self._rules:
                status, text = fetch(f"{origin}/robots.txt")
                # Section 2.3.1.3: a robots.txt that cannot be had (4xx) forbids nothing. Storage of files answers 403.
                self._rules[origin] = Rules(self._agent, text.splitlines() if status == 200 else [])
            return self._rules[origin]
