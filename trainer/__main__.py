"""One rank of one stage: `deepspeed --module trainer --run RUN --stage STAGE` starts as many as there are."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from data.processes import die_with_parent, fail, plain_errors
from trainer.exit_codes import DIVERGED, SAVED


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
    """Trains `stage` of `run` as one of its ranks and returns the exit code."""
    from torch import distributed

    from trainer.engine import Engine, start_process_group
    from trainer.setup import StageSetup
    from trainer.training import Diverged, Interrupted, Training

    start_process_group()
    rank = distributed.get_rank()
    try:
        setup = StageSetup.read(run, stage)
        log_to(setup.folder / "logs" / f"rank-{rank:04d}.log", quiet=rank > 0)
        Training(setup, Engine(setup.build_model(), setup.config.train)).run()
    except Interrupted as interrupted:
        logging.getLogger(__name__).info("%s", interrupted)
        return SAVED
    except Diverged as diverged:
        fail(str(diverged), DIVERGED)
    finally:
        # Without this a ZeRO-3 process can abort at exit after good work.
        distributed.destroy_process_group()
    return 0


def log_to(path: Path, quiet: bool) -> None:
    """Logs to a file of this rank's own, and to the console unless `quiet`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(path)]
    if not quiet:
        handlers.append(logging.StreamHandler())
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=handlers, force=True
    )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
