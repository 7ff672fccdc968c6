"""What comes after training: the bundle, and music from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launcher.stage import Context, Stage, picked

if TYPE_CHECKING:
    from trainer.export import ExportOptions


def bundle(context: Context, options: ExportOptions | None = None) -> dict[str, Any]:
    from trainer.export import export_bundle

    return export_bundle(context.run, context.folder, context.progress, options)


def samples(context: Context) -> dict[str, Any]:
    from trainer.adherence import make_samples

    return make_samples(context.run, context.folder, context.progress)


STAGES = (
    Stage(
        "bundle",
        ("codec", "embedding", "quantizers", "tokens", "semantic", "coarse", "fine"),
        picked("sampling"),
        2,
        bundle,
    ),
    Stage("samples", ("corpus", "codec", "bundle"), picked("seed", "evaluation"), 2, samples),
)
