"""The stages of a run, in the order they are built: one file a family, one line each here."""

from __future__ import annotations

from launcher.stages import bundle, data, training

STAGES = (*data.STAGES, *training.STAGES, *bundle.STAGES)
