"""What a job says of its attempts where a cluster starts it as often as it takes: in RUN/jobs/STAGE.json what
`stretto status` shows, and for each that has ended a line of RUN/history.jsonl."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.display import read_progress
from launcher.job_record import read_job, record_job
from launcher.run_folder import read_state, remember


@dataclass
class Attempts:
    """Of the job `job` of a stage. What earlier jobs of the stage have said of their seconds and restarts is added up
    with what this one says."""

    run: Path
    stage: str
    job: str

    def __post_init__(self) -> None:
        said = read_job(self.run, self.stage) or {}
        self.before: dict[str, Any] = said if said.get("job") == self.job else {}
        """What was said of this job when its attempt began."""

    def begin(self, hosts: str, number: int | None = None) -> None:
        """Says that an attempt begins, on `hosts`: the `number`th by the cluster's count, which knows also of those
        that were lost before they could say anything; the next where it does not count."""
        before = self.before
        earlier = before or read_state(self.run)["stages"].get(self.stage, {})
        self._number = number or before.get("attempt", 0) + 1
        self._hosts, self._began = hosts, time.time()
        self._seconds = (earlier.get("seconds") or 0) + self.end_unsaid()
        restarts = (earlier.get("restarts") or 0) + self._number - before.get("attempt", 1)
        known = {"attempt": self._number, "restarts": restarts, "seconds": round(self._seconds, 3), "hosts": hosts}
        self.say(state="running", error=None, code=None, started=self._began, finished=None, **known)

    def end(self, code: int, lost: Sequence[str] = ()) -> None:
        """Says with what code the attempt has ended, and which hosts were lost."""
        now = time.time()
        seconds = now - self._began
        self.say(code=code, finished=now, seconds=round(self._seconds + seconds, 3))
        remember(self.run, self.stage, self._number, self._hosts, seconds, code, lost)

    def say(self, **entry: Any) -> None:
        record_job(self.run, self.stage, self.job, **entry)

    def end_unsaid(self) -> float:
        """Remembers the attempt that was begun last if it has ended without a word, as with its node, and returns its
        seconds: until it last said how far it was."""
        before = self.before
        if "attempt" not in before or before["finished"] is not None:
            return 0.0
        row = read_progress(self.run / "progress" / f"{self.stage}.json")
        seconds = max(0.0, row["time"] - before["started"]) if row else 0.0
        remember(self.run, self.stage, before["attempt"], before["hosts"], seconds, None)
        return seconds
