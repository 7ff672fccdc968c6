"""Copies of checkpoints in S3, as moto's server plays it on the loopback."""

from __future__ import annotations

import json
import os
import threading

import pytest
from buckets import each_cloud, environment, keys, lose, steps_there
from ranks import run_ranks, start_ranks
from training_runs import TINY, checkpoints, job, log_of, make_run, weights_digest

from data import cloud
from model import artifact
from trainer.checkpoint_folder import problems, step_name, steps_in
from trainer.config import TrainConfig
from trainer.remote import Remote, Uploads


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run that was left alone, without uploads."""
    folder = tmp_path_factory.mktemp("alone")
    run = make_run(folder / "run", **TINY)
    run_ranks(job, 2, folder / "log", run)
    return run


@pytest.fixture
def run(bucket, tmp_path):
    return make_run(tmp_path / "run", **TINY, upload=f"{bucket}/some/where")


def stopping_job(run, step):
    """A job that is told to stop at `step`."""
    import signal

    from trainer.training import Training

    original = Training._save_when_due

    def save_when_due(self):
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    Training._save_when_due = save_when_due
    return job(run)


def stop_at(run, step, tmp_path):
    stopped = start_ranks(stopping_job, 2, tmp_path / "log", run, step, **environment())
    assert stopped.wait() == [75, 75], stopped.output()


@each_cloud
def test_a_run_that_lost_its_disk_goes_on_from_the_bucket(run, alone, bucket, tmp_path):
    """Told to stop it waits for the upload; with nothing here it fetches the newest, and ends with the same weights."""
    stop_at(run, 7, tmp_path)
    assert steps_there(bucket) == steps_in(checkpoints(run)) == [7, 6]
    assert all(key.startswith(f"some/where/coarse/{step_name(7)[:-1]}") for key in keys(bucket))
    lose(run)
    run_ranks(job, 2, tmp_path / "log", run, **environment())
    assert "resumed at step 7" in log_of(run)
    assert weights_digest(run) == weights_digest(alone)
    assert steps_there(bucket) == steps_in(checkpoints(run)) == [12, 10]
    for step in (10, 12):
        folder = checkpoints(run) / step_name(step)
        assert not problems(folder)
        for path in folder.iterdir():
            assert cloud.read(f"{bucket}/some/where/coarse/{step_name(step)}/{path.name}") == path.read_bytes()


@pytest.mark.parametrize("damage", ["missing", "flipped", "manifest"])
def test_a_damaged_copy_is_named_and_passed_over(run, alone, bucket, tmp_path, damage):
    stop_at(run, 7, tmp_path)
    place = f"{bucket}/some/where/coarse/{step_name(7)}/"
    named = "manifest.json" if damage == "manifest" else "rank-0001.safetensors"
    if damage == "missing":
        cloud.remove(place + named)
    else:
        content = bytearray(cloud.read(place + named))
        content[len(content) // 2] ^= 1
        put(place + named, content, tmp_path)
    lose(run)
    run_ranks(job, 2, tmp_path / "log", run, **environment())
    log = log_of(run)
    assert f"{place} is damaged and passed over: {place}{named}" in log
    assert "resumed at step 6" in log
    assert weights_digest(run) == weights_digest(alone)


def test_a_good_copy_takes_the_place_of_a_damaged_checkpoint(run, alone, bucket, tmp_path):
    stop_at(run, 7, tmp_path)
    (checkpoints(run) / step_name(7) / "state.json").write_text("{}")
    run_ranks(job, 2, tmp_path / "log", run, **environment())
    assert "checkpoint of step 7 is damaged" in log_of(run)
    assert "resumed at step 7" in log_of(run)
    assert weights_digest(run) == weights_digest(alone)


def test_going_back_removes_what_is_newer_there_too(run, bucket, tmp_path):
    stop_at(run, 7, tmp_path)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("resume: auto", "resume: 6").replace("steps: 12", "steps: 6"))
    run_ranks(job, 2, tmp_path / "log", run, **environment())
    assert steps_there(bucket) == [6]
    assert keys(f"{bucket}/some/where/coarse/{step_name(7)}") == []


def refused(run, tmp_path, **env):
    started = start_ranks(job, 2, tmp_path / "refused", run, **{**environment(), **env})
    assert started.wait(60) == [2, 2], started.output()
    errors = {log.read_text().partition("error: ")[2] for log in (tmp_path / "refused").glob("*.txt")}
    assert len(errors) == 1
    assert not (checkpoints(run)).exists()
    return errors.pop()


def test_a_bucket_that_is_not_there_is_an_error_at_the_start(bucket, tmp_path):
    run = make_run(tmp_path / "run", **TINY, upload="s3://chekpoints/x")
    said = refused(run, tmp_path)
    assert "train.upload: s3://chekpoints/x/coarse/ cannot be used: there is no bucket chekpoints" in said


def test_missing_credentials_are_an_error_at_the_start(run, tmp_path):
    nowhere = {"AWS_SHARED_CREDENTIALS_FILE": "/nonexistent", "AWS_CONFIG_FILE": "/nonexistent"}
    blank = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    assert "credentials" in refused(run, tmp_path, **blank, **nowhere, AWS_EC2_METADATA_DISABLED="true")


def test_an_endpoint_that_is_no_address_is_an_error_at_the_start(run, tmp_path):
    assert "localhost:9000" in refused(run, tmp_path, AWS_ENDPOINT_URL="localhost:9000")


def test_a_copy_of_a_later_version_is_refused_and_stays(bucket, tmp_path):
    stored(tmp_path, 2, 4)
    manifest = tmp_path / step_name(4) / artifact.MANIFEST
    artifact.write_json(manifest, {**json.loads(manifest.read_text()), "format_version": 2})
    remote = Remote(f"{bucket}/x", "coarse")
    for step in (2, 4):
        remote.upload(step, tmp_path / step_name(step))
    with pytest.raises(artifact.NewerFormat, match=f"{step_name(4)} has format version 2"):
        remote.whole()
    uploads(bucket, tmp_path, keep_last=2).finish(60)
    assert steps_there(bucket) == [4, 2]


def test_a_prefix_with_the_copies_of_another_run_is_refused(run, bucket, tmp_path):
    """They would be taken for this run's, and pruned."""
    stop_at(run, 7, tmp_path)
    other = make_run(tmp_path / "other", **TINY, upload=f"{bucket}/some/where")
    (other / "coarse" / "stage.json").write_text('{"fingerprint": "fedcba9876543210"}')
    said = refused(other, tmp_path)
    assert "made with another recipe" in said
    assert "choose another train.upload" in said
    assert steps_there(bucket) == [7, 6]


def test_training_goes_on_without_the_bucket_and_uploads_when_it_is_back(run, alone, bucket, tmp_path):
    run_ranks(interrupted_uploads, 2, tmp_path / "log", run, **environment())
    assert "uploading checkpoints failed, and is tried again after the next one" in log_of(run)
    assert weights_digest(run) == weights_digest(alone)
    assert steps_there(bucket) == [12, 10]


def interrupted_uploads(run):
    """A job that cannot write to S3 before step 10 is saved."""
    from data.cloud import Unreachable
    from trainer.remote import Remote

    original = Remote.upload

    def upload(self, step, folder):
        if step < 10:
            raise Unreachable("the network is gone")
        original(self, step, folder)

    Remote.upload = upload
    return job(run)


# The uploads alone


def put(url, content, folder):
    (folder / "content").write_bytes(content)
    cloud.store(folder / "content", url)


def stored(folder, *steps, loss=None):
    """Folders that pass for checkpoints."""
    for step in steps:
        path = folder / step_name(step)
        path.mkdir(parents=True)
        (path / "rank-0000.safetensors").write_bytes(bytes([step]) * 1000)
        files = artifact.describe_files(path)
        info = {"validation": {"loss": loss[step]} if loss else {}}
        artifact.seal(path, "checkpoint", artifact.fingerprint({}, info, files), {}, info, files)


def uploads(bucket, folder, **train):
    return Uploads(Remote(f"{bucket}/x", "coarse"), folder, TrainConfig(upload=f"{bucket}/x", **train))


@each_cloud
def test_copies_go_as_checkpoints_do(bucket, tmp_path):
    """By the same rule, but by what is there: a disk that lost them does not take their copies along."""
    stored(tmp_path / "a", 2, 4, 6, 8, loss={2: 3.0, 4: 1.0, 6: 2.0, 8: 2.0})
    uploads(bucket, tmp_path / "a", keep_every=6, keep_best="loss").finish(60)
    assert steps_there(bucket) == [8, 6, 4]
    stored(tmp_path / "b", 10, loss={10: 5.0})
    uploads(bucket, tmp_path / "b", keep_every=6, keep_best="loss").finish(60)
    assert steps_there(bucket) == [10, 8, 6, 4]
    uploads(bucket, tmp_path / "b", keep_last=2).finish(60)
    assert steps_there(bucket) == [10, 8]


def test_a_half_uploaded_copy_is_never_whole(bucket, tmp_path):
    """The manifest comes last and goes first, also where another copy had the place."""
    stored(tmp_path / "a", 2, 4)
    stored(tmp_path / "b", 4, loss={4: 1.0})
    remote = Remote(f"{bucket}/x", "coarse")
    remote.upload(4, tmp_path / "a" / step_name(4))
    (tmp_path / "b" / step_name(4) / "state.json").mkdir()  # which cannot be uploaded
    with pytest.raises(OSError):  # noqa: PT011 (whichever)
        remote.upload(4, tmp_path / "b" / step_name(4))
    assert remote.whole() == {}
    assert keys(bucket)
    uploads(bucket, tmp_path / "a").finish(60)
    assert steps_there(bucket) == [4, 2]
    assert remote.whole().keys() == {2, 4}


@each_cloud
def test_what_is_left_of_a_broken_upload_is_removed(bucket, tmp_path):
    put(f"{bucket}/x/coarse/{step_name(1)}/rank-0000.safetensors", b"half", tmp_path)
    stored(tmp_path, 2, 4)
    uploads(bucket, tmp_path).finish(60)
    assert {key.split("/")[2] for key in keys(bucket)} == {step_name(2), step_name(4)}


def test_waiting_for_an_upload_has_an_end(bucket, tmp_path, monkeypatch, caplog):
    """What is being read stays meanwhile."""
    stored(tmp_path, 2)
    hold = threading.Event()
    monkeypatch.setattr(Remote, "upload", lambda *_: hold.wait(30))
    slow = uploads(bucket, tmp_path)
    slow.finish(0.5)
    assert slow.uploading == 2
    assert "given up after 0.5 s" in caplog.text
    hold.set()


def test_other_files_in_the_bucket_are_left_alone(bucket, tmp_path):
    """Also a file that would lie outside of the folder it is fetched to."""
    others = ["x/coarse/notes.txt", "x/coarse-2/step-00000002/manifest.json", "x/coarse/step-00000002/../../../evil"]
    for key in others:
        put(f"{bucket}/{key}", b"mine", tmp_path)
    stored(tmp_path / "here", 2, 4, 6)
    uploads(bucket, tmp_path / "here").finish(60)
    remote = Remote(f"{bucket}/x", "coarse")
    (tmp_path / "fetched").mkdir()
    remote.download(6, tmp_path / "fetched")
    assert {path.name for path in (tmp_path / "fetched").iterdir()} == {"rank-0000.safetensors", artifact.MANIFEST}
    assert set(others) <= set(keys(bucket))
