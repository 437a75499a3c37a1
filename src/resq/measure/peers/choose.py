"""The peers by name."""

from __future__ import annotations

import importlib
from functools import partial

from resq.errors import InputError, nearest
from resq.measure.peers.llama_cpp import LlamaCpp
from resq.measure.peers.openvino import OpenVino
from resq.measure.peers.peer import Build, Peer
from resq.measure.peers.pytorch import PyTorch
from resq.models.architecture import Config
from resq.progress import Progress, silent

HEAD_BITS = (4, 8)

PEERS: dict[str, Build] = {
    "torch-bf16": PyTorch,
    "openvino": partial(OpenVino, name="openvino", properties={}),
    "openvino-f32dq": partial(
        OpenVino,
        name="openvino-f32dq",
        properties={"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128},
    ),
    "llama.cpp": partial(LlamaCpp, name="llama.cpp", weights="Q4_0"),
    "llama.cpp-q8_0": partial(LlamaCpp, name="llama.cpp-q8_0", weights="Q8_0"),
}
# Distributions by the module they install, for each engine.
PACKAGES: dict[str, dict[str, str]] = {
    "torch-bf16": {},
    "openvino": {"openvino": "openvino"},
    "llama.cpp": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
}


def check_peer(name: str) -> None:
    """Raises InputError when no peer has that name, or its packages cannot be imported. `check_peer("openvino")`."""
    if name not in PEERS:
        raise InputError(f"no peer is named {name!r}; there are {', '.join(PEERS)}{nearest(name, PEERS)}")
    engine = next(engine for engine in PACKAGES if name.startswith(engine))
    missing = []
    for module, distribution in PACKAGES[engine].items():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            missing.append(distribution)
        except (ImportError, OSError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"peer {name} needs {distribution}, which is installed but cannot be loaded: {reason}; "
                f"run pip install --force-reinstall {distribution}"
            ) from error
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise InputError(
            f"peer {name} needs {' and '.join(missing)}, which {verb} not installed; "
            "run pip install 'resq-llm[bench]' or leave it out"
        )


def peer_named(name: str, config: Config, *, threads: int, head_bits: int = 8, progress: Progress = silent) -> Peer:
    """Build a peer for a Hugging Face configuration; head_bits 4 or 8. Raises InputError when it cannot be.

    `peer_named("openvino", shape_named("llama-3.2-1b"), threads=2)`
    """
    if head_bits not in HEAD_BITS:
        raise InputError(f"a peer's head has 4 or 8 bits, not {head_bits}")
    if threads < 1:
        raise InputError(f"{threads} threads compute nothing; give at least 1")
    check_peer(name)
    return Peer(name, PEERS[name](config, threads, head_bits, progress))
