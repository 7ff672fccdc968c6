"""Stages as checkpoints of `transformers`: out of a bundle, and back into one (docs/transformers.md)."""

from model.stock.stage_codes import StageCodes

__all__ = ["StageCodes"]
