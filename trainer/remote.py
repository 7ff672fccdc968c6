"""Copies of a stage's checkpoints in a bucket: `s3://bucket/prefix/STAGE/step-NNNNNNNN/`.

The manifest goes up last and is deleted first, so that a copy that is half there is never taken for one.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from data import cloud
from model import artifact
from model.errors import UserError
from trainer.checkpoint_folder import KIND, figure, genuine, read, step_name, steps_in, superseded
from trainer.config import TrainConfig

log = logging.getLogger(__name__)


class Remote:
    """The copies of one stage's checkpoints.

    Every method raises UserError where the bucket or the credentials are wrong, `cloud.Unreachable` where the service
    does not do what it is asked for, and OSError for a file that may not be read or written. Where manifests are read,
    NewerFormat for one of a later Stretto.
    """

    def __init__(self, address: str, stage: str) -> None:
        self.address = f"{address}/{stage}"

    def url(self, step: int, name: str = "") -> str:
        return f"{self.address}/{step_name(step)}/{name}"

    def listing(self) -> dict[int, dict[str, int]]:
        """For each step that has files: their names and sizes."""
        found: dict[int, dict[str, int]] = defaultdict(dict)
        pattern = re.compile(re.escape(self.address) + r"/step-(\d{8})/([^/]+)")
        for url, size, _ in cloud.objects(f"{self.address}/"):
            if match := pattern.fullmatch(url):
                found[int(match[1])][match[2]] = size
        return found

    def finished(self) -> list[int]:
        """The steps that have a manifest, whatever has become of their files since."""
        return [step for step, sizes in self.listing().items() if artifact.MANIFEST in sizes]

    def whole(self) -> dict[int, dict[str, Any]]:
        """The manifests of the steps whose files are all there, with the right sizes."""
        found = {}
        for step, sizes in self.listing().items():
            manifest = self._manifest(step) if artifact.MANIFEST in sizes else None
            if manifest and all(sizes.get(name) == file["bytes"] for name, file in manifest["files"].items()):
                found[step] = manifest
        return found

    def _manifest(self, step: int) -> dict[str, Any] | None:
        """What the manifest of a step says; None where it is damaged."""
        content = cloud.read(self.url(step, artifact.MANIFEST))
        try:
            manifest = artifact.parse(content, self.url(step).rstrip("/"), KIND)
        except artifact.NewerFormat:
            raise
        except UserError:
            return None
        return manifest if genuine(manifest) else None

    def upload(self, step: int, folder: Path) -> None:
        """Copies a finished checkpoint; what stood there is no checkpoint from the first moment on."""
        names = sorted(path.name for path in folder.iterdir() if path.name != artifact.MANIFEST)
        cloud.remove(self.url(step, artifact.MANIFEST))
        for name in [*names, artifact.MANIFEST]:
            # More threads would take time from the training and outlive a wait that was given up.
            cloud.store(folder / name, self.url(step, name), threads=False)

    def download(self, step: int, folder: Path) -> None:
        """Copies all files of a step to `folder`, and syncs them."""
        for name in self.listing()[step]:
            with (folder / name).open("wb") as file:
                cloud.fetch(self.url(step, name), file)
            artifact.sync(folder / name)

    def remove(self, step: int) -> None:
        for name in [artifact.MANIFEST, *self.listing()[step]]:
            cloud.remove(self.url(step, name))


class Uploads:
    """Brings the copies up to date with the checkpoints in `folder`, in the background."""

    def __init__(self, remote: Remote, folder: Path, config: TrainConfig) -> None:
        self.remote = remote
        self.folder = folder
        self.config = config
        self.uploading: int | None = None
        """The step whose files are being read; they must stay meanwhile."""
        self._thread = threading.Thread()

    def start(self) -> None:
        """Uploads what is missing, the newest first, and removes what is superseded. One that is under way already
        finds by itself what has come since. What fails is logged, and tried again the next time."""
        if not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="upload of checkpoints", daemon=True)
            self._thread.start()

    def finish(self, timeout: float) -> None:
        """Waits until all is there, at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for _ in range(2):  # one that is under way may just have looked for the last time
            self.start()
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            log.warning("the upload of checkpoints to %s is given up after %g s", self.remote.address, timeout)

    def _run(self) -> None:
        try:
            while (step := self._missing()) is not None:
                self.uploading = step
                self.remote.upload(step, self.folder / step_name(step))
            self._prune()
        except (OSError, UserError) as error:
            log.warning("uploading checkpoints failed, and is tried again after the next one: %s", error)
        finally:
            self.uploading = None

    def _missing(self) -> int | None:
        """The newest step whose checkpoint is here and not there."""
        there = self.remote.whole()
        for step in steps_in(self.folder):
            if there.get(step) != read(self.folder / step_name(step)).manifest:
                return step
        return None

    def _prune(self) -> None:
        """Copies go as checkpoints do, and with them what an upload that was broken off has left."""
        whole = self.remote.whole()
        figures = {step: figure(manifest["info"], self.config) for step, manifest in whole.items()}
        broken = [step for step in self.remote.listing() if step not in whole]
        for step in [*broken, *superseded(figures, self.config)]:
            self.remote.remove(step)
