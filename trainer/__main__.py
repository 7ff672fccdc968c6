"""One rank of one stage: `deepspeed --module trainer --run RUN --stage STAGE` starts as many as there are."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data.lock import PATIENCE, locked
from data.processes import die_with_parent, fail, plain_errors
from model.errors import UserError
from trainer import stopping
from trainer.exit_codes import DIVERGED, FAULT, SAVED

if TYPE_CHECKING:
    from trainer.setup import StageSetup
    from trainer.watchdog import Heartbeat

END_SECONDS = 60
"""How long a rank may take to end once its work is done, or has failed."""
NOTICE_SECONDS = 3.0
"""In which the launcher, which looks every second, has seen that a rank has ended."""

log = logging.getLogger("trainer")


def main() -> int:
    parser = argparse.ArgumentParser(prog="deepspeed --module trainer", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder made by `stretto run`")
    parser.add_argument("--stage", required=True, help="semantic, coarse or fine")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    arguments = parser.parse_args()
    die_with_parent()
    with plain_errors(arguments.run):
        return train(arguments.run, arguments.stage)


def train(run: Path, stage: str) -> int:
    """Trains `stage` of `run` as one of its ranks and returns the exit code (trainer.exit_codes).

    It is the last thing a process does: one that has not ended END_SECONDS later is ended by force.
    """
    stopping.heed()

    from torch import distributed

    from trainer.engine import start_process_group
    from trainer.setup import StageSetup
    from trainer.watchdog import Heartbeat, Watchdog

    setup = StageSetup.read(run, stage)
    config = setup.config.train
    interface = start_process_group(config.collective_timeout)
    rank = distributed.get_rank()
    logs, heartbeat = setup.folder / "logs" / f"rank-{rank:04d}.log", Heartbeat()
    watchdog = Watchdog(
        heartbeat,
        setup.folder / "heartbeat",
        logs,
        rank,
        distributed.get_world_size(),
        config.hang_timeout,
        config.startup_timeout,
    )
    try:
        with the_only_job(setup.folder):
            log_to(logs, quiet=rank > 0)
            if interface:
                log.info("reaching the other nodes through network interface %s", interface)
            with watchdog:
                return attempt(setup, heartbeat)
    finally:
        # Destroying a group that has lost a rank may wait for it, as may threads and what runs at exit.
        faulthandler.dump_traceback_later(END_SECONDS, exit=True)
        # Without this a ZeRO-3 process can abort at exit after good work.
        distributed.destroy_process_group()


def attempt(setup: StageSetup, heartbeat: Heartbeat) -> int:
    """Trains, and says what went wrong before the other ranks can see that this one is gone."""
    from trainer.engine import Engine, lost_a_rank
    from trainer.micro_batch import with_micro_batch
    from trainer.setup import SWAP
    from trainer.training import Diverged, Interrupted, Training

    try:
        with plain_errors(setup.run):
            setup = with_micro_batch(setup, lambda what: heartbeat.beat(0, what))
            engine = Engine(setup.build_model(), setup.config.train, setup.folder / SWAP)
            Training(setup, engine, heartbeat).run()
    except Interrupted as interrupted:
        log.info("%s", interrupted)
        return SAVED
    except Diverged as diverged:
        fail(str(diverged), DIVERGED)
    except Exception as error:  # whatever it is: this log says it, since a rank that raises is seen by the others
        if not lost_a_rank(error):
            log.exception("this rank failed after %d steps, in %s", heartbeat.last.step, heartbeat.last.what)
            return FAULT
        log.error("lost another rank after %d steps, in %s: %s", heartbeat.last.step, heartbeat.last.what, error)
        wait_for_the_launcher()
        return FAULT
    return 0


@contextlib.contextmanager
def the_only_job(folder: Path) -> Iterator[None]:
    """Rank 0 holds the lock of a stage's folder for all ranks. Raises the same UserError on all where it cannot."""
    from torch import distributed

    with contextlib.ExitStack() as held:
        problem: list[str | None] = [None]
        if distributed.get_rank() == 0:
            try:
                held.enter_context(locked(folder, float(os.environ.get(PATIENCE, "0"))))
            except UserError as error:
                problem = [str(error)]
        distributed.broadcast_object_list(problem)
        if problem[0] is not None:
            raise UserError(problem[0])
        yield


def wait_for_the_launcher() -> None:
    """Lets the launcher see the rank that failed first, whose exit code tells more than this rank's; it then tells
    this one to end. Where it does not, the rank that is lost was another host's."""
    deadline = time.monotonic() + NOTICE_SECONDS
    while not stopping.told() and time.monotonic() < deadline:
        time.sleep(0.05)


def log_to(path: Path, quiet: bool) -> None:
    """Logs to a file of this rank's own, and to the console: all of it, or errors alone if `quiet`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    console = logging.StreamHandler()
    console.setLevel(logging.ERROR if quiet else logging.INFO)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[logging.FileHandler(path), console],
        force=True,
    )
    for chatty in ("DeepSpeed", "streaming"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
