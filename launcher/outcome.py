"""Before and after a stage's job: what is in its way, whether it has made its artifact, and why it has not."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

from data.processes import disk_full
from launcher.display import read_progress
from launcher.graph import STAGE_FILE, Origin, problems
from launcher.run_folder import RunFolder
from launcher.stage import Stage
from model import artifact
from trainer.exit_codes import DIVERGED, HUNG

FULL_BYTES = 1_000_000
"""A disk with less free is full, whatever the library that failed on it says."""
DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded")
EXCEPTION = re.compile(r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?:: .*)?)$")
BUSY_PORT = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)


def make_way(folder: RunFolder, stage: Stage, origin: Origin, outdated: bool) -> Path | None:
    """Readies `folder` for `stage` to be made: an outdated artifact is moved aside, and where it went is returned; a
    trained stage's checkpoints stay where they fit what is asked for.

    Raises UserError where another job works in it.
    """
    previous = folder.set_aside(stage.name) if outdated else None
    if previous is not None:
        folder.record(stage.name, seconds=0, restarts=0)
    if stage.trained:
        path = folder.path / stage.name
        path.mkdir(exist_ok=True)
        artifact.write_json(path / STAGE_FILE, {"fingerprint": origin.fingerprint})
    return previous


def not_made(run: Path, stage: Stage, origin: Origin) -> str | None:
    """What is wrong with what a job that ended well should have left; None where all is there."""
    found, wrong = problems(run / stage.name, stage)
    if wrong or found != origin.fingerprint:
        return f"it ended without its artifact: {(wrong or ['another fingerprint'])[0]}"
    return None


def why(stage: Stage, run: Path, output: str, code: int) -> tuple[str, int]:
    """In words why a job failed, from what it printed and its exit code, and 2 where the user can put it right, else
    1."""
    if DISK_FULL.search(output) or shutil.disk_usage(run).free < FULL_BYTES:
        return disk_full(run), 2
    message = user_message(output) if code in (2, DIVERGED, HUNG) else None
    if message is not None:
        return message, 1 if code == HUNG else 2
    return gist(output, code, first=stage.ranked), 1


def how_far(run: Path, stage: Stage) -> int | None:
    """What tells an attempt that got on from one that did not: the step of a training's newest checkpoint, or what is
    done of a stage that is resumed; None for others, which start from nothing each time."""
    if stage.trained:
        return checkpoint_step(run / stage.name)
    if not stage.resumed or not artifact.unfinished(run / stage.name).exists():
        return None
    row = read_progress(run / "progress" / f"{stage.name}.json")
    return row["done"] if row else None


def got_on(before: int | None, now: int | None) -> bool:
    """Whether an attempt got further than it began, by `how_far` then and now."""
    return now is not None and now > (before or 0)


def checkpoint_step(folder: Path) -> int | None:
    """The step of the newest checkpoint of the stage in `folder`."""
    steps = [int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*")]
    return max(steps, default=None)


def again_from(folder: Path) -> str:
    """What the same command does with a stage that failed in `folder`."""
    step = checkpoint_step(folder)
    return "starts it again" if step is None else f"goes on from step {step}"


def user_message(output: str) -> str | None:
    """What a process said was wrong, when it ended with code 2, HUNG or DIVERGED.

    It is the first "error: …" and its indented further lines.
    """
    lines = output.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("error: "):
            further = []
            for other in lines[number + 1 :]:
                if not other.startswith(" " * 7):
                    break
                further.append(other.strip())
            return "\n".join([line.removeprefix("error: "), *further])
    return None


def gist(output: str, code: int, first: bool) -> str:
    """One line on why a process failed: an exception, or the signal that killed it, or its last words.

    Of several ranks' exceptions the first is the cause, of one process's the last.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    raised = [match[1] for line in lines if (match := EXCEPTION.match(line))]
    if raised:
        return raised[0 if first else -1]
    killed = next((number for number in (-code, code - 128, 256 - code) if 0 < number < signal.NSIG), None)
    if killed == signal.SIGKILL:
        return "it was killed, most often because the machine ran out of memory"
    if killed is not None:
        return f"it was ended by signal {killed}"
    return f"exit code {code}" + (f": {lines[-1]}" if lines else "")
