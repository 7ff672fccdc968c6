"""Audio and captions → token shards: every frozen encoder runs once over each clip, and the stages never see audio.

Any number of ranks share out the parts of the corpus. A part that is done stays done whatever becomes of the job, and
what is in it depends on the corpus alone: neither on how many ranks there are nor on which of them made it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from data.config import TokensConfig
from data.corpus import SKIPPED, TRAIN, VALIDATION, Clip, read_clips, write_jsonl
from data.parts import Claims, Part, batches, plan_parts
from data.progress import Progress
from data.ranks import Ranks
from data.shard_writer import Record, SplitWriter
from data.steps import load_steps
from data.tokeniser import Tokeniser
from data.waves import Reader, Waves, read_ahead
from model import artifact
from model.config import EncodersConfig
from model.encoders.check import check_encoders
from model.errors import UserError

log = logging.getLogger(__name__)

MOST_THREADS = 8
BATCHES_AHEAD = 2
"""Finished batches that may wait to be written."""
MOST_UNREAD = 0.5
"""Share of a part's clips that may have become unreadable since the corpus was made: with more, its disk is gone."""
POLL_SECONDS = 0.2
CLAIMS = "claims"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Unread:
    """A clip that could be read when the corpus was made, and no longer can."""

    id: str
    file: str
    reason: str


def tokenise(
    corpus: Path,
    codec: Path,
    embedding: Path,
    quantizers: Path,
    encoders: EncodersConfig,
    config: TokensConfig,
    folder: Path,
    progress: Progress,
    ranks: Ranks | None = None,
    workers: int = 0,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Writes the training and validation clips of `corpus` as token shards `folder`/{train,validation}.

    `codec`, `embedding` and `quantizers` are the artifacts with the fitted parts; `config.steps` come before the
    encoders. All `ranks` call it with the same `folder`, which may hold what an earlier attempt has done of the same;
    each has `workers` processes that decode. Clips of other splits are not written: they are for evaluation. A clip
    that can no longer be read is left out and listed in `folder`/skipped.jsonl.

    Returns what the manifest says (the token fields, lengths of the longest and of the shortest clip, length and hop of
    the embedding windows, records of each split) and the digests of the shards; both are empty but on rank 0, which
    returns last. A clip shorter than the others is cut to whole frames of all fields. Raises UserError when most clips
    of a part cannot be read.
    """
    ranks = ranks or Ranks()
    tokeniser = Tokeniser(codec, embedding, quantizers, encoders, load_steps(config.steps))
    if encoders.check and ranks.leads:
        check_encoders(tokeniser.codec, tokeniser.semantic, tokeniser.joint)
    longest = read_clips(corpus, TRAIN)[0].seconds
    rows = [
        tokeniser.aligned(clip, longest)
        for split in (TRAIN, VALIDATION)
        for clip in read_clips(corpus, split, short=True)
    ]
    for step in tokeniser.steps:
        rows = step.prepare(rows)
    clips = {split: [clip for clip in rows if clip.split == split] for split in (TRAIN, VALIDATION)}
    parts = plan_parts(clips, config.shard_seconds)
    writers = {
        split: SplitWriter(
            folder / split,
            folder / artifact.WORK / split,
            tokeniser.columns,
            compression=config.compression,
            remote=config.upload and f"{config.upload}/{split}",
        )
        for split in clips
    }
    job = _Job(corpus, tokeniser, writers, parts, Claims(folder / artifact.WORK / CLAIMS, ranks), config, progress)
    job.run(workers)
    if not ranks.leads:
        return {}, {}
    job.wait_for_others()
    return _finish(folder, writers, clips, job, encoders)


def _finish(
    folder: Path,
    writers: dict[str, SplitWriter],
    clips: dict[str, list[Clip]],
    job: _Job,
    encoders: EncodersConfig,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Brings the parts together once all are there."""
    digests: dict[str, dict[str, Any]] = {}
    counts, unread = {}, []
    for split, writer in writers.items():
        files, skipped = writer.close()
        digests |= {f"{split}/{name}": digest for name, digest in files.items()}
        unread += skipped
        counts[split] = len(clips[split]) - len(skipped)
    write_jsonl(folder / SKIPPED, unread)
    gone = {row["id"] for row in unread}
    kept = [clip for split in clips.values() for clip in split if clip.id not in gone]
    longest = max(clip.seconds for clip in kept)
    info = {
        "fields": {field.name: field.to_json() for field in job.tokeniser.fields},
        "clip_seconds": longest,
        "shortest_seconds": min(clip.seconds for clip in kept),
        "hop_seconds": encoders.joint.hop_seconds,
        "embedding_seconds": encoders.joint.window_seconds,
        "records": counts,
        "seconds": sum(clip.seconds for clip in kept),
        "skipped": len(unread),
        # Training clips of full length are what the words are learnt from.
        "captions": any(clip.captions for clip in kept if clip.split == TRAIN and clip.seconds == longest),
        "remote": job.config.upload,
        "steps": job.config.model_dump(mode="json")["steps"],
    }
    return info, digests


class _Job:
    """One rank's share of the work."""

    def __init__(
        self,
        corpus: Path,
        tokeniser: Tokeniser,
        writers: dict[str, SplitWriter],
        parts: list[Part],
        claims: Claims,
        config: TokensConfig,
        progress: Progress,
    ) -> None:
        self.corpus, self.tokeniser, self.writers = corpus, tokeniser, writers
        self.parts, self.claims, self.config, self.progress = parts, claims, config, progress
        self.threads = min(torch.get_num_threads(), MOST_THREADS)
        self.total = sum(len(part.clips) for part in parts)
        self.started = time.monotonic()
        self.before = self._committed()
        self._counted = 0.0

    def run(self, workers: int) -> None:
        """Makes every part that no other rank makes and that is not done."""
        done = self._done()
        todo = [part for part in self.parts if part.key not in done]
        everything: list[tuple[Clip, ...]] = []
        places: dict[tuple[str, int], range] = {}
        for part in todo:
            first = len(everything)
            everything += batches(part.clips, self.config.batch_seconds)
            places[part.key] = range(first, len(everything))
        mine: deque[Part] = deque()

        def order() -> Iterator[int]:
            for part in self.claims.taken(todo):
                mine.append(part)
                yield from places[part.key]

        waves = read_ahead(Reader(self.corpus, everything, self.tokeniser.kinds), order(), workers)
        gathered: list[tuple[Waves, list[Record]]] = []
        for batch, records in over_threads(lambda batch: (batch, self.tokeniser.records(batch)), waves, self.threads):
            gathered.append((batch, records))
            if batch.index == places[mine[0].key][-1]:
                self._write(mine.popleft(), gathered)
                gathered = []
            self._report(sum(len(one.clips) for one, _ in gathered))
        seconds = time.monotonic() - self.started
        if todo and seconds:
            share = self.tokeniser.encoding_seconds / (seconds * self.threads)
            log.info(
                "the encoders were at work for %.1f %% of %.1f s on %d threads", 100 * share, seconds, self.threads
            )

    def _write(self, part: Part, encoded: list[tuple[Waves, list[Record]]]) -> None:
        clips = [clip for batch, _ in encoded for clip in batch.clips]
        unread = [Unread(clip.id, clip.path, why) for batch, _ in encoded for clip, why in batch.unread]
        for one in unread:
            log.warning("left out: %s", one.reason)
        if len(unread) > MOST_UNREAD * len(part.clips):
            raise UserError(
                f"{len(unread)} of {len(part.clips)} clips in a row cannot be read any more, the first because: "
                f"{unread[0].reason}\nIs the disk or the bucket of data.audio still there? The same command goes on."
            )
        records = [record for _, rows in encoded for record in rows]
        rows = [{**clip.columns, "seconds": clip.seconds} for clip in clips]
        self.writers[part.split].write(part.number, records, rows, [asdict(one) for one in unread])

    def _done(self) -> set[tuple[str, int]]:
        """The parts that any rank has finished."""
        return {(split, number) for split, writer in self.writers.items() for number in writer.finished()}

    def _committed(self) -> int:
        """Clips in them."""
        done = self._done()
        return sum(len(part.clips) for part in self.parts if part.key in done)

    def _report(self, own: int = 0) -> None:
        now = time.monotonic()
        if now - self._counted < 0.5:
            return
        self._counted = now
        done = min(self.total, self._committed() + own)
        passed = max(now - self.started, 1e-3)
        speed = (done - self.before) / passed
        seconds = sum(clip.seconds for part in self.parts for clip in part.clips) / self.total
        self.progress.update(done, self.total, "tokenising", **{"clips/s": speed, "hours/h": speed * seconds})

    def wait_for_others(self) -> None:
        """Until every part is there; when another rank is lost, the launcher ends this one."""
        while self._committed() < self.total:
            self._report()
            time.sleep(POLL_SECONDS)
        self.progress.update(self.total, self.total, "tokenising")


def over_threads(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yields `function(item)` for each of `items` in order, each worked out by one thread.

    One torch thread a batch and a batch a core is faster than all cores on one batch, whose threads wait for each other
    after every operation; and the codes do not depend on how many cores there are.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            ahead: deque[Future[Result]] = deque()
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) >= threads + BATCHES_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
    finally:
        torch.set_num_threads(before)
