"""A web server on the loopback, for tests of what fetches from the web."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[["Request"], None]


class Request(BaseHTTPRequestHandler):
    """One request; what the tests give as answers writes to it."""

    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.asked.append((time.monotonic(), self.path, dict(self.headers)))
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            self.server.answers.get(self.path, not_found)(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.server.lock:
                self.server.now -= 1

    def reply(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


class Web(ThreadingHTTPServer):
    """`answers` by path; `asked` has time, path and headers of each request, `most` how many there were at a time."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[float, str, dict[str, str]]] = []
        self.lock = threading.Lock()
        self.now = self.most = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def add(self, path: str, answer: Answer | bytes, **headers: str) -> str:
        """The address at which `answer`, or a file that holds it, is found."""
        self.answers[path] = file(answer, **headers) if isinstance(answer, bytes) else answer
        return f"http://{self.host}{path}"

    def paths(self) -> list[str]:
        """What was asked for, without robots.txt."""
        return [path for _, path, _ in self.asked if path != "/robots.txt"]

    def headers(self, path: str) -> list[dict[str, str]]:
        return [headers for _, asked, headers in self.asked if asked == path]


@contextmanager
def serving() -> Iterator[Web]:
    web = Web()
    thread = threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.shutdown()
        web.server_close()
        thread.join()


def not_found(request: Request) -> None:
    request.reply(404)


def file(
    body: bytes,
    tag: str | None = '"1"',
    ranges: bool = True,
    breaks: int = 0,
    chunk: int = 1 << 20,
    pause: float = 0.0,
    **headers: str,
) -> Answer:
    """A file, by default one that can be gone on with. The first `breaks` answers end after half of what they promise;
    each `chunk` is followed by a `pause`."""
    left = [breaks]

    def answer(request: Request) -> None:
        told = {"Content_Type": "audio/mpeg", **({"ETag": tag} if tag else {}), **headers}
        wanted = request.headers.get("Range")
        first = 0
        if wanted and ranges and request.headers.get("If-Range") in (None, tag):
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
            told["Content_Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
        sent = body[first:]
        request.reply(206 if "Content_Range" in told else 200, b"", len(sent), **told)
        if left[0]:
            left[0] -= 1
            sent = sent[: len(sent) // 2]
            request.close_connection = True
        for start in range(0, len(sent), chunk):
            request.wfile.write(sent[start : start + chunk])
            time.sleep(pause)

    return answer


def then(*answers: Answer) -> Answer:
    """The first answer for the first request, and so on; the last for all that follow."""
    left = list(answers)
    return lambda request: (left.pop(0) if len(left) > 1 else left[0])(request)


def status(code: int, body: bytes = b"", **headers: str) -> Answer:
    return lambda request: request.reply(code, body, **headers)
