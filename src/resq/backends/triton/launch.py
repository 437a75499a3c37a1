"""The one place that starts a kernel, so that what is compiled without a card is what is launched on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments in order, constants by name, and compile options (num_warps, num_stages, …)."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


_catch: Callable[[Launch], None] | None = None


def launch(
    kernel: Any,
    grid: Sequence[int],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    fuse: bool = True,
    **constants: Any,
) -> None:
    """Run `kernel` over `grid` programs. arguments: tensors, numbers or None, in order; constants: tl.constexpr ones.

    fuse: whether a product and a sum may become one fused multiply-add; False where a rounding is the reference's, bit
    for bit.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fuse}
    if _catch is not None:
        _catch(Launch(kernel, arguments, constants, options))
    else:
        kernel[tuple(grid)](*arguments, **constants, **options)


def power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two that is neither below `count` nor below `least`: what a tile's sides are."""
    return max(least, 1 << (count - 1).bit_length())


@contextmanager
def caught(catch: Callable[[Launch], None]) -> Iterator[None]:
    """Inside, launches go to `catch` and nothing runs."""
    global _catch
    before, _catch = _catch, catch
    try:
        yield
    finally:
        _catch = before
