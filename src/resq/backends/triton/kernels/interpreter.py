"""What stands in for what Triton's interpreter cannot do."""

import triton
import triton.language as tl


@triton.jit
def loop_bound(count, ASM: tl.constexpr):
    """The scalar as what `tl.range` takes: Triton 3.6's interpreter makes an int of an array of one, which numpy 2.4
    refuses."""
    if ASM:
        return count
    else:
        return count if isinstance(count, int) else count.handle.data.item()
