"""What comes after training: the bundle, and music from it."""

from __future__ import annotations

from typing import Any

from launcher.stage import Context, Stage, picked


def bundle(context: Context) -> dict[str, Any]:
    from trainer.export import export_bundle

    return export_bundle(context.run, context.folder, context.progress)


def average_bundle(context: Context) -> dict[str, Any]:
    from trainer.export import export_bundle

    return export_bundle(context.run, context.folder, context.progress, average=True)


def samples(context: Context) -> dict[str, Any]:
    from trainer.adherence import make_samples

    return make_samples(context.run, context.folder, context.progress)


STAGES = (
    Stage(
        "bundle",
        ("codec", "embedding", "quantizers", "tokens", "semantic", "coarse", "fine"),
        picked("sampling"),
        1,
        bundle,
    ),
    Stage("samples", ("corpus", "codec", "bundle"), picked("seed", "evaluation"), 2, samples),
)
