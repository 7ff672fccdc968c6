"""The models and their inference: needs torch, never deepspeed or streaming."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.pipeline import MusicPipeline, Samples

__all__ = ["MusicPipeline", "Samples"]


def __getattr__(name: str) -> Any:
    # Imported on first use: configuration and artifacts must not wait for torch.
    if name in __all__:
        from model import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'model' has no attribute {name!r}")
