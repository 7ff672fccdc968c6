"""A run's jobs on a Kubernetes cluster, by the real kubectl and an API server of the test's own, behind which nothing
runs: what JobSet and Argo would do is said by the test."""

from __future__ import annotations

import shutil

import pytest
import yaml
from kubernetes_api import Cluster
from kubernetes_jobs import config, share

from launcher.backends import Job
from launcher.backends.kubernetes import Kubernetes
from launcher.backends.others import check_others
from launcher.batch import jobs_for, living
from launcher.graph import stage_named
from launcher.job_record import record_job
from launcher.recipe import load_recipe
from launcher.restarts import Ended
from launcher.run_folder import DIRECT, RunFolder
from launcher.stages import STAGES
from launcher.stopping import stop
from model.errors import UserError
from trainer.exit_codes import DIVERGED, FAULT, SAVED

KEYS = ("namespace=team", "image=registry.example/stretto:0.1.0")
JOBSET = "jobset.sigs.k8s.io/jobset-name"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """One that this user can reach, with what the recipe names."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    started = Cluster("team")
    (tmp_path / "config").write_text(started.kubeconfig())
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # kubectl keeps there what it knows of a cluster
    started.add("persistentvolumeclaims", "shared")
    yield started
    started.stop()


@pytest.fixture
def backend(tmp_path):
    return kubernetes(tmp_path)


def kubernetes(folder, **keys):
    return Kubernetes(folder / "run", config(**{"volumes": {"shared": str(folder)}, "nodes": 2, **keys}))


def submit(backend, folder, stages=STAGES):
    """Submits stages as a launcher does, and returns their handles."""
    jobs, handles = jobs_for(load_recipe("quickstart"), folder / "run", stages, backend, {}), {}
    backend.check(jobs)
    assert backend.submit_all(jobs, handles.__setitem__) is None
    return handles


def workflows(cluster):
    return [found for (kind, _), found in cluster.objects.items() if kind == "workflows"]


def test_a_run_is_given_to_the_cluster_as_one_workflow(cluster, backend, tmp_path):
    handles = submit(backend, tmp_path)
    (given,) = workflows(cluster)
    name = given["metadata"]["name"]
    assert handles["coarse"] == f"{name}-coarse"
    assert given["spec"] == yaml.safe_load((tmp_path / "run" / "jobs" / f"{name}.yaml").read_text())["spec"]
    assert given["metadata"]["namespace"] == "team"


def test_a_run_that_still_works_is_not_given_to_the_cluster_again(cluster, backend, tmp_path):
    first = submit(backend, tmp_path)
    (given,) = workflows(cluster)
    later = [stage_named("coarse"), stage_named("fine")]
    with pytest.raises(UserError, match=f"{given['metadata']['name']}, which an earlier command gave"):
        submit(backend, tmp_path, later)
    given["status"] = {"phase": "Failed"}
    # What the cluster remembers of the first does not stand in the way of the second.
    second = submit(backend, tmp_path, later)
    assert set(second) == {"coarse", "fine"}
    assert not set(second.values()) & set(first.values())


def test_a_run_is_not_given_to_a_cluster_that_does_not_say_whether_it_still_works(cluster, backend, tmp_path):
    cluster.hidden.add("jobsets")
    with pytest.raises(UserError, match=r"the cluster says: .*\(Forbidden\): .*you cannot list them"):
        submit(backend, tmp_path)
    assert not workflows(cluster)


def test_all_that_the_cluster_lacks_is_said_at_once_and_nothing_is_given_to_it(cluster, tmp_path):
    del cluster.kinds["argoproj.io/v1alpha1"]
    wanted = kubernetes(tmp_path, secrets=["hub"], service_account="trainer", queue="team", priority_class="high")
    with pytest.raises(UserError) as caught:
        submit(wanted, tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    for words in (
        "no Argo Workflows",
        '"hub" not found',
        '"trainer" not found',
        '"team" not found',
        '"high" not found',
    ):
        assert any(words in line for line in lines), words
    assert not workflows(cluster)
    assert not (tmp_path / "run").exists()


def test_what_the_cluster_refuses_is_said_in_its_words(cluster, tmp_path):
    with pytest.raises(UserError, match='namespaces "other" not found'):
        submit(kubernetes(tmp_path, namespace="other"), tmp_path)
    with pytest.raises(UserError, match='context "elsewhere" does not exist'):
        submit(kubernetes(tmp_path, context="elsewhere"), tmp_path)
    cluster.stop()
    with pytest.raises(UserError, match="was refused"):
        submit(kubernetes(tmp_path), tmp_path)


def test_stages_get_the_nodes_that_placement_says_and_no_more(tmp_path):
    recipe = load_recipe("quickstart", ["placement.coarse=2 nodes", "stages.coarse.train.global_batch=32"])
    backend = kubernetes(tmp_path, gpus_per_node=4)
    taken = backend.shares(recipe, STAGES)
    assert [len(part.slots) for part in taken["coarse"]] == [4, 4]
    assert [len(part.slots) for part in taken["corpus"]] == [1]
    with pytest.raises(UserError, match=r"placement\.coarse asks for 2 nodes"):
        kubernetes(tmp_path, nodes=1).shares(recipe, STAGES)


def test_without_kubectl_the_manifest_is_left_with_the_command(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    recipe, corpus = load_recipe("quickstart"), stage_named("corpus")
    handles = {}
    said = backend.submit_all([Job(tmp_path / "run", recipe, corpus, share(1, 1))], handles.__setitem__)
    (manifest,) = (tmp_path / "run" / "jobs").glob("*.yaml")
    assert said.endswith(f": kubectl --namespace team apply -f {manifest}")
    assert yaml.safe_load(manifest.read_text())["kind"] == "Workflow"
    with pytest.raises(UserError, match="kubectl is not installed here"):
        backend.poll(handles["corpus"])


def test_without_kubectl_a_run_whose_workflow_is_gone_can_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run, recipe = tmp_path / "run", load_recipe("quickstart", [f"kubernetes.{key}" for key in KEYS])
    with RunFolder.opened(run, recipe) as folder:
        folder.adopt(recipe)
        folder.record("corpus", backend="kubernetes", job="quickstart-1-corpus", state="waiting")
        with pytest.raises(UserError, match=rf"where there is one\. .*deleted, remove {run}/state\.json"):
            living(folder, Kubernetes(run, recipe.kubernetes))
    (run / "state.json").unlink()
    with RunFolder.opened(run, recipe) as folder:
        assert living(folder, Kubernetes(run, recipe.kubernetes)) == {}
        check_others(folder, recipe, DIRECT)


def test_a_stage_is_watched_from_waiting_to_its_end(cluster, backend, tmp_path):
    handle = submit(backend, tmp_path)["coarse"]
    assert backend.poll(handle) is None  # no JobSet yet
    cluster.add("jobsets", handle, status={})
    assert backend.poll(handle) is None
    cluster.objects["jobsets", handle]["status"] = {"terminalState": "Completed"}
    assert backend.poll(handle) == Ended(0)
    cluster.objects["jobsets", handle]["status"] = {"terminalState": "Failed"}
    assert backend.poll(handle) == Ended(FAULT)  # its pods are gone
    for number, code, minute in ((0, 1, 2), (1, DIVERGED, 1), (2, 0, 0)):
        ended = {"terminated": {"exitCode": code, "finishedAt": f"2026-01-01T00:0{minute}:00Z"}}
        labels = {"labels": {JOBSET: handle}}
        status = {"containerStatuses": [{"state": ended}]}
        cluster.add("pods", f"{handle}-{number}", metadata=labels, status=status)
    assert backend.poll(handle) == Ended(DIVERGED)  # the first that failed
    assert backend.logs(handle) == tmp_path / "run" / "logs" / "coarse.log"


def test_a_stage_whose_inputs_failed_has_ended_and_one_the_cluster_forgot_is_as_its_pods_said(
    cluster, backend, tmp_path
):
    handles = submit(backend, tmp_path)
    workflow = ("workflows", handles["bundle"].removesuffix("-bundle"))
    nodes = {"1": {"displayName": "coarse", "phase": "Failed"}, "2": {"displayName": "bundle", "phase": "Omitted"}}
    cluster.objects[workflow]["status"] = {"phase": "Running", "nodes": nodes}
    assert backend.poll(handles["bundle"]) == Ended(SAVED)
    assert backend.poll(handles["samples"]) is None
    del cluster.objects[workflow]
    assert backend.poll(handles["samples"]) == Ended(SAVED)
    record_job(tmp_path / "run", "samples", handles["samples"], state="done")
    assert backend.poll(handles["samples"]) == Ended(0)


@pytest.mark.parametrize("state", ["interrupted", "failed"])
def test_what_the_cluster_starts_again_can_be_stopped_and_keeps_others_out(cluster, backend, tmp_path, state):
    """A pod that has failed, or saved because its node was drained, is not the end of its stage."""
    run, recipe = tmp_path / "run", load_recipe("quickstart", [f"kubernetes.{key}" for key in KEYS])
    with RunFolder.opened(run, recipe) as folder:
        folder.adopt(recipe)
        handle = submit(backend, tmp_path, [stage_named("corpus")])["corpus"]
        cluster.add("jobsets", handle, status={})
        # What Argo says once it is deleted.
        (submitted,) = workflows(cluster)
        submitted["status"] = {"phase": "Failed", "nodes": {"1": {"displayName": "corpus", "phase": "Failed"}}}
        folder.record("corpus", backend="kubernetes", job=handle, state="waiting")
        record_job(run, "corpus", handle, state=state)
    with RunFolder.opened(run, recipe) as folder, pytest.raises(UserError, match="corpus still runs or waits"):
        check_others(folder, recipe, DIRECT)
    stop(run, say=lambda _: None)
    assert ("jobsets", handle) in [(kind, name) for kind, name, _ in cluster.deleted]
    with RunFolder.opened(run, recipe) as folder:
        check_others(folder, recipe, DIRECT)


def test_what_the_cluster_took_without_an_answer_can_be_stopped_and_keeps_others_out(
    cluster, backend, tmp_path, monkeypatch
):
    run, recipe, ask = (
        tmp_path / "run",
        load_recipe("quickstart", [f"kubernetes.{key}" for key in KEYS]),
        Kubernetes._ask,
    )

    def lose_answer(asked, *arguments):
        answer = ask(asked, *arguments)
        if arguments[0] == "apply":
            raise UserError("the cluster has not answered")
        return answer

    monkeypatch.setattr(Kubernetes, "_ask", lose_answer)
    with RunFolder.opened(run, recipe) as folder:
        folder.adopt(recipe)
        folder.record("corpus", backend="kubernetes", state="waiting")
        jobs = jobs_for(recipe, run, [stage_named("corpus")], backend, {})
        with pytest.raises(UserError, match="has not answered"):
            backend.submit_all(jobs, lambda name, handle: folder.record(name, job=handle))
        with pytest.raises(UserError, match="corpus still runs or waits"):
            check_others(folder, recipe, DIRECT)
    stop(run, say=lambda _: None)
    assert not workflows(cluster)
    with RunFolder.opened(run, recipe) as folder:
        check_others(folder, recipe, DIRECT)


def test_what_the_cluster_refused_has_ended(cluster, backend, tmp_path):
    elsewhere, handles = kubernetes(tmp_path, namespace="other"), {}
    with pytest.raises(UserError, match='namespaces "other" not found'):
        elsewhere.submit_all(
            jobs_for(load_recipe("quickstart"), tmp_path / "run", STAGES, elsewhere, {}), handles.__setitem__
        )
    assert set(handles) == {stage.name for stage in STAGES}
    assert backend.poll(handles["coarse"]) == Ended(SAVED)


def test_a_stage_is_let_save_or_ended_at_once_and_one_that_waits_does_not_begin(cluster, backend, tmp_path):
    handles = submit(backend, tmp_path)
    for stage in ("coarse", "fine"):
        cluster.add("jobsets", handles[stage])
        cluster.add("pods", f"{stage}-pod", metadata={"labels": {JOBSET: handles[stage]}})
    backend.cancel(handles["coarse"])
    assert [(kind, name) for kind, name, _ in cluster.deleted] == [("jobsets", handles["coarse"])]
    backend.cancel(handles["fine"], now=True)
    kind, name, options = cluster.deleted[-1]
    assert (kind, name, options["gracePeriodSeconds"]) == ("pods", "fine-pod", 1)
    backend.cancel(handles["bundle"])
    kind, _, options = cluster.deleted[-1]
    # Only what makes JobSets goes: those that run stay.
    assert (kind, options["propagationPolicy"]) == ("workflows", "Orphan")
    backend.cancel(handles["bundle"])  # nothing is left to call off
