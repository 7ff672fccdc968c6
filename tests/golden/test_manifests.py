"""What a Kubernetes cluster is given for a run, to the letter."""

from __future__ import annotations

from golden.make_manifests import GOLDEN, manifest


def test_a_cluster_is_given_what_it_was_given_before():
    assert manifest() == GOLDEN.read_text()
