"""Runs a schedule on the model: prompts eagerly, decode steps on CUDA as captured graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .batch import DecodeRows, build
from .model import Model
from .scheduler import Schedule


class Runner:
    """
    rows     the decoding requests' persistent rows
    cache    the KV cache, model.cache_shape
    graphs   capture decode steps (CUDA, and only where the model allows it)
    notify   told before each capture

    A graph is captured the first time its size is needed, for a number of rows and a width of the page
    table, both rounded up. Rows beyond the batch are idle (length 0, slot -1): they read and write no cache. The
    kernels read lengths on the device, so one graph serves all of them.
    """

    def __init__(self, model: Model, rows: DecodeRows, cache: Tensor, graphs: bool, notify: Callable[[str], None]) -> None:
        self.model, self.rows, self.notify = model, rows, notify
        self.device, self.caches = cache.device, model.views(cache)
        self.graphs = graphs and self.device.type == "cuda" and model.capturable
        self._captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None

    def logits(self, step: Schedule) -> Tensor:
        """[rows, V], one row for each of ``step.sampled``. Reads nothing back."""
        batch = build(step, self.rows, self.device)
        if not self.graphs or batch.prefill is not None or batch.decode is None:
            return self.model.forward(batch, self.caches)
        key = _bucket(batch.n_decode, len(self.rows.lens)), batch.decode.pages.shape[1]
        if key not in self._captured:
            self._captured[key] = self._capture(*key)
        graph, logits = self._captured[key]
        graph.replay()
        return logits[: batch.n_decode]

    def _capture(self, size: int, width: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        self.notify(f"capturing the decode graph of {size} rows, {width} pages")
        batch = self.rows.batch(size, width)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # compiles what is not compiled yet; writes what the replay writes again
            self.model.forward(batch, self.caches)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self.model.forward(batch, self.caches)
        return graph, logits


def _bucket(n: int, most: int) -> int:
    """Rows rounded up: powers of two to 16, then multiples of 16."""
    return min(1 << (n - 1).bit_length() if n <= 16 else -(-n // 16) * 16, most)
