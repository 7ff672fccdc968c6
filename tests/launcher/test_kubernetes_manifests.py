"""Manifests for Kubernetes against the published schemas of JobSet, Job and Argo's Workflow, and what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from hera.workflows.models import Workflow
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from kubernetes_jobs import NEEDED, WHOLE, config, jobs, share
from pydantic import ValidationError

from launcher.backends import Job
from launcher.backends.kubernetes import Kubernetes
from launcher.backends.kubernetes_manifests import dump, jobset_name, stage_of, workflow_name, workflow_of
from launcher.graph import stage_named
from launcher.kubernetes_config import KubernetesConfig
from launcher.recipe import load_recipe
from model.errors import UserError
from trainer.exit_codes import DIVERGED, FAULT, HUNG, SAVED

LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
"""A DNS label that JobSet takes (RFC 1035); it may have 63 letters."""


def made(given, **keys):
    """The Workflow as kubectl reads it, and the JobSets in it by their stages."""
    workflow = yaml.safe_load(Kubernetes(given[0].run, config(**keys)).dry_run(given))
    templates = {template["name"]: template for template in workflow["spec"]["templates"]}
    del templates["stages"]
    return workflow, {stage: yaml.safe_load(one["resource"]["manifest"]) for stage, one in templates.items()}


def pod(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("keys", [NEEDED, WHOLE, {**WHOLE, "gpu_resource": None}], ids=["least", "whole", "no-gpus"])
def test_manifests_are_of_the_published_schemas(keys):
    """A schema's model drops what it does not know, and refuses what is of another type."""
    workflow, jobsets = made(jobs(), **keys)
    read = Workflow.model_validate(workflow).model_dump_json(by_alias=True, exclude_none=True)
    assert json.loads(read) == workflow
    assert len(jobsets) == 10
    for written in jobsets.values():
        read = JobsetV1alpha2JobSet.from_dict(written)
        assert read is not None
        assert json.loads(read.to_json()) == written


def test_a_schema_refuses_a_key_that_there_is_not():
    _, jobsets = made(jobs())
    wrong = jobsets["coarse"]
    pod(wrong)["containers"][0]["shm"] = "16Gi"
    assert json.loads(JobsetV1alpha2JobSet.from_dict(wrong).to_json()) != wrong


@pytest.mark.parametrize(
    "name", ["quickstart", "My.Great_Recipe-2", "7B", "_", "musique_à_la_carte_très_très_longue", "a" * 80, "x-" * 40]
)
def test_names_are_taken_by_the_cluster_whatever_the_recipe_is_called(name):
    names = {jobset_name(workflow_name(name, Path(run), 999), "quantizers") for run in ("/a", "/b")}
    assert len(names) == 2
    for found in names:
        # That of a pod is the longest; JobSet refuses a set whose pods' names would be too long.
        assert LABEL.fullmatch(f"{found}-node-0-9999-abcde")
        assert len(f"{found}-node-0-9999-abcde") <= 63
        assert stage_of(found) == "quantizers"
        assert jobset_name(workflow_of(found), "quantizers") == found
    assert workflow_name(name, Path("/a"), 1) != workflow_name(name, Path("/a"), 2)


def test_stages_wait_for_what_they_need_and_a_failed_one_does_not_end_the_others():
    workflow, _ = made(jobs())
    dag = next(template["dag"] for template in workflow["spec"]["templates"] if "dag" in template)
    assert dag["failFast"] is False
    needs = {task["name"]: set(task.get("dependencies", ())) for task in dag["tasks"]}
    assert needs["corpus"] == set()
    assert needs["semantic"] == needs["coarse"] == needs["fine"] == {"quantizers", "tokens"}
    assert {"semantic", "coarse", "fine"} <= needs["bundle"]


def test_what_is_made_already_is_not_waited_for():
    workflow, jobsets = made([job for job in jobs() if job.stage.name in ("coarse", "bundle")])
    assert set(jobsets) == {"coarse", "bundle"}
    tasks = workflow["spec"]["templates"][0]["dag"]["tasks"]
    assert [task.get("dependencies") for task in tasks] == [None, ["coarse"]]


def test_exit_codes_say_what_is_started_again():
    _, jobsets = made(jobs(), restarts=4)
    spec = jobsets["semantic"]["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    rules = job["podFailurePolicy"]["rules"]

    def action(code):
        for rule in rules:
            if code in rule.get("onExitCodes", {}).get("values", ()):
                assert rule["onExitCodes"]["containerName"] == pod(jobsets["semantic"])["containers"][0]["name"]
                return rule["action"]
        return None

    assert [action(code) for code in (2, DIVERGED)] == ["FailJob", "FailJob"]
    assert action(SAVED) == "Ignore"
    assert [action(code) for code in (FAULT, HUNG, 137)] == [None, None, None]
    assert rules[-1] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    # What is left ends the Job, and the JobSet then starts all pods of the stage again, so many times.
    assert job["backoffLimit"] == 0
    assert pod(jobsets["semantic"])["restartPolicy"] == "Never"
    assert spec["failurePolicy"]["maxRestarts"] == 4
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_ranks_of_several_nodes_meet_at_the_first_pod_and_those_of_one_at_home():
    _, jobsets = made(jobs(), gpus_per_node=4)
    job = jobsets["fine"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 2, 2)
    name = jobsets["fine"]["metadata"]["name"]
    assert environment(jobsets["fine"])["MASTER_ADDR"] == f"{name}-node-0-0.{name}"
    assert environment(jobsets["bundle"])["MASTER_ADDR"] == "127.0.0.1"
    assert jobsets["fine"]["spec"]["network"]["publishNotReadyAddresses"]
    resources = pod(jobsets["fine"])["containers"][0]["resources"]
    assert resources["limits"] == {"memory": "256Gi", "nvidia.com/gpu": "4"}
    assert resources["requests"]["cpu"] == "32"


def environment(jobset):
    return {entry["name"]: entry["value"] for entry in pod(jobset)["containers"][0]["env"]}


def test_nothing_of_a_manifest_is_replaced_by_the_cluster(tmp_path):
    """`$(NAME)` in arguments and variables is by Kubernetes, `{{name}}` by Argo."""
    job = Job(Path("/shared/$(HOME)"), load_recipe("quickstart"), stage_named("corpus"), share(1, 1))
    _, jobsets = made([job], env={"GREETING": "$(HOME)"})
    assert "/shared/$$(HOME)" in pod(jobsets["corpus"])["containers"][0]["args"]
    assert environment(jobsets["corpus"])["GREETING"] == "$$(HOME)"
    with pytest.raises(UserError, match=re.escape("may not hold {{")):
        made([job], env={"GREETING": "{{workflow.name}}"})


@pytest.mark.parametrize(
    "text", ["yes", "No", "1e3", "0x10", "1:30", "2026-11-22", "~", "", "null", "a: b", "é", "a\nb"]
)
def test_text_stays_text_for_every_reader_of_yaml(text):
    written = dump({"key": text})
    assert yaml.safe_load(written) == {"key": text}
    assert written.startswith(('key: "', "key: |"))


def test_secrets_are_named_and_their_values_cannot_be_given():
    _, jobsets = made(jobs(), secrets=["hub-token"])
    assert pod(jobsets["codec"])["containers"][0]["envFrom"] == [{"secretRef": {"name": "hub-token"}}]
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "wandb_api_key", "PASSWORD"):
        with pytest.raises(ValidationError, match="must come from a Secret") as caught:
            KubernetesConfig(env={name: "sesame"})
        assert "sesame" not in caught.value.errors()[0]["msg"]
    assert KubernetesConfig(env={"TOKENIZERS_PARALLELISM": "false"}).env


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"image": "registry.example/stretto"}, "must name an image with its tag"),
        ({"image": "registry.example:5000/stretto:latest"}, "must name an image with its tag"),
        ({"volumes": {"shared": "runs"}}, "must be an absolute path"),
        ({"volumes": {"shared": "/"}}, "must be an absolute path"),
        ({"namespace": "My_Team"}, "must be the name of an object"),
        ({"memory": "64GB"}, "must be an amount of memory such as 64Gi"),
        ({"node_selector": {"a b": "c"}}, "must be a key"),
        ({"tolerations": [{"key": "gpu", "operator": "Equal"}]}, "needs a key and a value"),
    ],
)
def test_wrong_keys_are_named(keys, words):
    with pytest.raises(ValidationError, match=words):
        config(**keys)


def test_an_image_by_its_digest_is_taken():
    assert config(image=f"registry.example:5000/stretto@sha256:{'0' * 64}").image


def test_what_is_missing_from_the_recipe_is_said_at_once():
    given = jobs(Path("/home/me/run"))
    with pytest.raises(UserError) as caught:
        Kubernetes(given[0].run, config(image=None)).dry_run(given)
    first, second = str(caught.value).splitlines()
    assert first.startswith("kubernetes.image is not set")
    assert second.startswith("no volume of kubernetes.volumes holds /home/me/run")
