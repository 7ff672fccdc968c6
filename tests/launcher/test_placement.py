"""Which hosts and slots stages get, and when they are started again."""

from __future__ import annotations

import psutil
import pytest

from launcher.hosts import Host
from launcher.outcome import got_on, how_far
from launcher.placement import Places, counts, in_words, parse_share, shares
from launcher.processes import Machine
from launcher.recipe import load_recipe
from launcher.restarts import Ended, RestartsConfig, restart_after
from launcher.room import HostRoom, LocalRoom
from launcher.stages import STAGES
from model.errors import UserError
from trainer.exit_codes import DIVERGED, FAULT, HUNG, SAVED

FOUR = [Host("alpha", 4), Host("beta", 4)]
STAGE = {stage.name: stage for stage in STAGES}


def recipe(*overrides):
    return load_recipe("quickstart", ["stage_defaults.train.global_batch=24", *overrides])


def wanted(hosts, *overrides):
    return shares(recipe(*overrides), hosts, STAGES)


def test_a_share_is_a_number_nodes_all_or_what_the_recipe_trains_on():
    found = wanted(FOUR, "placement.semantic=3", "placement.coarse=2 nodes", "stages.fine.train.ranks=1")
    assert {name: found[name] for name in ("corpus", "tokens", "semantic", "coarse", "fine")} == {
        "corpus": 1,
        "tokens": 8,
        "semantic": 3,
        "coarse": 8,
        "fine": 1,
    }
    assert wanted([Host("alpha", 4), Host("beta", 3)])["tokens"] == 6  # as many on each


def test_auto_divides_by_flops_so_that_they_end_together():
    auto = [f"placement.{name}=auto" for name in ("semantic", "coarse", "fine")]
    steps = ["stages.semantic.train.steps=400", "stages.coarse.train.steps=400", "stages.fine.train.steps=400"]
    found = wanted(FOUR, *auto, *steps)
    assert sum(found[name] for name in ("semantic", "coarse", "fine")) <= 8
    slower = wanted(FOUR, *auto, "stages.fine.train.steps=8000", *steps[:2])
    assert slower["fine"] > found["fine"]
    # With slots for two alone they run one after another, each on all that divide its batch.
    few = wanted([Host("alpha", 2)], *auto)
    assert {few[name] for name in ("semantic", "coarse", "fine")} == {2}
    # What another stage is given is not divided.
    given = wanted(FOUR, "placement.semantic=6", *auto[1:])
    assert (given["semantic"], given["coarse"], given["fine"]) == (6, 1, 1)


def test_all_that_a_cluster_does_not_have_is_named_at_once():
    keys = ["placement.semantic=16", "placement.coarse=3 nodes", "placement.fine=5", "stage_defaults.train.ranks=1"]
    with pytest.raises(UserError) as raised:
        wanted(FOUR, *keys)
    assert str(raised.value).splitlines() == [
        "placement.semantic asks for 16 slots, but the cluster has 8: lower it, or name more hosts.",
        "placement.coarse asks for 3 nodes, but the cluster has 2.",
        "placement.fine: 5 slots, as many on each host, cannot be had of alpha (4), beta (4).",
    ]
    with pytest.raises(UserError, match=r"stages\.fine\.train\.ranks asks for 12 slots, but the cluster has 8"):
        wanted(FOUR, "stages.fine.train.ranks=12")
    uneven = ["placement.fine=6", "stages.fine.train.global_batch=16", "stages.fine.train.ranks=2"]
    with pytest.raises(UserError, match=r"placement\.fine: global_batch 16 cannot be divided over 6 ranks"):
        wanted(FOUR, *uneven)
    with pytest.raises(UserError, match="'lots' must be a number of GPUs"):
        recipe("placement.fine=lots")


def test_shares_that_are_held_at_once_are_disjoint_and_on_few_hosts():
    places = Places(FOUR)
    taken = [places.take([count]) for count in (2, 4, 2)]
    assert [in_words(share) for share in taken] == ["alpha:0-1", "beta:0-3", "alpha:2-3"]
    assert places.take([1]) is None
    places.release(taken[1])
    assert in_words(places.take([8, 3])) == "beta:0-2"
    assert parse_share("alpha:0-1 beta:3", FOUR) == (*taken[0], *parse_share("beta:3", FOUR))


def test_without_a_lost_host_a_stage_takes_what_there_is_and_grows_when_it_is_back(tmp_path):
    room = HostRoom(recipe("stages.fine.train.ranks=8"), FOUR, {"fine": 8, "semantic": 2}, tmp_path)
    share = room.take(STAGE["fine"])
    assert in_words(share) == "alpha:0-3 beta:0-3"
    assert room.take(STAGE["semantic"]) is None
    room.release(share)
    room.lose("beta")
    smaller = room.take(STAGE["fine"])
    assert in_words(smaller) == "alpha:0-3"
    assert not room.could_grow(STAGE["fine"], smaller)
    room._places.lost.clear()  # as `returned` does when the host answers
    assert room.could_grow(STAGE["fine"], smaller)
    assert in_words(room.take(STAGE["semantic"])) == "beta:0-1"
    assert not room.could_grow(STAGE["fine"], smaller)


def test_a_stage_that_saves_to_grow_goes_on_with_what_there_is(tmp_path):
    """Its full share no longer fits: another, started again while a host was lost, lies across it."""
    hosts = [Host(name, 8) for name in ("alpha", "beta", "gamma")]
    room = HostRoom(recipe(), hosts, {"semantic": 12, "coarse": 6, "fine": 6}, tmp_path)
    shares = [room.take(STAGE[name]) for name in ("semantic", "coarse", "fine")]
    room.lose("beta")
    room.release(shares[0])
    room.release(shares[2])
    assert in_words(room.take(STAGE["fine"], begun=True)) == "alpha:0-5"
    smaller = room.take(STAGE["semantic"], begun=True)
    assert in_words(smaller) == "alpha:6-7 gamma:6-7"
    room._places.lost.clear()  # as `returned` does when the host answers
    assert room.could_grow(STAGE["semantic"], smaller)
    room.release(smaller)
    assert room.take(STAGE["semantic"]) is None
    assert in_words(room.take(STAGE["semantic"], begun=True)) == "beta:0-7"


def test_what_is_taken_over_keeps_its_gpus_to_itself(monkeypatch):
    monkeypatch.setattr("launcher.room.Machine.here", lambda: Machine(8, ("0", "1", "2", "3")))
    two = recipe("parallel=2", "stage_defaults.train.ranks=2")
    before = LocalRoom(two)
    shares = [before.take(STAGE["semantic"]), before.take(STAGE["coarse"])]
    for left, free in (shares, reversed(shares)):
        room = LocalRoom(two)
        room.again(in_words(left))
        assert in_words(room.take(STAGE["fine"])) == in_words(free)
        assert room.take(STAGE["tokens"]) is None


def test_a_host_that_is_lost_again_while_it_is_looked_at_leaves_no_look_behind(tmp_path, monkeypatch):
    room = HostRoom(recipe(), FOUR, {}, tmp_path)
    monkeypatch.setattr("launcher.room.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("launcher.room.module_on", lambda *_: ["sleep", "100"])
    room.lose("beta")
    assert not list(room.returned())
    look = psutil.Process(room._looks["beta"].process.pid)
    assert look.is_running()
    room.lose("beta")
    room.close()
    assert not look.is_running()


def test_a_host_that_comes_and_goes_is_trusted_less_each_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("launcher.room.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("launcher.room.module_on", lambda *_: ["true"])
    monkeypatch.setattr("launcher.room.returned", lambda *_: [])  # it is fit
    room = HostRoom(recipe(), FOUR, {}, tmp_path)
    waits = []
    for _ in range(3):
        room.lose("beta")
        lost = clock[0]
        while not list(room.returned()):
            process = room._looks["beta"].process
            if process is None:
                clock[0] += 1
            else:
                process.wait()
        waits.append(clock[0] - lost)
    assert waits == [15, 30, 60]


def test_a_smaller_number_of_ranks_still_divides_the_batch():
    assert counts(recipe(), STAGE["fine"], 7) == [6, 4, 3, 2, 1]
    assert counts(recipe(), STAGE["tokens"], 3) == [3, 2, 1]
    assert counts(recipe(), STAGE["corpus"], 1) == [1]


@pytest.mark.parametrize(
    ("ended", "failures", "progressed", "seconds"),
    [
        (Ended(0), 0, True, None),
        (Ended(2), 0, True, None),
        (Ended(DIVERGED), 0, True, None),
        (Ended(FAULT), 0, False, None),
        (Ended(FAULT), 2, True, 5),
        (Ended(SAVED), 0, False, 5),
        (Ended(HUNG), 1, False, 10),
        (Ended(-9), 2, False, 20),
        (Ended(HUNG), 3, False, None),
        (Ended(HUNG), 3, True, 5),
        (Ended(255, ("beta",)), 0, False, 0),
        (Ended(255, ("beta",)), 3, False, None),
    ],
)
def test_what_is_started_again_and_when(ended, failures, progressed, seconds):
    assert restart_after(ended, failures, progressed, RestartsConfig()) == seconds
    if seconds:
        assert restart_after(ended, failures, progressed, RestartsConfig(pause=1000)) == 300


def test_what_counts_as_getting_on(tmp_path):
    coarse, tokens = STAGE["coarse"], STAGE["tokens"]
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress" / "tokens.json").write_text('{"done": 7}')
    assert [how_far(tmp_path, stage) for stage in (coarse, tokens, STAGE["corpus"])] == [None, None, None]
    (tmp_path / "coarse" / "checkpoints" / "step-00000012").mkdir(parents=True)
    (tmp_path / ".tokens.unfinished").mkdir()  # what was done is not lost
    assert [how_far(tmp_path, stage) for stage in (coarse, tokens)] == [12, 7]
    assert got_on(None, 12)
    assert not got_on(12, 12)
    assert not got_on(None, None)
