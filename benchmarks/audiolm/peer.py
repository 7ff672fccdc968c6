"""audiolm-pytorch's coarse transformer, timed one request at a time: a JSON line on stdin, a JSON line back on stdout.

Runs in an environment of its own (requirements.txt) and imports nothing of Stretto. The transformer, the loss and the
sampling of its wrapper are as they ship. Three things are replaced, none of which they call:

* `fairseq` and `wandb`, imported at load for features of audio and for the trainer's log, are empty modules;
* the width of T5, which the constructor asks a hub for even without text, is put where it keeps those it knows;
* the codec is an EncodecWrapper without its network: the wrapper wants one, and gets codes instead of audio.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import resource
import sys
import time
import types
from importlib.metadata import version
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # a forgotten question to a hub is to fail, not to be answered
os.environ["TQDM_DISABLE"] = "1"
for absent in ("fairseq", "wandb"):
    module = types.ModuleType(absent)
    module.__spec__ = importlib.machinery.ModuleSpec(absent, None)  # asked for by those who look whether it is there
    sys.modules[absent] = module

import torch  # noqa: E402
from audiolm_pytorch import CoarseTransformer, CoarseTransformerWrapper, EncodecWrapper, t5  # noqa: E402
from transformers import T5Config  # noqa: E402

LIBRARIES = ("audiolm-pytorch", "torch", "transformers", "hyper-connections", "einops", "numpy")


class AbsentCodec(EncodecWrapper):
    """Passes for a codec where only the number of its residual groups is asked for."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.rq_groups = 1


class Coarse:
    """One coarse transformer in its wrapper, with its optimizer once it has trained."""

    def __init__(
        self, *, device: str, dim: int, layers: int, heads: int, codes: int, quantizers: int, **options: Any
    ) -> None:
        t5.T5_CONFIGS[t5.DEFAULT_T5_NAME] = {"config": T5Config(d_model=dim)}
        transformer = CoarseTransformer(
            dim=dim,
            depth=layers,
            heads=heads,
            codebook_size=codes,
            num_semantic_tokens=codes,
            num_coarse_quantizers=quantizers,
            **options,
        ).to(device)
        self.wrapper = CoarseTransformerWrapper(transformer=transformer, codec=AbsentCodec())
        self.device, self.codes, self.quantizers = torch.device(device), codes, quantizers
        self.optimizer: torch.optim.Optimizer | None = None

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.wrapper.parameters())

    def context(self, batch: int, tokens: int) -> torch.Tensor:
        """Semantic tokens; no code twice, since the wrapper cuts out repetitions and `tokens` are to stay."""
        rows = [torch.randperm(self.codes)[:tokens] for _ in range(batch)]
        return torch.stack(rows).to(self.device)

    def train(self, batch: int, context: int, frames: int, precision: str) -> dict[str, float]:
        """Forward, backward and optimizer step of `batch` windows."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.wrapper.parameters(), lr=1e-4, fused=True)
        semantic = self.context(batch, context)
        coarse = torch.randint(self.codes, (batch, frames, self.quantizers), device=self.device)
        self.wrapper.train()
        started = self.clock()
        with self.autocast(precision):
            loss = self.wrapper(semantic_token_ids=semantic, coarse_token_ids=coarse, return_loss=True)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"seconds": self.clock() - started, "loss": loss.item()}

    def generate(self, batch: int, context: int, frames: int, precision: str) -> dict[str, float]:
        """`frames` frames after a context, with the cache that is its default."""
        semantic = self.context(batch, context)
        started = self.clock()
        with self.autocast(precision):
            codes = self.wrapper.generate(semantic_token_ids=semantic, max_time_steps=frames)
        return {"seconds": self.clock() - started, "codes": codes.numel()}

    def autocast(self, precision: str) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16 autocast")

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def main() -> None:
    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no reply
    models: dict[str, Coarse] = {}
    for line in sys.stdin:
        request = json.loads(line)
        do, model = request.pop("do"), request.pop("model", "")
        if do == "start":
            torch.set_num_threads(request["threads"])
            torch.manual_seed(0)
            answer = {"python": sys.version.split()[0], **{name: version(name) for name in LIBRARIES}}
        elif do == "build":
            models[model] = Coarse(**request)
            answer = {"parameters": models[model].parameters}
        elif do == "memory":
            answer = {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        else:
            answer = {"train": Coarse.train, "generate": Coarse.generate}[do](models[model], **request)
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main()
