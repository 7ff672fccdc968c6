"""`stretto collect` against a web server on the loopback: what it keeps, what it says, and how it behaves."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from importlib.metadata import version
from itertools import pairwise

import pytest
from helpers import ROOT
from web import Request, file, serving, status, then

from data.collect import sites
from data.collect.collector import collect
from data.collect.limits import Limits
from data.lock import locked
from data.progress import Progress
from model.errors import UserError

LIMITS = Limits(per_second=1000, backoff=0.01, timeout=5, attempts=3)
SONG = bytes(range(256)) * 400
PATIENCE = 30


@pytest.fixture
def web():
    with serving() as web:
        yield web


@pytest.fixture
def gather(tmp_path):
    """Collects rows, given as addresses or as columns, into the folder `out`."""

    def call(*rows: str | dict, limits: Limits = LIMITS):
        return collect(write(tmp_path / "manifest.jsonl", rows), tmp_path / "out", limits, Progress())

    return call


def write(path, rows):
    rows = [{"url": row} if isinstance(row, str) else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def listed(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def kept(tmp_path):
    """What `manifest.jsonl` leads to: contents by address, digests and sizes checked."""
    found = {}
    for row in listed(tmp_path / "out" / "manifest.jsonl"):
        contents = (tmp_path / "out" / row["path"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(contents), hashlib.sha256(contents).hexdigest())
        found[row["url"]] = contents
    return found


def reasons(tmp_path):
    return {row["url"]: row["reason"] for row in listed(tmp_path / "out" / "failed.jsonl")}


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def stretto(*arguments, **settings):
    command = [sys.executable, "-m", "launcher", "collect", "--per-second", "1000", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes, **settings)


# What is kept.


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_files_are_kept_with_all_columns_of_their_rows(tmp_path, web, suffix):
    web.add("/a", SONG, Content_Type="audio/x-flac; charset=binary")
    url = web.add("/b.ogg?x=1", SONG[1:], Content_Type="application/octet-stream")
    again, cc0 = f"http://{web.host}/a#again", {"licence": "CC0"}
    rows = [
        {"url": f"http://{web.host}/a", "captions": "a calm, slow piano", "start": 0.5, "year": 1990, **cc0},
        {"url": url, "captions": "ünïcode", "start": 2.0, "year": 2001, **cc0},
        {"url": again, "captions": "the same file", "start": 4.0, "year": 1990, **cc0},
    ]
    names = ("captions", "start", "year", "licence")
    manifest = tmp_path / f"manifest{suffix}"
    if suffix == ".jsonl":
        write(manifest, rows)
    else:
        with manifest.open("w", newline="") as table:
            writer = csv.DictWriter(table, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    outcome = collect(manifest, tmp_path / "out", LIMITS, Progress())
    found = listed(tmp_path / "out" / "manifest.jsonl")
    assert [[row[name] for name in names] for row in found] == [[row[name] for name in names] for row in rows]
    assert [os.path.splitext(row["path"])[1] for row in found] == [".flac", ".ogg", ".flac"]
    assert kept(tmp_path) == {f"http://{web.host}/a": SONG, url: SONG[1:]}
    assert sorted(web.paths()) == ["/a", "/b.ogg?x=1"]
    assert (outcome.here, outcome.bytes, outcome.failures) == (2, 2 * len(SONG) - 1, {})


def test_the_same_contents_of_two_addresses_are_stored_once_and_noted(tmp_path, web, gather):
    first, second = web.add("/1.mp3", SONG), web.add("/2.wav", SONG)
    gather(first, second)
    rows = listed(tmp_path / "out" / "manifest.jsonl")
    assert rows[0]["path"] == rows[1]["path"]
    assert [row.get("duplicate_of") for row in rows] == [None, first]
    assert len([path for path in (tmp_path / "out" / "audio").rglob("*") if path.is_file()]) == 1


def test_columns_that_would_be_taken_for_the_file_are_told_apart(tmp_path, web, gather):
    gather({"url": web.add("/a.mp3", SONG), "file": "theirs.wav", "Path": "x", "bytes": 3, "id": ""})
    [row] = listed(tmp_path / "out" / "manifest.jsonl")
    assert row["original_file"] == "theirs.wav"
    assert row["original_Path"] == "x"
    assert row["bytes"] == len(SONG)
    assert not {"file", "Path", "id"} & set(row)


def test_no_server_chooses_where_a_file_goes(tmp_path, web, gather):
    web.add("/..%2f..%2fevil.mp3", SONG, Content_Disposition='attachment; filename="../../evil.mp3"')
    gather(f"http://{web.host}/..%2f..%2fevil.mp3")
    [row] = listed(tmp_path / "out" / "manifest.jsonl")
    assert (tmp_path / "out" / row["path"]).resolve().is_relative_to(tmp_path / "out" / "audio")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.jsonl", "out"]


def test_a_name_and_password_are_used_and_never_shown(tmp_path, web, gather):
    web.add("/a.mp3", SONG)
    gather(f"http://me:s3cret@{web.host}/a.mp3", f"http://me:s3cret@{web.host}/b.mp3", "ftp://me:s3cret@host/c.mp3")
    assert web.headers("/a.mp3")[0]["Authorization"].startswith("Basic ")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(b"s3cret" in path.read_bytes() for path in files)
    assert reasons(tmp_path) == {f"http://{web.host}/b.mp3": "not found", "ftp://host/c.mp3": "not http"}


def test_a_digest_in_the_manifest_is_checked(tmp_path, web, gather):
    good, bad = web.add("/good.mp3", SONG), web.add("/bad.mp3", SONG[:-1])
    digest = hashlib.sha256(SONG).hexdigest()
    rows = [
        {"url": good, "sha256": digest.upper()},
        {"url": bad, "sha256": digest},
        {"url": good, "sha256": "0" * 64},
        {"url": good, "sha256": "?"},
    ]
    gather(*rows)
    assert list(kept(tmp_path)) == [good]
    failed = [(row["line"], row["reason"]) for row in listed(tmp_path / "out" / "failed.jsonl")]
    assert sorted(failed) == [(2, "sha256 differs"), (3, "contradicting sha256"), (4, "malformed sha256")]


# What goes wrong.


def test_failures_are_listed_counted_and_tried_again(tmp_path, web, gather):
    page = b"  <!DOCTYPE html><title>Log in</title>"
    wrong = {
        web.add("/gone.mp3", status(410)): "not found",
        web.add("/private.mp3", status(403)): "not allowed",
        web.add("/page.mp3", status(200, page, Content_Type="text/html; charset=utf-8")): "page",
        web.add("/disguised.mp3", page): "page",
        web.add("/empty.mp3", b""): "empty",
        web.add("/large.mp3", bytes(200_000)): "too large",
        web.add("/circle.mp3", status(302, Location="/circle.mp3")): "too many redirects",
        web.add("/local.mp3", status(302, Location="file:///etc/passwd")): "not http",
        web.add("/gzip.mp3", SONG, Content_Encoding="gzip"): "compressed",
        "http://127.0.0.1:1/refused.mp3": "connection",
        "http://[broken/x.mp3": "malformed address",
        "http:///nowhere.mp3": "malformed address",
        "file:///etc/passwd": "not http",
        "songs/one.mp3": "not http",
    }
    limits = Limits(per_second=1000, backoff=0.01, timeout=5, attempts=2, largest=150_000)
    rows = [*wrong, {"caption": "without an address"}, web.add("/good.mp3", SONG)]
    outcome = gather(*rows, limits=limits)
    assert reasons(tmp_path) == {**wrong, "": "no address"}
    assert (outcome.here, sum(outcome.failures.values()), outcome.failures["page"]) == (1, 15, 2)
    refused = next(row for row in listed(tmp_path / "out" / "failed.jsonl") if row["reason"] == "connection")
    assert (refused["attempts"], refused["line"], refused["detail"]) == (2, 10, "Connection refused")
    web.add("/gone.mp3", SONG[2:])
    assert gather(*rows, limits=limits).here == 2
    assert web.paths().count("/good.mp3") == 1


def test_what_may_work_later_is_tried_again_with_growing_pauses(tmp_path, web, gather):
    url = web.add("/a.mp3", then(status(503), status(500), file(SONG)))
    assert gather(url, limits=Limits(per_second=1000, backoff=0.1)).here == 1
    first, second, third = (moment for moment, path, _ in web.asked if path == "/a.mp3")
    assert second - first >= 0.05
    assert third - second >= 0.1
    web.add("/b.mp3", status(500))
    gather(url, f"http://{web.host}/b.mp3")
    assert web.paths().count("/b.mp3") == LIMITS.attempts


@pytest.mark.parametrize("date", [False, True])
def test_a_server_that_says_when_to_come_back_is_left_alone_until_then(tmp_path, web, gather, date):
    after = formatdate(time.time() + 2, usegmt=True) if date else "1"
    busy = web.add("/busy.mp3", then(status(429, Retry_After=after), file(SONG)))
    other = web.add("/other.mp3", SONG)
    assert gather(busy, other, limits=Limits(per_second=1000, connections=1)).here == 2
    moments = [moment for moment, path, _ in web.asked if path != "/robots.txt"]
    assert moments[1] - moments[0] > 0.9
    later = web.add("/later.mp3", status(503, Retry_After="86400"))
    asked = len(web.paths())
    outcome = gather(later, f"{later}?2", limits=Limits(per_second=1000, connections=1))
    assert outcome.failures == {"busy": 2}
    assert web.paths()[asked:] == ["/later.mp3"]


def test_a_connection_that_says_nothing_or_next_to_nothing_is_given_up(tmp_path, web, gather):
    silent = web.add("/silent.mp3", lambda request: time.sleep(2))
    drips = web.add("/drips.mp3", file(SONG, chunk=1, pause=0.05))
    gather(silent, drips, limits=Limits(per_second=1000, timeout=0.4, attempts=1))
    assert reasons(tmp_path) == {silent: "timeout", drips: "timeout"}


# What is gone on with.


def test_a_broken_connection_is_gone_on_with_where_it_broke(tmp_path, web, gather):
    tagged = web.add("/tagged.mp3", file(SONG, breaks=2))
    dated = web.add("/dated.mp3", file(SONG[1:], tag=None, breaks=1, Last_Modified=formatdate(0, usegmt=True)))
    neither = web.add("/neither.mp3", file(SONG[2:], tag=None, breaks=1))
    weak = web.add("/weak.mp3", file(SONG[3:], tag='W/"1"', breaks=1))
    unable = web.add("/unable.mp3", file(SONG[4:], ranges=False, breaks=1))
    gather(tagged, dated, neither, weak, unable)
    assert kept(tmp_path) == {
        tagged: SONG, dated: SONG[1:], neither: SONG[2:], weak: SONG[3:], unable: SONG[4:],
    }  # fmt: skip
    half = len(SONG) // 2
    assert [headers.get("Range") for headers in web.headers("/tagged.mp3")] == [
        None, f"bytes={half}-", f"bytes={half + half // 2}-",
    ]  # fmt: skip
    assert [headers.get("If-Range") for headers in web.headers("/tagged.mp3")] == [None, '"1"', '"1"']
    assert "Range" not in web.headers("/neither.mp3")[1]
    assert "Range" not in web.headers("/weak.mp3")[1]


def test_a_file_that_changed_meanwhile_is_fetched_anew(tmp_path, web, gather):
    url = web.add("/a.mp3", then(file(SONG, breaks=1), file(SONG[::-1], tag='"2"')))
    wrong = web.add("/b.mp3", then(file(SONG, breaks=1), _another_part, file(SONG)))
    gather(url, wrong)
    assert kept(tmp_path) == {url: SONG[::-1], wrong: SONG}


def _another_part(request: Request) -> None:
    request.reply(206, SONG[:9], Content_Range=f"bytes 0-8/{len(SONG)}", Content_Type="audio/mpeg")


def test_what_is_there_is_not_fetched_again_unless_it_is_lost(tmp_path, web, gather):
    first, second = web.add("/1.mp3", SONG), web.add("/2.mp3", SONG[1:])
    gather(first, second)
    gather(first, second)
    assert len(web.paths()) == 2
    row = listed(tmp_path / "out" / "manifest.jsonl")[0]
    (tmp_path / "out" / row["path"]).unlink()
    third = web.add("/3.mp3", SONG[2:])
    gather(first, second, third)  # the manifest has grown
    assert sorted(web.paths()) == ["/1.mp3", "/1.mp3", "/2.mp3", "/3.mp3"]
    assert kept(tmp_path) == {first: SONG, second: SONG[1:], third: SONG[2:]}


def test_a_torn_line_of_the_journal_costs_no_more_than_its_file(tmp_path, web, gather):
    urls = [web.add(f"/{number}.mp3", SONG[number:]) for number in range(3)]
    gather(*urls)
    journal = tmp_path / "out" / "collected.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    gather(*urls)
    assert len(web.paths()) == 4
    assert len(kept(tmp_path)) == 3
    assert len(listed(journal)) == 3


def test_a_kill_amid_a_download_loses_nothing_that_had_come(tmp_path, web):
    whole = web.add("/whole.mp3", SONG)
    slow = web.add("/slow.mp3", file(SONG, chunk=4000, pause=0.05))
    manifest = write(tmp_path / "manifest.jsonl", [whole, slow])
    out = tmp_path / "out"
    for _ in range(2):
        size = _partial_size(out)
        with stretto(manifest, "-o", out) as process:
            wait_for(lambda before=size: _partial_size(out) > before and (out / "collected.jsonl").stat().st_size)
            process.send_signal(signal.SIGKILL)
    web.add("/slow.mp3", SONG)
    with stretto(manifest, "-o", out) as process:
        text, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, error) == (0, "")
    assert f"{out}: 2 of 2 files" in text
    assert kept(tmp_path) == {whole: SONG, slow: SONG}
    assert web.paths().count("/whole.mp3") == 1
    starts = [headers.get("Range") for headers in web.headers("/slow.mp3")]
    assert starts[0] is None
    assert 0 < int(starts[1][6:-1]) < int(starts[2][6:-1])
    assert not (out / "partial").exists()


def _partial_size(out):
    return max((path.stat().st_size for path in out.glob("partial/*") if path.suffix != ".json"), default=0)


def test_an_interrupt_stops_cleanly_and_the_same_command_goes_on(tmp_path, web):
    urls = [web.add("/1.mp3", SONG), web.add("/2.mp3", file(SONG[1:], chunk=4000, pause=0.5))]
    manifest = write(tmp_path / "manifest.jsonl", urls)
    with stretto(manifest, "-o", tmp_path / "out") as process:
        wait_for(lambda: _partial_size(tmp_path / "out") and len(web.paths()) == 2)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        text, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "1 of 2 files" in text
    assert "The same command goes on" in text
    assert error == ""
    assert kept(tmp_path) == {urls[0]: SONG}
    web.add("/2.mp3", SONG[1:])
    with stretto(manifest, "-o", tmp_path / "out") as process:
        assert process.wait(PATIENCE) == 0
    assert "Range" in web.headers("/2.mp3")[1]
    assert kept(tmp_path) == {urls[0]: SONG, urls[1]: SONG[1:]}


# How it behaves towards others.


def test_requests_to_a_host_keep_their_distance_and_other_hosts_do_not_wait(tmp_path, web, gather):
    with serving() as other:
        urls = [web.add(f"/{number}.mp3", SONG[number:]) for number in range(4)]
        urls += [other.add(f"/{number}.mp3", SONG[9 + number :]) for number in range(4)]
        begun = time.monotonic()
        assert gather(*urls, limits=Limits(per_second=5)).here == 8
        passed = time.monotonic() - begun
        for site in (web, other):
            moments = [moment for moment, _, _ in site.asked]
            assert min(later - earlier for earlier, later in pairwise(moments)) > 0.15
    assert passed < 8 * 0.2 + 0.2  # one after the other it would be 10


def test_a_host_sees_two_connections_at_a_time(tmp_path, web, gather):
    urls = [web.add(f"/{number}.mp3", file(SONG[number:], chunk=20_000, pause=0.03)) for number in range(8)]
    gather(*urls, limits=Limits(per_second=1000, connections=6))
    assert web.most == 2


def test_robots_txt_is_obeyed_and_asked_for_once(tmp_path, web, gather):
    rules = b"User-agent: stretto\nDisallow: /private/\nCrawl-delay: 1\n\nUser-agent: *\nDisallow: /\n"
    web.add("/robots.txt", then(status(503), status(200, rules, Content_Type="text/plain")))
    secret, song, moved = (f"http://{web.host}/{name}.mp3" for name in ("private/a", "b", "c"))
    web.add("/b.mp3", SONG)
    web.add("/c.mp3", status(302, Location="/private/d.mp3"))
    gather(secret, song, moved)
    assert reasons(tmp_path) == {secret: "robots.txt", moved: "robots.txt"}
    assert list(kept(tmp_path)) == [song]
    assert sorted(web.paths()) == ["/b.mp3", "/c.mp3"]
    first, second = (moment for moment, path, _ in web.asked if path != "/robots.txt")
    assert second - first > 0.9


def test_a_request_names_stretto_and_brings_back_no_cookies(tmp_path, web, gather):
    urls = [web.add(f"/{number}.mp3", SONG[number:], Set_Cookie="you=1; Path=/") for number in range(2)]
    gather(*urls, limits=Limits(per_second=1000, connections=1))
    assert len(web.asked) == 3
    for _, _, headers in web.asked:
        assert headers["User-Agent"].startswith(f"stretto/{version('stretto')} ")
        assert "Cookie" not in headers


def test_redirects_are_followed_with_the_password_left_behind(tmp_path, web, gather):
    with serving() as mirror:
        target = mirror.add("/deep/a", SONG, Content_Type="audio/ogg")
        web.add("/a", status(302, Location=target))
        gather(f"http://me:secret@{web.host}/a")
        assert "Authorization" not in mirror.headers("/deep/a")[0]
        assert mirror.asked[0][1] == "/robots.txt"
    assert kept(tmp_path) == {f"http://{web.host}/a": SONG}


# What a user may do wrong.


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("list.jsonl", None, "cannot be read: No such file"),
        ("list.txt", b"http://a/b.mp3\n", "ends in .jsonl, .csv, .tsv"),
        ("list.jsonl", b"", "holds no rows"),
        ("list.csv", b"url,caption\n", "holds no rows"),
        ("list.csv", b"link,caption\nhttp://a/b.mp3,x\n", "has no column `url`"),
        ("list.jsonl", b"http://a/b.mp3\n", "Line 1 is not JSON"),
        ("list.csv", "url,caption\nhttp://a/b.mp3,für\n".encode("latin-1"), "is not UTF-8 text"),
        ("list.tsv", "url\tcaption\n".encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused_and_no_folder_made(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError, match=words):
        collect(tmp_path / name, tmp_path / "out", LIMITS, Progress())
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_failures_and_the_others_stand(tmp_path, web):
    url = web.add("/a.mp3", SONG)
    lines = [
        json.dumps({"url": url, "caption": "half a pair \ud800"}),
        "{",
        "[1]",
        '{"url": 7}',
        '{"url": " "}',
        "null",
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    outcome = collect(tmp_path / "list.jsonl", tmp_path / "out", LIMITS, Progress())
    assert outcome.failures == {"malformed row": 3, "no address": 2}
    assert listed(tmp_path / "out" / "manifest.jsonl")[0]["caption"] == "half a pair \ud800"


def test_a_folder_of_something_else_is_left_alone(tmp_path, web, gather):
    url = web.add("/a.mp3", SONG)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other things: name a new folder"):
        gather(url)
    (tmp_path / "out" / "mine.txt").unlink()
    gather(url)
    other = write(tmp_path / "other.jsonl", [web.add("/b.mp3", SONG)])
    with pytest.raises(UserError, match=r"holds what .*manifest\.jsonl names, and .*other\.jsonl is another"):
        collect(other, tmp_path / "out", LIMITS, Progress())
    renamed = (tmp_path / "manifest.jsonl").rename(tmp_path / "renamed.jsonl")
    assert collect(renamed, tmp_path / "out", LIMITS, Progress()).here == 1
    with pytest.raises(UserError, match="is written by stretto collect"):
        collect(tmp_path / "out" / "manifest.jsonl", tmp_path / "out", LIMITS, Progress())
    with pytest.raises(UserError, match="cannot be a folder"):
        collect(renamed, renamed, LIMITS, Progress())


def test_a_second_collector_in_a_folder_is_refused(tmp_path, web, gather):
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        gather(web.add("/a.mp3", SONG))
    assert not web.asked


def test_the_command_says_what_failed_and_how_to_train(tmp_path, web):
    good, bad = web.add("/a.mp3", SONG), f"http://{web.host}/missing.mp3"
    with stretto(write(tmp_path / "list.jsonl", [good, bad]), "-o", tmp_path / "out") as process:
        text, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, error) == (1, "")
    assert f"1 failed, listed in {tmp_path / 'out' / 'failed.jsonl'}; the same command tries them again" in text
    assert f"1 not found, such as {bad}: 404 Not Found" in text
    assert f"data.audio={tmp_path / 'out' / 'manifest.jsonl'}" in text
    with stretto("nowhere.jsonl", "-o", tmp_path / "out", "--largest", "2 apples") as process:
        _, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, error) == (2, "error: --largest is '2 apples': name a size such as 500MB or 2GB.\n")


# Sites.


def test_a_page_of_a_site_is_fetched_by_yt_dlp(tmp_path, web, gather, monkeypatch):
    yt_dlp = pytest.importorskip("yt_dlp")
    sound = web.add("/stream", SONG)

    class LoopIE(yt_dlp.extractor.common.InfoExtractor):
        _VALID_URL = r"http://127\.0\.0\.1:\d+/watch/(?P<id>\w+)"

        def _real_extract(self, url):
            name = self._match_id(url)
            if name == "gone":
                raise yt_dlp.utils.ExtractorError("this video is private", expected=True)
            if name == "list":
                return self.playlist_result([self.url_result(f"http://{web.host}/watch/one")], "list", "A list")
            sounds = {"url": sound, "ext": "m4a", "vcodec": "none", "format_id": "a", "abr": 128}
            return {"id": name, "title": "../../x", "formats": [sounds, {"url": sound, "ext": "mp4", "format_id": "v"}]}

    class Downloader(yt_dlp.YoutubeDL):
        def add_default_info_extractors(self):
            self.add_info_extractor(LoopIE())

    monkeypatch.setattr(yt_dlp, "YoutubeDL", Downloader)
    monkeypatch.setattr(sites, "_extractors", lambda: [LoopIE])
    page, gone, playlist = (f"http://{web.host}/watch/{name}" for name in ("one", "gone", "list"))
    outcome = gather({"url": page, "caption": "x"}, gone, playlist)
    [row] = listed(tmp_path / "out" / "manifest.jsonl")
    assert (kept(tmp_path), row["caption"]) == ({page: SONG}, "x")
    assert row["path"].endswith(".m4a")
    assert reasons(tmp_path) == {gone: "site", playlist: "list"}
    assert "private" in outcome.examples["site"]
    assert "/watch/one" not in web.paths()
    assert gather(page, gone, playlist).here == 1
    assert web.paths().count("/stream") == 1


def test_without_yt_dlp_a_page_names_the_extra_and_files_need_it_not(tmp_path, web, gather, monkeypatch):
    monkeypatch.setitem(sys.modules, "yt_dlp", None)
    monkeypatch.setattr(sites, "installed", lambda: False)
    page = web.add("/watch", status(200, b"<html>", Content_Type="text/html"))
    outcome = gather(page, web.add("/download", SONG))
    assert outcome.here == 1
    assert "pip install 'stretto[collect]'" in outcome.examples["page"]


def test_yt_dlp_is_not_imported_for_files(tmp_path, web):
    manifest = write(tmp_path / "list.jsonl", [web.add("/a.mp3", SONG)])
    script = (
        "import sys; sys.argv = ['stretto', 'collect', *sys.argv[1:]]\n"
        "from launcher.cli import main\n"
        "try: main()\n"
        "finally: print({'torch', 'yt_dlp'} & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", script, str(manifest), "-o", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert result.stdout.splitlines()[-1] == "set()", result.stderr
    assert result.returncode == 0
