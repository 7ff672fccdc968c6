"""What Slurm is asked for, and what of it is found to be wrong before anything is submitted."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import ROOT
from rich.console import Console
from slurm_cluster import missing, slurm_cluster

from launcher import batch
from launcher.backends import Job
from launcher.backends.slurm import Slurm
from launcher.backends.slurm_check import problems
from launcher.backends.slurm_commands import tasks_per_node
from launcher.batch import jobs_for
from launcher.graph import stage_named
from launcher.job_record import record_job
from launcher.recipe import dump_recipe, load_recipe, read_run_recipe
from launcher.run_folder import read_state
from launcher.slurm_config import minutes
from launcher.stages import STAGES
from model.errors import UserError

GOLDEN = ROOT / "tests" / "golden"
GPUS = [
    "stage_defaults.train.global_batch=64", "stages.coarse.train.ranks=16", "slurm.partition=gpu",
    "slurm.account=music", "slurm.qos=long", "slurm.constraint=h100&ib", "slurm.time=24h", "slurm.nodes=2",
    "slurm.gpus_per_node=8", "slurm.cpus_per_task=12", "slurm.mem=900G", "slurm.options=[--exclusive]",
    "slurm.setup=[module load cuda/12.4, export NCCL_DEBUG=WARN]",
]  # fmt: skip


def script(stage, run, *overrides, after=()):
    recipe = load_recipe("quickstart", overrides)
    backend, stage = Slurm(Path(run), recipe.slurm), stage_named(stage)
    share = backend.shares(recipe, [stage])[stage.name]
    text = backend.script(Job(Path(run), recipe, stage, share, after=after))
    return text.replace(sys.executable, "PYTHON")


def test_the_script_of_a_job():
    coarse = script("coarse", "/shared/my runs/100%", *GPUS, after=("41", "42"))
    assert coarse == (GOLDEN / "slurm-coarse.sbatch").read_text()
    assert script("corpus", "/shared/run") == (GOLDEN / "slurm-corpus.sbatch").read_text()


def test_a_stage_may_ask_for_something_else():
    own = "{partition: cpu, account: null, constraint: null, gpus_per_node: 0, tasks_per_node: 32, time: 4h, setup: []}"
    keys = [*GPUS, f"slurm.stages.tokens={own}", "slurm.stages.bundle.time=30m"]
    assert script("tokens", "/shared/run", *keys) == (GOLDEN / "slurm-tokens.sbatch").read_text()
    assert script("coarse", "/shared/run", *keys) == script("coarse", "/shared/run", *GPUS)
    assert "--time=30\n" in script("bundle", "/shared/run", *keys)


def test_what_a_stage_asks_for_is_kept_in_the_run_folder(tmp_path):
    recipe = load_recipe("quickstart", [*GPUS, "slurm.stages.tokens={partition: cpu, gpus_per_node: 0}"])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert read_run_recipe(tmp_path) == recipe
    assert read_run_recipe(tmp_path).slurm.of("tokens") == recipe.slurm.of("tokens")
    assert recipe.slurm.of("tokens").account == "music"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("slurm.stages.tokns.time=4h", "slurm.stages: there is no stage 'tokns'. Did you mean tokens?"),
        ("slurm.stages.tokens.partitoin=cpu", "slurm.stages.tokens.partitoin is not .* Did you mean partition?"),
        ("slurm.stages.tokens.stages={}", "slurm.stages.tokens.stages is not a key"),
        ("slurm.stages.tokens.time=3600", "slurm.stages.tokens.time.*24h"),
    ],
)
def test_a_stage_or_key_that_there_is_not_is_named(override, words):
    with pytest.raises(UserError, match=words):
        load_recipe("quickstart", [override])


def test_shares_of_all_stages_that_there_is_no_room_for_are_named_at_once():
    keys = ["placement.coarse=4", "placement.tokens=8", "slurm.stages.tokens.tasks_per_node=3"]
    recipe = load_recipe("quickstart", keys)
    with pytest.raises(UserError, match=r"(?s)placement\.coarse asks for 4 .*placement\.tokens asks for 8 .*has 3"):
        Slurm(Path("/run"), recipe.slurm).shares(recipe, STAGES)


def test_a_dry_run_prints_the_jobs_and_submits_none(tmp_path):
    recipe, printed = load_recipe("quickstart"), io.StringIO()
    run = tmp_path / "run"
    assert batch.run(recipe, run, Slurm(run, recipe.slurm), dry_run=True, console=Console(file=printed, width=80)) == 0
    jobs = re.findall(r"(?m)^#SBATCH --job-name=quickstart-(\w+)$", printed.getvalue())
    assert jobs == [stage.name for stage in STAGES]
    assert "#SBATCH --dependency=afterok:quantizers:tokens\n" in printed.getvalue()
    assert not run.exists()


def test_ranks_are_spread_over_nodes():
    quantizers = script("quantizers", "/run", *GPUS)
    assert "--ntasks=16\n" in quantizers  # all that there is room for
    assert "--nodes=2\n#SBATCH --ntasks=2\n" in script("semantic", "/run", "slurm.nodes=2")
    embedding = script("embedding", "/run", *GPUS)
    assert "--gpus-per-node=1\n" in embedding
    with pytest.raises(UserError, match="16"):
        script("coarse", "/run", *GPUS, "slurm.nodes=1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90m", 90), ("2d", 2880), ("1:30", 2), ("24:00:00", 1440), ("2-12", 3600), ("1-00:30", 1470)],
)
def test_time_limits(text, expected):
    assert minutes(text) == expected


@pytest.mark.parametrize("value", ["3600", "1:00:00", "soon"])  # YAML reads the second as the first
def test_a_time_limit_that_could_be_misread_is_refused(value):
    with pytest.raises(UserError, match=r"slurm\.time.*24h"):
        load_recipe("quickstart", [f"slurm.time={value}"])


def test_an_option_stays_on_its_line():
    with pytest.raises(UserError, match=r"slurm\.account"):
        load_recipe("quickstart", ['slurm.account="a\\nrm -r /"'])


def test_tasks_of_nodes():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def refused(cluster, tmp_path, *overrides):
    command = [sys.executable, "-m", "launcher", "run", "quickstart", "-o", tmp_path / "run", "--slurm", *overrides]
    done = cluster.run(*command, code=2, env={"PYTHONPATH": str(ROOT)})
    assert "Traceback" not in done.stderr
    assert cluster.run("squeue", "--noheader").stdout == ""
    return done.stderr


WRONG = {
    "slurm.partition=man": ["no partition 'man'", "main"],
    "slurm.partition=single": ["slurm.account is not set: also where it is your default", "lab"],
    "slurm.time=2h": ["slurm.time", "1:00:00"],
    "slurm.nodes=3 slurm.tasks_per_node=1 placement.coarse=3 stage_defaults.train.global_batch=48": ["3 nodes"],
    "slurm.gpus_per_node=4 placement.coarse=4": ["4 GPUs", "have 2"],
    "slurm.cpus_per_task=3": ["6 CPUs", "have 4"],
    "slurm.mem=1T": ["1048576 MB of memory", "have 8000"],
    "slurm.options=[--licenses=matlab]": ["license"],
    "slurm.stages.tokens.partition=man": ["slurm.stages.tokens.partition", "no partition 'man'"],
    "slurm.time=30m slurm.stages.tokens={time: 2h, mem: 1T}": ["slurm.stages.tokens.time", "slurm.stages.tokens.mem"],
}


@pytest.mark.parametrize("overrides", WRONG)
def test_what_the_cluster_does_not_have_is_named(cluster, tmp_path, overrides):
    said = refused(cluster, tmp_path, *re.split(" (?=slurm|placement|stage)", overrides))
    for part in WRONG[overrides]:
        assert part.lower() in said.lower()


def test_all_that_is_wrong_is_named_at_once(cluster, tmp_path):
    said = refused(cluster, tmp_path, "slurm.partition=single", "slurm.time=2h", "slurm.gpus_per_node=3")
    assert len([line for line in said.splitlines() if "slurm." in line]) == 3


SBATCH = """#!/bin/sh
case "$*" in *--test-only*) exec {real} "$@";; esac
answer=$({real} "$@") || exit
echo >> "$0.calls"
test $(wc -l < "$0.calls") -lt 4 || kill -KILL $PPID
echo "$answer"
"""


def killed_after_submitting(cluster, run):
    """`stretto run`, which is killed when its fourth job has a number and before that is noted."""
    sbatch = run.parent / "bin" / "sbatch"
    sbatch.parent.mkdir(parents=True)
    sbatch.write_text(SBATCH.format(real=shutil.which("sbatch")))
    sbatch.chmod(0o755)
    submit(cluster, run, code=-9, env={"PATH": f"{sbatch.parent}:{os.environ['PATH']}"})


def submit(cluster, run, code=0, env=None):
    """What `stretto run` prints; its jobs are held, so that none begins."""
    command = [sys.executable, "-m", "launcher", "run", "quickstart", "-o", run, "--slurm", "slurm.options=[--hold]"]
    return cluster.run(*command, code=code, env={"PYTHONPATH": str(ROOT), **(env or {})}).stdout


def queue(cluster):
    """{number: (name, numbers it waits for)} of all jobs."""
    listed = cluster.run("squeue", "--noheader", "--sort=i", "--format=%i %j %E").stdout
    jobs = [line.split(maxsplit=2) for line in listed.splitlines()]
    return {number: (name, re.findall(r"afterok:(\d+)", waits)) for number, name, waits in jobs}


@pytest.fixture
def lost(cluster, tmp_path):
    """The folder of a run of which one job was submitted without that being noted, and the numbers of its jobs; there
    is another such run of the same recipe."""
    run = tmp_path / "one" / "a run|of %j 100% it's"
    killed_after_submitting(cluster, tmp_path / "other" / "run")
    others = queue(cluster)
    killed_after_submitting(cluster, run)
    own = [number for number in queue(cluster) if number not in others]
    assert [queue(cluster)[number][0] for number in own] == [f"quickstart-{stage.name}" for stage in STAGES[:4]]
    assert read_state(run)["stages"]["quantizers"].get("job") is None
    yield run, own
    cluster.run("scancel", "--user=root")


def test_a_job_whose_number_was_lost_is_taken_over(cluster, lost):
    run, own = lost
    printed = submit(cluster, run)
    assert f"{own[3]}, which lives" in printed
    jobs = queue(cluster)
    mine = {entry["job"]: stage for stage, entry in read_state(run)["stages"].items()}
    assert list(mine)[:4] == own
    assert len(mine) == len(STAGES)
    assert len(jobs) == len(STAGES) + 4  # those of the other run
    waits = {mine[number]: [mine[need] for need in jobs[number][1]] for number in mine}
    assert waits == {stage.name: list(stage.needs) for stage in STAGES}


def test_a_job_whose_number_was_lost_is_in_the_way_elsewhere_and_is_stopped(cluster, lost):
    (run, own), env = lost, {"PYTHONPATH": str(ROOT)}
    local = cluster.run(sys.executable, "-m", "launcher", "run", "quickstart", "-o", run, code=2, env=env)
    assert f"quantizers still runs or waits, as job {own[3]} of slurm" in local.stderr
    stopped = cluster.run(sys.executable, "-m", "launcher", "stop", run, env=env)
    assert f"quantizers (job {own[3]})" in stopped.stdout
    assert len(queue(cluster)) == 4
    assert not set(own) & set(queue(cluster))


def test_jobs_that_have_ended_or_are_another_runs_are_not_taken_over(tmp_path, monkeypatch):
    run, linked = tmp_path / "run", tmp_path / "linked"
    (run / "jobs").mkdir(parents=True)
    (run / "jobs" / "fine.sbatch").touch()
    linked.symlink_to(run)
    record_job(run, "coarse", "7", state="interrupted")
    listed = [
        f"7 COMPLETING {run}/jobs/coarse.sbatch",
        f"8 CANCELLED {run}/jobs/semantic.sbatch",
        f"9 RUNNING {run}/jobs/fine.sbatch",
        f"10 PENDING {run}/jobs/fine.sbatch",
        f"11 RUNNING {tmp_path}/other/jobs/tokens.sbatch",
        f"12_[1-3] PENDING {run}/jobs/corpus.sbatch",
        f"13 PENDING {linked}/jobs/bundle.sbatch",
        "14 RUNNING (null)",
    ]
    (tmp_path / "squeue").write_text("#!/bin/sh\ncat << END\n" + "\n".join(listed) + "\nEND\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert Slurm(run, load_recipe("quickstart").slurm).listed() == {"fine": "9", "bundle": "13"}


@pytest.mark.parametrize("limit", ["UNLIMITED", "1-00:00:00"])
def test_ranks_are_told_to_save_within_the_time_that_a_job_has(tmp_path, monkeypatch, limit):
    partition = f"PartitionName=main Default=YES State=UP MaxTime={limit}"
    for name, said in {"scontrol": partition, "sinfo": "4|8|8000|(null)"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    recipe = load_recipe("quickstart", ["slurm.time=5m", "slurm.signal_seconds=300"])
    said = problems(recipe.slurm, Slurm(tmp_path, recipe.slurm).shares(recipe, STAGES))
    assert said == ["slurm.signal_seconds 300 is not within slurm.time, 5m: lower it."]


def test_without_slurm_it_says_where_to_go(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    recipe = load_recipe("quickstart")
    backend = Slurm(tmp_path, recipe.slurm)
    with pytest.raises(UserError, match="login node"):
        backend.check(jobs_for(recipe, tmp_path, [stage_named("corpus")], backend, {}))


def test_a_cluster_that_does_not_answer_is_not_a_job_that_has_ended(tmp_path, cluster):
    ask = "from launcher.backends.slurm import Slurm; print(Slurm(None, None).poll('7'))"
    broken = tmp_path / "slurm.conf"
    text = (cluster.folder / "slurm.conf").read_text()
    broken.write_text(text.replace("SlurmctldHost=", "SlurmctldPort=6999\nMessageTimeout=2\nSlurmctldHost="))
    env = {"PYTHONPATH": str(ROOT), "SLURM_CONF": str(broken)}
    assert "UserError" in cluster.run(sys.executable, "-c", ask, env=env, code=1).stderr


def test_a_cluster_ends_with_the_test_that_started_it(tmp_path):
    if reason := missing():
        pytest.skip(reason)
    program = (
        "import os, signal; from pathlib import Path; from slurm_cluster import slurm_cluster\n"
        f"with slurm_cluster(Path({str(tmp_path)!r}) / 'slurm') as cluster:\n"
        "    print(cluster.inside, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=env)
    first = int(killed.stdout)
    for _ in range(50):
        if not psutil.pid_exists(first):
            break
        time.sleep(0.1)
    left = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in left if str(tmp_path) in " ".join(words)]
