"""PyTorch as a peer: a transformers model in bfloat16."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resq.measure.peers.peer import DEVIATION, seconds_of
from resq.models.architecture import Config
from resq.progress import Progress, silent


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """torch's thread count is one for the process: set it for a call, then put it back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class PyTorch:
    """State: a transformers model in bfloat16 with a dynamic cache."""

    about = "bf16 weights, head and KV cache, SDPA"

    def __init__(self, config: Config, threads: int, head_bits: int, progress: Progress = silent) -> None:
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self.vocab, self._threads = config["vocab_size"], threads
        known = AutoConfig.for_model(**config)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(known, dtype=torch.bfloat16, attn_implementation="sdpa")
        model.eval()
        model.tie_weights()
        parameters = list(model.parameters())
        # Drawing every weight takes minutes, and the time of a forward does not depend on equal values in other places.
        noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul(DEVIATION).to(torch.bfloat16)
        for done, parameter in enumerate(parameters):
            progress("building torch-bf16", done, len(parameters))
            if parameter.dim() == 1:
                parameter.data.fill_(1.0)
                continue
            for part in parameter.data.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
        progress("building torch-bf16", len(parameters), len(parameters))
        self._model: Any = model
        self.weight_bytes = sum(p.numel() * p.element_size() for p in parameters)
        self.empty(0, 0)

    def empty(self, rows: int, tokens: int) -> None:
        """See Engine."""
        from transformers import DynamicCache

        self._cache: Any = DynamicCache()
        self._logits: Any = None

    def forward(self, tokens: np.ndarray, start: int) -> float:
        """See Engine."""
        given = torch.from_numpy(tokens)

        def run() -> None:
            output = self._model(given, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._logits = output.logits

        with torch.inference_mode(), _torch_threads(self._threads):
            return seconds_of(run)

    def logits(self) -> Tensor:
        """See Engine."""
        return self._logits[:, -1].float()

    def close(self) -> None:
        """See Engine."""
        self._model = self._cache = self._logits = None
        gc.collect()
