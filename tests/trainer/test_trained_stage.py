"""A stage as far as its training has come."""

from __future__ import annotations

import torch
from finished_run import make_finished_run
from safetensors.torch import load_file

from trainer.trained_stage import trained_stage


def test_the_weights_of_an_unfinished_stage_are_those_it_saved_last(tmp_path):
    """Whole again, from the stretches that each rank saved."""
    run = make_finished_run(tmp_path / "run")
    weights = load_file(run / "fine" / "model.safetensors")
    (run / "fine" / "manifest.json").unlink()
    found = trained_stage(run, "fine").state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in found)
