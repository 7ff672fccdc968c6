"""What goes wrong on rank 0 alone, beside a step, ends all ranks at once, with the same words where a user can help."""

from __future__ import annotations

import errno
import importlib
import time

import pytest
import yaml
from ranks import start_ranks
from training_runs import make_run

from model.config import EncodersConfig
from model.errors import UserError
from trainer.exit_codes import FAULT

PLACES = {
    "metrics": ("trainer.metrics_writer", "JsonLines", "write"),
    "samples": ("trainer.samples", "Samples", "_make"),
    "the finished weights": ("trainer.training", None, "write_tensors"),
}
ERRORS = {
    "full": (
        OSError(errno.ENOSPC, "No space left on device"),
        2,
        "is full: make room, then run the same",
    ),
    "read-only": (OSError(errno.EROFS, "Read-only file system"), 2, "cannot be written: [Errno 30] Read-only"),
    "broken": (UserError("the stage 'fine' is damaged"), 2, "error: the stage 'fine' is damaged"),
    "fault": (ValueError("a mistake of ours"), FAULT, "ValueError: a mistake of ours"),
}
SECONDS = 60
"""Far below `hang_timeout`."""


def failing(run, place, kind):
    """Trains; on rank 0 `place` fails."""
    from trainer.__main__ import train

    module, owner, name = PLACES[place]
    target = importlib.import_module(module)

    def fail(*arguments, **settings):
        raise ERRORS[kind][0]

    setattr(getattr(target, owner) if owner else target, name, fail)
    return train(run, "coarse")


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("metrics", "full"),
        ("samples", "read-only"),
        ("samples", "broken"),
        ("samples", "fault"),
        ("the finished weights", "full"),
    ],
)
def test_all_ranks_end_alike(tmp_path, place, kind):
    sample_every = 1 if place == "samples" else None
    run = make_run(tmp_path / "run", steps=2, warmup_steps=1, log_every=1, sample_every=sample_every)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe |= {"encoders": EncodersConfig().model_dump(mode="json"), "sampling": {}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    started = time.monotonic()
    ranks = start_ranks(failing, 2, tmp_path / "log", run, place, kind)
    _, code, words = ERRORS[kind]
    assert ranks.wait() == [code] * 2, ranks.output()
    assert time.monotonic() - started < SECONDS
    assert ranks.output().count(words) == (2 if code == 2 else 1), ranks.output()
    assert ("Traceback" in ranks.output()) == (code == FAULT)
