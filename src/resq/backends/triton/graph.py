"""A step as a CUDA graph: recorded once, then started by one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resq.backends.triton.device import INTERPRETING


def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Repeats `step`, which must read and write the same tensors each time and neither wait for the card nor copy from
    the host. It runs once here, to compile and to allocate, and is then recorded; each call of what is returned
    overwrites the result of the one before. In the interpreter the step itself is called again.
    """
    if INTERPRETING:
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
