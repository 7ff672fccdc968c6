"""`stretto collect` against a web server on the loopback: what it keeps, and how it behaves."""

from __future__ import annotations

import csv
import hashlib
import os
import subprocess
import sys
from importlib.metadata import version
from itertools import pairwise

import pytest
from collecting import LIMITS, PATIENCE, SONG, kept, listed, reasons, write
from helpers import ROOT
from web import file, serving, status, then

from data.collect import sites
from data.collect.collector import collect
from data.collect.limits import Limits
from data.progress import Progress

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


# How it behaves towards others.


def test_requests_to_a_host_keep_their_distance_and_other_hosts_do_not_wait(tmp_path, web, gather):
    with serving() as other:
        urls = [web.add(f"/{number}.mp3", SONG[number:]) for number in range(4)]
        urls += [other.add(f"/{number}.mp3", SONG[9 + number :]) for number in range(4)]
        assert gather(*urls, limits=Limits(per_second=5)).here == 8
        asked = [[moment for moment, _, _ in site.asked] for site in (web, other)]
        for moments in asked:
            assert min(later - earlier for earlier, later in pairwise(moments)) > 0.15
    assert max(moments[0] for moments in asked) < min(moments[-1] for moments in asked)  # side by side


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
