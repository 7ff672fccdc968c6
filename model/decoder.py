"""One step after another through a transformer, over a cache; on a GPU as a replayed CUDA graph.

Shapes are named by letters: B batch, S steps at once, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.cache import GraphLayerCache, LayerCache
from model.transformer import Rotary, Transformer


class Decoder:
    """Feeds a window to `transformer`: first whatever is known, in one pass, then a step at a time."""

    def __init__(self, transformer: Transformer, rotary: Rotary, cache: list[LayerCache]) -> None:
        self.transformer = transformer
        self.rotary = rotary
        self.cache = cache
        self.done = 0

    def feed(self, x_BSD: Tensor) -> Tensor:
        """The hidden state `[B, D]` of the last of the steps `x_BSD`, which follow those fed before."""
        end = self.done + x_BSD.shape[1]
        rotary = self.rotary[0][self.done : end], self.rotary[1][self.done : end]
        self.done = end
        return self.transformer(x_BSD, rotary, self.cache)[:, -1]


class GraphDecoder(Decoder):
    """The same with single steps recorded once and replayed: on a GPU a small step is mostly the time to launch it."""

    def __init__(self, transformer: Transformer, rotary: Rotary, cache: list[LayerCache]) -> None:
        super().__init__(transformer, rotary, cache)
        self._graph: torch.cuda.CUDAGraph | None = None

    def feed(self, x_BSD: Tensor) -> Tensor:
        if x_BSD.shape[1] > 1:
            return super().feed(x_BSD)
        if self._graph is None:
            self._record(x_BSD)
        assert self._graph is not None
        self._place.fill_(self.done)
        self._input.copy_(x_BSD)
        self._graph.replay()
        self.done += 1
        return self._output[:, -1]

    def _record(self, x_BSD: Tensor) -> None:
        self._input = x_BSD.clone()
        self._place = torch.full((1,), self.done, device=x_BSD.device)
        self._static = [GraphLayerCache(layer, self._place) for layer in self.cache]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up, as recording asks for; a step written twice stays the same
            for _ in range(2):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = self.step()

    def step(self) -> Tensor:
        """One step at `place`, of static shapes only."""
        rotary = self.rotary[0].index_select(0, self._place), self.rotary[1].index_select(0, self._place)
        return self.transformer(self._input, rotary, self._static)


def decoder(transformer: Transformer, rotary: Rotary, cache: list[LayerCache]) -> Decoder:
    """The faster one for the device the cache is on."""
    on_gpu = cache[0].keys.is_cuda
    return (GraphDecoder if on_gpu else Decoder)(transformer, rotary, cache)
