"""Checkpoints on one real rank: what stays, what is never chosen, and what is said of it."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from ranks import run_ranks, start_ranks
from training_runs import TINY, change, checkpoints, job, log_of, make_run, rows, weights_digest

from model import artifact
from trainer import checkpoint_folder
from trainer.checkpoint_folder import problems, step_name, steps_in, superseded
from trainer.config import TrainConfig


def refused(run, tmp_path, ranks=1):
    """What a job says that every rank ends with code 2."""
    started = start_ranks(job, ranks, tmp_path / "refused", run)
    assert started.wait() == [2] * ranks, started.output()
    errors = [log.read_text().partition("error: ")[2] for log in sorted((tmp_path / "refused").glob("rank-*.txt"))]
    assert len(set(errors)) == 1, errors
    shutil.rmtree(tmp_path / "refused")
    return " ".join(errors[0].split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Twelve steps on one rank, with every checkpoint kept."""
    folder = tmp_path_factory.mktemp("trained")
    run = make_run(folder / "run", **TINY, keep_last=99)
    run_ranks(job, 1, folder / "log", run)
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


# What stays


def kept(figures, **train):
    good = dict(figures) if isinstance(figures, dict) else dict.fromkeys(figures)
    return sorted(good.keys() - superseded(good, TrainConfig(**train)))


def test_the_newest_stay():
    assert kept([2, 4, 6, 8], keep_last=2) == [6, 8]
    assert kept([2, 4, 6, 8], keep_last=3) == [4, 6, 8]
    assert kept([2], keep_last=2) == [2]


def test_multiples_stay_for_good():
    assert kept([2, 4, 6, 8, 10, 12], keep_every=4) == [4, 8, 10, 12]


def test_the_best_stays_where_it_was_validated():
    assert kept({2: 3.0, 4: 1.0, 6: None, 8: 2.0, 10: 2.5}, keep_best="loss") == [4, 8, 10]
    assert kept({2: None, 4: None, 6: None}, keep_best="loss") == [4, 6]
    assert kept({2: float("nan"), 4: 1.0, 6: 2.0, 8: 2.0}, keep_best="loss") == [4, 6, 8]


def test_fewer_than_two_cannot_be_asked_for():
    with pytest.raises(ValueError, match="keep_last"):
        TrainConfig(keep_last=1)


def test_a_training_keeps_what_it_was_told_to(tmp_path):
    """The last two, multiples of six, and the one with the lowest validation loss, wherever that was."""
    settings = {**TINY, "validate_every": 4, "keep_every": 6, "keep_best": "loss", "learning_rate": 3.0}
    run = make_run(tmp_path / "run", **settings, schedule="constant")
    run_ranks(job, 1, tmp_path / "log", run)
    losses = {row["step"]: row["loss"] for row in rows(run, "validation") if row["step"]}
    assert losses.keys() == {4, 8, 12}
    best = min(losses, key=losses.__getitem__)
    assert steps_in(checkpoints(run)) == sorted({6, 10, 12, best}, reverse=True)
    assert all(not problems(path) for path in checkpoints(run).iterdir())


def test_a_damaged_checkpoint_is_not_counted_as_one_that_is_kept(tmp_path):
    """Two good ones stay besides it."""
    run = make_run(tmp_path / "run", **{**TINY, "steps": 4})
    run_ranks(job, 1, tmp_path / "log", run)
    change(run, steps=12)
    run_ranks(truncating_job, 1, tmp_path / "log", run)
    good = [step for step in steps_in(checkpoints(run)) if not problems(checkpoints(run) / step_name(step))]
    assert good == [12, 10]
    # When 8 was saved, 6 was damaged: 4 had to stay until 10 was there.
    assert (run / "kept at 8").read_text() == "[8, 6, 4]"


def truncating_job(run):
    """Damages the checkpoint of step 6 as soon as it is there, and notes which there are after that of step 8."""
    from trainer.checkpoint import Checkpointer

    original = Checkpointer.finish

    def finish(self):
        step = original(self)
        if step == 6:
            (self.path(6) / "rank-0000.safetensors").write_bytes(b"")
        if step == 8:
            (run / "kept at 8").write_text(str(steps_in(self.folder)))
        return step

    Checkpointer.finish = finish
    return job(run)


def test_a_removal_that_was_broken_off_leaves_nothing_with_a_name(run, trained, tmp_path):
    """The folder loses its name first, so a half-removed one is never looked at; the next start removes the rest."""
    hidden = checkpoints(run) / f".{step_name(12)}.removed"
    (checkpoints(run) / step_name(12)).rename(hidden)
    (hidden / "state.json").unlink()
    run_ranks(job, 1, tmp_path / "log", run)
    assert "resumed at step 10" in log_of(run)
    assert "passed over" not in log_of(run)
    assert not hidden.exists()
    assert weights_digest(run) == weights_digest(trained)


# What is chosen


def damaged(folder, what):
    state, weights, manifest = (folder / name for name in ("state.json", "rank-0000.safetensors", artifact.MANIFEST))
    if what == "deleted":
        weights.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif what == "flipped":
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif what == "another state":
        state.write_text(state.read_text().replace('"step": 12', '"step": 10'))
    elif what == "emptied":
        manifest.write_text("")
    elif what == "changed":
        manifest.write_text(manifest.read_text().replace('"world_size": 1', '"world_size": 3'))


NAMED = {
    "deleted": "rank-0000.safetensors is missing",
    "truncated": "expected",
    "flipped": "rank-0000.safetensors has changed",
    "another state": "state.json has changed",
    "emptied": "manifest.json is damaged",
    "changed": "manifest.json has changed",
}


@pytest.mark.parametrize("what", NAMED)
def test_a_damaged_checkpoint_is_named_and_passed_over(run, trained, tmp_path, what):
    damaged(checkpoints(run) / step_name(12), what)
    run_ranks(job, 1, tmp_path / "log", run)
    log = log_of(run)
    assert "checkpoint of step 12 is damaged and passed over" in log
    assert NAMED[what] in log
    assert "resumed at step 10" in log
    assert weights_digest(run) == weights_digest(trained)


def test_every_flipped_byte_of_a_manifest_shows(trained, tmp_path):
    """Whatever it says: sizes, digests, ranks, names."""
    folder = shutil.copytree(checkpoints(trained) / step_name(12), tmp_path / "checkpoint")
    manifest = folder / artifact.MANIFEST
    content = manifest.read_bytes()
    said = json.loads(content)
    drawn = random.Random(0)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << drawn.randrange(8)
        manifest.write_bytes(changed)
        if not problems(folder, digests=False):
            # A space for another, or a format that is older than any: it says the same.
            assert {**json.loads(changed), "format_version": 1} == said


def write_newer(folder):
    """As a later Stretto would have written an artifact."""
    manifest = json.loads((folder / artifact.MANIFEST).read_text())
    artifact.write_json(folder / artifact.MANIFEST, {**manifest, "format_version": artifact.FORMAT_VERSION + 1})


def test_a_checkpoint_of_a_later_version_is_refused_and_not_passed_over(run, tmp_path):
    """Going on from an older one would remove it."""
    write_newer(checkpoints(run) / step_name(12))
    words = refused(run, tmp_path)
    assert f"{step_name(12)} has format version 2; this Stretto reads up to 1: upgrade it." in words
    assert "Or say with train.resume which step to go back to." in words
    assert steps_in(checkpoints(run)) == [12, 10, 8, 6, 4, 2]
    change(run, resume=8)
    run_ranks(job, 1, tmp_path / "log", run)
    assert "resumed at step 8" in log_of(run)


def test_nothing_whole_is_an_error_and_not_a_fresh_start(run, tmp_path):
    for folder in checkpoints(run).iterdir():
        damaged(folder, "deleted")
    assert "none of the checkpoints in" in refused(run, tmp_path)
    shutil.rmtree(checkpoints(run))
    assert "has saved step 12 there" in refused(run, tmp_path)


def test_a_lost_folder_shows_however_long_ago_it_was_saved(run, tmp_path):
    """More rows than the end of the file holds follow the last checkpoint's."""
    shutil.rmtree(checkpoints(run))
    with (run / "coarse" / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"kind": "train", "step": 13, "padding": "x" * 300}) + "\n" for _ in range(400))
    assert "has saved step 12 there" in refused(run, tmp_path)


def test_a_step_that_was_asked_for_is_gone_back_to_once(run, trained, tmp_path):
    """Later checkpoints go; interrupted after that, the same command goes on from what it has saved since."""
    change(run, resume=4)
    for path in checkpoints(run).glob(f"{step_name(10)}/*"):
        path.unlink()
    run_ranks(stopped_at_eight, 1, tmp_path / "log", run)
    assert "resumed at step 4" in log_of(run)
    assert steps_in(checkpoints(run)) == [8, 6, 4, 2]
    run_ranks(job, 1, tmp_path / "log", run)
    assert "resumed at step 8" in log_of(run)
    assert weights_digest(run) == weights_digest(trained)


def stopped_at_eight(run):
    from trainer.exit_codes import SAVED
    from trainer.training import Training

    original = Training._save_when_due

    def save_when_due(self):
        if self.step == 8:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    Training._save_when_due = save_when_due
    assert job(run) == SAVED


def test_what_was_asked_for_and_is_not_there_is_an_error(run, tmp_path):
    change(run, resume=5)
    assert "no good checkpoint of step 5" in refused(run, tmp_path)
    damaged(checkpoints(run) / step_name(4), "flipped")
    change(run, resume=4)
    assert "no good checkpoint of step 4" in refused(run, tmp_path)
    shutil.rmtree(checkpoints(run))
    change(run, resume="always")
    assert "train.resume=always" in refused(run, tmp_path)


def test_a_checkpoint_of_another_recipe_is_refused(run, tmp_path):
    (run / "coarse" / "stage.json").write_text('{"fingerprint": "fedcba9876543210"}')
    assert "made with another recipe" in refused(run, tmp_path)


def test_what_a_checkpoint_says_is_of_its_own_step(trained):
    """It is written beside the training, which meanwhile goes on."""
    for step in (2, 4, 6):
        folder = checkpoints(trained) / step_name(step)
        found = checkpoint_folder.read(folder)
        state = json.loads((folder / "state.json").read_text())
        assert (found.info["step"], state["step"]) == (step, step)
        assert found.info["consumed"]["windows"] == state["consumed"]["windows"] == 8 * step


# Writing


def unshared(run):
    """A job whose second rank has a disk of its own, as on hosts without a shared one."""
    import os

    from trainer.checkpoint import Checkpointer

    def __init__(self, folder, *arguments):
        original(self, folder if os.environ["RANK"] == "0" else folder / "elsewhere", *arguments)

    original, Checkpointer.__init__ = Checkpointer.__init__, __init__
    return job(run)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_metrics_tell_of_each_checkpoint(tmp_path, asynchronous):
    """So that one whose folder is gone is missed."""
    run = make_run(tmp_path / "run", **TINY, checkpoint_async=asynchronous)
    run_ranks(job, 1, tmp_path / "log", run)
    told = rows(run, "checkpoint")
    assert [row["step"] for row in told] == list(range(2, 13, 2))
    stalls = [row["stall"] for row in told]
    assert stalls[0] > 0
    assert stalls == sorted(stalls)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_ranks_that_do_not_share_a_disk_are_told_so(tmp_path, asynchronous):
    run = make_run(tmp_path / "run", **TINY, checkpoint_async=asynchronous)
    started = start_ranks(unshared, 2, tmp_path / "log", run)
    assert started.wait() == [2, 2], started.output()
    assert started.output().count("Put it on a disk that all hosts share") == 2
    assert steps_in(checkpoints(run)) == []


def broken_writer(run, rank, error):
    """A job of which one rank cannot write its third checkpoint."""
    import os

    from trainer import checkpoint

    original = checkpoint.write_tensors

    def write_tensors(path, tensors):
        if path.parent.name == ".step-00000006.partial" and os.environ["RANK"] == str(rank):
            raise error
        return original(path, tensors)

    checkpoint.write_tensors = write_tensors
    return job(run)


REFUSED, MISTAKEN = (PermissionError(1, "not yours"), 2), (ValueError("a mistake"), 1)


@pytest.mark.parametrize(
    ("rank", "asynchronous", "error", "code"),
    [(0, True, *REFUSED), (1, False, *REFUSED), (1, True, *MISTAKEN)],
    ids=["first rank", "second rank", "mistake of ours"],
)
def test_all_ranks_stop_where_one_cannot_write(tmp_path, rank, asynchronous, error, code):
    """With the same words; the checkpoints before stay, and the same command goes on."""
    run = make_run(tmp_path / "run", **TINY, checkpoint_async=asynchronous)
    started = start_ranks(broken_writer, 2, tmp_path / "log", run, rank, error)
    assert started.wait(30) == [code, code], started.output()
    said = "not yours" if code == 2 else f"rank-000{rank}.safetensors was not written"
    assert all(said in log.read_text() for log in (tmp_path / "log").glob("*.txt")), started.output()
    assert steps_in(checkpoints(run)) == [4, 2]
    run_ranks(job, 2, tmp_path / "log", run)
    assert "resumed at step 4" in log_of(run)
    assert steps_in(checkpoints(run)) == [12, 10]


def lying_disk(run):
    """A job whose disk gives back something else than it was given, once."""
    from trainer import tensor_files

    original = tensor_files.LargeFile.read_into

    def read_into(self, block):
        count = original(self, block)
        if ".step-00000006" in str(self.path):
            block[0] ^= 1
        return count

    tensor_files.LargeFile.read_into = read_into
    return job(run)


def test_a_disk_that_does_not_give_back_what_it_was_given_is_found_out(tmp_path):
    run = make_run(tmp_path / "run", **TINY)
    started = start_ranks(lying_disk, 1, tmp_path / "log", run)
    assert started.wait() == [1]
    assert "the disk is not to be trusted" in started.output()
    assert steps_in(checkpoints(run)) == [4, 2]
