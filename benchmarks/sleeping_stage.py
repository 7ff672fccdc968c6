"""Stages whose work is to sleep, under the real launcher, for benchmarks/launching.py: `sleeping_stage.py RUN HOSTFILE
SECONDS NAME...` runs those of that name side by side, or all three in a row where the name is "chain".

With `--run RUN --stage STAGE` it is what the launcher starts: one process of such a stage.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console


def work(run: Path, stage: str) -> None:
    """Notes when it began and ended, and leaves the artifact of a trained stage."""
    began = time.time()
    time.sleep(float(os.environ["STRETTO_SLEEP"]))
    if os.environ.get("RANK", "0") == "0":
        from launcher.graph import STAGE_FILE
        from model import artifact

        (run / stage / "weights").write_text(stage)
        fingerprint = json.loads((run / stage / STAGE_FILE).read_text())["fingerprint"]
        artifact.write_manifest(run / stage, "stage", fingerprint, names=["weights"])
        artifact.write_json(run / f"{stage}.times", {"began": began, "ended": time.time()})


def launch(run: Path, hostfile: Path, seconds: float, names: list[str]) -> None:
    """Runs stages of these names."""
    from launcher import processes, runner, stages
    from launcher.recipe import load_recipe
    from launcher.stage import Stage, picked

    os.environ["STRETTO_SLEEP"] = str(seconds)
    together = processes.together

    def sleeping(job: processes.Job, options: list[str]) -> list[str]:
        command = together(job, options)
        place = command.index("--module")
        return [*command[:place], __file__, "--stage", *command[place + 2 :]]

    processes.together = sleeping
    if names[0] == "chain":
        processes.together = lambda job, options: [
            *(sys.executable, __file__, "--stage", "--run", str(job.run), "--stage", job.stage.name)
        ]
    made = ("semantic", "coarse", "fine")
    needs = dict(zip(made, ((), made[:1], made[1:2]), strict=True)) if names[0] == "chain" else dict.fromkeys(made, ())
    wanted = made if names[0] == "chain" else names
    stages.STAGES = tuple(Stage(name, needs[name], picked("seed"), 1, None) for name in made if name in wanted)
    runner._report = lambda *_: None
    recipe = load_recipe("quickstart", ["placement.semantic=2", "placement.coarse=1", "placement.fine=1"])
    code = runner.run(recipe, run, console=Console(quiet=True), hostfile=hostfile)
    if code:
        sys.exit(f"the stages ended with {code}")


if __name__ == "__main__":
    if "--stage" in sys.argv:
        words = sys.argv[sys.argv.index("--run") :]
        work(Path(words[1]), words[3])
    else:
        launch(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
