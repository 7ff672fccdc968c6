"""The models and their inference: needs torch, never deepspeed or streaming."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.pipeline import MusicPipeline

__all__ = ["MusicPipeline"]


def __getattr__(name: str) -> Any:
    # Imported on first use: configuration and artifacts must not wait for torch.
    if name == "MusicPipeline":
        from model.pipeline import MusicPipeline

        return MusicPipeline
    raise AttributeError(f"module 'model' has no attribute {name!r}")
