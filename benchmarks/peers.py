"""audiolm-pytorch, in an environment and a process of its own, as the speed benchmarks ask it to work."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from launcher.recipe import Recipe
from model.counting import count_stage, quantizers_used, token_fields

SCRIPT = Path(__file__).parent / "audiolm" / "peer.py"


class AudioLM:
    """Its coarse transformer, of the shape and with the tokens of the recipe's coarse stage in the flat pattern.

    One JSON line to its process, one back. While it works this process waits, and it waits while this one works, so
    that both can be timed in turn.
    """

    def __init__(self, python: str, recipe: Recipe, device: str, threads: int) -> None:
        self.process = subprocess.Popen([python, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        config, fields = recipe.stages.coarse.model, token_fields(recipe.encoders, recipe.quantizers)
        target = fields[config.field]
        prefixed = config.model_copy(update={"pattern": "flat"})
        self.count = count_stage(prefixed, fields, {})
        self.shape = {
            "device": device,
            "dim": config.transformer.dim,
            "layers": config.transformer.layers,
            "heads": config.transformer.heads,
            "codes": target.codebook_size,
            "quantizers": len(quantizers_used(config, fields)),
        }
        self.frames = target.frames(config.window_seconds)
        self.versions = self._ask("start", threads=threads)

    @property
    def positions(self) -> int:
        """Length of its sequence: every token, two starts and the end of the conditions.

        What ours has as conditions, joint embedding and all, are semantic tokens to it.
        """
        return self.count.prefix + self.count.tokens + 3

    def build(self, model: str, **options: Any) -> int:
        """A model called `model`, with options of its own; returns the number of its parameters."""
        return self._ask("build", model=model, **self.shape, **options)["parameters"]

    def train(self, model: str, precision: str, batch: int) -> float:
        """Seconds of one step on whole windows."""
        return self._ask("train", **self._work(model, precision, batch, self.frames))["seconds"]

    def generate(self, model: str, precision: str, batch: int, frames: int) -> float:
        """Seconds of making the first `frames` frames of a window."""
        return self._ask("generate", **self._work(model, precision, batch, frames))["seconds"]

    def peak_memory(self) -> int:
        """Bytes that its process held at most."""
        return self._ask("memory")["bytes"]

    def close(self) -> None:
        self.process.communicate()

    def _work(self, model: str, precision: str, batch: int, frames: int) -> dict[str, Any]:
        context = self.count.prefix
        return {"model": model, "precision": precision, "batch": batch, "context": context, "frames": frames}

    def _ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            raise SystemExit(f"audiolm-pytorch's process ended with {self.process.wait()} when asked to {do}")
        return json.loads(reply)
