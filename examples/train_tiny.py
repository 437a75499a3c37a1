"""Train the model that comes with the package, from the standard library's sources and documentation topics alone.

`python examples/train_tiny.py OUT [--tokens 8000000] [--device cpu]`

A Llama of 3.4 million parameters with its own byte-level BPE tokenizer, in float32, saved in bfloat16. Everything is
drawn from --seed; the same machine, Python and torch give the same weights. About 40 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resq.embedded.corpus import documents
from resq.models.text import tokenize

END = "<|end|>"


@dataclass(frozen=True)
class Setup:
    """How a model is trained: a family, its sizes as transformers names them, windows a step, the largest learning
    rate and the steps that lead up to it; autocast: products in bfloat16."""

    model_type: str
    sizes: dict[str, Any]
    batch: int
    peak_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.1
    autocast: bool = False

    @property
    def length(self) -> int:
        """Tokens of a window: the context."""
        return self.sizes["max_position_embeddings"]

    def rate(self, step: int, steps: int) -> float:
        """Linear warm-up, then a cosine down to a hundredth of the peak."""
        if step < self.warmup_steps:
            return self.peak_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.peak_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 2048,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
TINY = Setup("llama", SIZES, batch=16, peak_rate=3e-3)


def train_tokenizer(texts: Sequence[str], setup: Setup = TINY) -> Any:
    """A byte-level BPE tokenizer; `END` begins every text, so it stands between documents and ends them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=setup.sizes["vocab_size"],
        special_tokens=[END],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = [(END, tokenizer.token_to_id(END))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=end)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=setup.length,
        clean_up_tokenization_spaces=False,
    )


@torch.no_grad()
def loss_on(model: Any, tokens: Tensor, device: str, setup: Setup = TINY) -> float:
    """Mean loss in nats per token over non-overlapping windows."""
    windows = tokens[: len(tokens) // setup.length * setup.length].view(-1, setup.length)
    parts = [part.to(device) for part in windows.split(setup.batch)]
    return sum(float(model(input_ids=x, labels=x).loss) * len(x) for x in parts) / len(windows)


def train(train_tokens: Tensor, steps: int, device: str, seed: int, setup: Setup = TINY) -> Any:
    """A transformers model after `steps` steps of AdamW on random windows: shuffled grids with a random shift."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = AutoConfig.for_model(setup.model_type, **setup.sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(device)
    length, kind = setup.length, torch.device(device).type
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps of {setup.batch * length} tokens")
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": setup.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=setup.peak_rate, betas=(0.9, 0.95))
    queue: list[Tensor] = []
    started, mean = time.perf_counter(), 0.0
    for step in range(steps):
        if not queue:
            shift = int(torch.randint(length, (), generator=generator))
            count = (len(train_tokens) - shift) // length
            grid = train_tokens[shift : shift + count * length].view(count, length)
            queue = list(grid[torch.randperm(count, generator=generator)].split(setup.batch))
        x = queue.pop().to(device)
        for group in optimizer.param_groups:
            group["lr"] = setup.rate(step, steps)
        with torch.autocast(kind, torch.bfloat16, enabled=setup.autocast):
            loss = model(input_ids=x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean += (float(loss.detach()) - mean) * (0.02 if step > 50 else 1 / (step + 1))
        if step % 50 == 49 or step == steps - 1:
            left = (time.perf_counter() - started) / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}: loss {mean:.3f} nats, {left:.0f} s left", flush=True)
    return model


def save(model: Any, tokenizer: Any, out: Path, facts: dict[str, Any]) -> None:
    """Weights in bfloat16, tokenizer and the facts of the training, all or nothing."""
    work = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
    try:
        fill(model, tokenizer, work, facts)
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def fill(model: Any, tokenizer: Any, work: Path, facts: dict[str, Any]) -> None:
    """Write everything into `work`."""
    model.cpu().bfloat16().save_pretrained(work)
    tokenizer.save_pretrained(work)
    (work / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for file in work.iterdir():
        file.chmod(0o644)  # safetensors makes files that only their owner can read


def parser_of(description: str | None, *, tokens: int, device: str) -> argparse.ArgumentParser:
    """What every training takes, with its defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=new_directory, help="new directory for the model")
    parser.add_argument("--tokens", type=int, default=tokens, help=f"tokens to train on (default {tokens:,})")
    parser.add_argument("--device", default=device, help="cpu, cuda, …")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def new_directory(name: str) -> Path:
    """A path where nothing is yet."""
    if Path(name).exists():
        raise argparse.ArgumentTypeError(f"{name} exists already; choose another place")
    return Path(name)


def main() -> None:
    args = parser_of(__doc__, tokens=8_000_000, device="cpu").parse_args()
    texts = documents(evaluation=False)
    tokenizer = train_tokenizer(texts)
    train_tokens = tokenize(texts, tokenizer)
    held_out = tokenize(documents(evaluation=True), tokenizer)
    run(tokenizer, train_tokens, held_out, args, TINY, "examples/train_tiny.py")


def run(
    tokenizer: Any, train_tokens: Tensor, held_out: Tensor, args: argparse.Namespace, setup: Setup, script: str
) -> None:
    """Train on `args.tokens` tokens, tell the loss on those held out, and save."""
    print(f"{len(train_tokens):,} training tokens, {len(held_out):,} held out")
    started = time.perf_counter()
    steps = max(1, args.tokens // (setup.batch * setup.length))
    model = train(train_tokens, steps, args.device, args.seed, setup)
    model.eval()
    loss = loss_on(model, held_out, args.device, setup)
    print(f"held out: {loss:.3f} nats per token, perplexity {math.exp(loss):.2f}")
    facts = {
        "script": script,
        "tokens": args.tokens,
        "seed": args.seed,
        "held_out_nats": round(loss, 4),
        "seconds": round(time.perf_counter() - started),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": args.device,
    }
    save(model, tokenizer, args.out, facts)


if __name__ == "__main__":
    main()
