"""ResQ: large language models with 4-bit weights, activations and KV cache, quantized and run for real.

`import resq; model = resq.load("llama-resq"); print(model.generate("Once upon a time"))`
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from resq._version import __version__
from resq.hosts import hook

if TYPE_CHECKING:
    from resq.api import quantize as quantize
    from resq.runtime.generate import Sampling as Sampling
    from resq.runtime.load import Model as Model
    from resq.runtime.load import load as load

# Heavy modules are imported when first asked for, so that `import resq` stays fast.
_LAZY = {
    "load": "resq.runtime.load",
    "Model": "resq.runtime.load",
    "Sampling": "resq.runtime.generate",
    "quantize": "resq.api",
}
__all__ = ["Model", "Sampling", "__version__", "load", "quantize"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'resq' has no attribute {name!r}")


hook.install()
