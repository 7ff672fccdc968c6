"""What goes wrong while `stretto collect` fetches, what it goes on with, and what users may do wrong."""

from __future__ import annotations

import json
import os
import signal
import time
from email.utils import formatdate

import pytest
from collecting import LIMITS, PATIENCE, SONG, kept, listed, reasons, stretto, wait_for, write
from web import Request, file, status, then

from data.collect.collector import collect
from data.collect.limits import Limits
from data.lock import locked
from data.progress import Progress
from model.errors import UserError

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
