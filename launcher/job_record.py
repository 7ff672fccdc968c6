"""What the supervisor of a stage's job says of it: RUN/jobs/STAGE.json, whose one writer it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model import artifact

JOBS = "jobs"


def read_job(run: Path, stage: str) -> dict[str, Any] | None:
    """What the supervisor of a stage's job has said of it last; None where there is nothing."""
    try:
        return json.loads((run / JOBS / f"{stage}.json").read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def record_job(run: Path, stage: str, job: str, **entry: Any) -> None:
    """For the supervisor of a stage's job, which alone writes this: changes what is said of the stage.

    `job` is the handle by which the launcher knows it; what was said of another job is forgotten.
    """
    said = read_job(run, stage) or {}
    (run / JOBS).mkdir(exist_ok=True)
    artifact.write_json(run / JOBS / f"{stage}.json", {**(said if said.get("job") == job else {}), "job": job, **entry})
