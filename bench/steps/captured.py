"""A step as a CUDA graph: everything that it launches is replayed by one call, so that the host costs nothing."""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["captured"]

WARMUP = 3  # steps on the stream that is captured, so that every buffer and every kernel is there


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    """The replay of the step. RuntimeError where the step does what cannot be captured, as a wait for the GPU."""
    torch.cuda.empty_cache()  # what an earlier graph held
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.empty_cache()  # what the warm-up left to its stream, the graph cannot use
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay
