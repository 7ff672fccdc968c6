"""A run of four quick stages under the real runner: `fake_run.py RUN KEY=VALUE…`. Not a test.

a ← nothing, b ← a, c (trained) ← a, d ← b and c. A file RUN-b beside the run folder tells stage b how to behave.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from data.processes import plain_errors
from launcher import processes, room, runner, stages
from launcher.graph import STAGE_FILE, Origin
from launcher.placement import Part
from launcher.recipe import load_recipe
from launcher.run_folder import read_state
from launcher.stage import Stage, picked
from model import artifact
from trainer.exit_codes import DIVERGED, HUNG, SAVED

CODES = {"diverged": DIVERGED, "hung": HUNG, "was told to stop": SAVED}


def body(_) -> dict:
    raise AssertionError("the fake worker stands for it")


def made_alone(run: Path, name: str) -> None:
    """What a worker does for the stages that are not trained."""
    origin = Origin(**read_state(run)["stages"][name]["made_from"])
    with artifact.create(run / name, name, origin.fingerprint, origin.inputs) as (folder, _):
        (folder / "file").write_text(name)
        behave(run, name)


def trained(run: Path, name: str) -> None:
    """What a rank does: it keeps a checkpoint, and goes on from one."""
    checkpoint = run / name / "checkpoints" / "step-00000001"
    print("resumed" if checkpoint.exists() else "fresh", flush=True)
    checkpoint.mkdir(parents=True, exist_ok=True)
    behave(run, name)
    (run / name / "weights").write_text(name)
    fingerprint = json.loads((run / name / STAGE_FILE).read_text())["fingerprint"]
    artifact.write_manifest(run / name, "stage", fingerprint, names=["weights"])


def behave(run: Path, name: str) -> None:
    told = run.with_name(f"{run.name}-{name}")
    behaviour = told.read_text() if told.exists() else ""
    if behaviour.startswith("hung, "):
        told.write_text(behaviour.removeprefix("hung, "))
        behaviour = "hung"
    if behaviour.endswith(" once"):
        first = (run / "logs" / f"{name}.log").read_text().count("localhost: ") == 1
        behaviour = behaviour.removesuffix(" once") if first else ""
    if behaviour == "sleep":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])  # knows nothing of its parents
        run.with_name("child").write_text(str(child.pid))
        time.sleep(120)
    elif behaviour == "wait":
        run.with_name("child").write_text(str(os.getpid()))
        while told.exists():
            time.sleep(0.05)
    elif behaviour == "user error":
        print("noise\nerror: the value is wrong\n       and this is how to put it right\nmore noise", file=sys.stderr)
        sys.exit(2)
    elif behaviour == "fault":
        raise ValueError("something broke")
    elif behaviour == "disk full":
        raise OSError(28, "No space left on device")
    elif behaviour in CODES:
        print(f"error: it {behaviour}\n       after step 7", file=sys.stderr)
        sys.exit(CODES[behaviour])
    elif behaviour == "killed":
        subprocess.run(["kill", "-9", str(os.getpid())], check=True)
    elif behaviour == "busy port":
        raise RuntimeError("the port is taken: EADDRINUSE")


def main() -> None:
    if sys.argv[1] == "stage":
        run, name = Path(sys.argv[2]), sys.argv[3]
        (trained if name == "c" else made_alone)(run, name)
        return
    stages.STAGES = (
        Stage("a", (), picked("data.clips"), 1, body),
        Stage("b", ("a",), picked("seed"), 1, body),
        Stage("c", ("a",), picked("evaluation"), 1, None),
        Stage("d", ("b", "c"), picked("sampling"), 1, body),
    )
    processes.alone = processes.together = lambda job, options=(): [
        *(sys.executable, __file__, "stage", str(job.run), job.stage.name)
    ]
    room.local_share = lambda *_: (Part("localhost", (0,), 1),)
    runner._report = lambda *_: print("reported")
    only = [argument.removeprefix("--only=") for argument in sys.argv if argument.startswith("--only=")]
    overrides = [argument for argument in sys.argv[2:] if not argument.startswith("--only=")]
    with plain_errors():
        sys.exit(runner.run(load_recipe("quickstart", overrides), Path(sys.argv[1]), only))


if __name__ == "__main__":
    main()
