"""Train a larger reference model on text files, in minutes on a card: something real to compare methods on.

`python examples/train_reference.py OUT TEXT… [--family qwen2] [--tokens 100000000] [--device cuda]`

A Llama or Qwen2 of 28 million parameters with a byte-level BPE tokenizer of its own, trained in float32 with products
in bfloat16, saved in bfloat16. TEXT are .jsonl files with `text` in each line, or plain ones that count as one
document; every fiftieth document is held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resq.models.text import read_documents, tokenize
from train_tiny import Setup, parser_of, run, train_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
FAMILIES = {
    "llama": {"head_dim": 64, "rms_norm_eps": 1e-5},
    "qwen2": {"rms_norm_eps": 1e-6},
}
EVERY = 50
# A tokenizer's merges are settled long before this many characters.
TOKENIZER_CHARACTERS = 20_000_000


def setup_of(family: str) -> Setup:
    """How a family's model is trained."""
    return Setup(family, SIZES | FAMILIES[family], batch=64, peak_rate=1e-3, autocast=True)


def split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Documents to train on and those held out."""
    held_out = [text for number, text in enumerate(documents) if number % EVERY == EVERY - 1]
    return [text for number, text in enumerate(documents) if number % EVERY != EVERY - 1], held_out


def first(texts: Sequence[str], characters: int) -> list[str]:
    """The first documents, up to so many characters and the one that passes them."""
    found: list[str] = []
    for text in texts:
        if characters <= 0:
            break
        found.append(text)
        characters -= len(text)
    return found


def main() -> None:
    parser = parser_of(__doc__, tokens=100_000_000, device="cuda")
    parser.add_argument("text", type=Path, nargs="+", help="text or .jsonl files")
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    args = parser.parse_args()
    setup = setup_of(args.family)
    documents = [text for file in args.text for text in read_documents(file, None, evaluation=False)]
    texts, held_out = split(documents)
    if not held_out:
        parser.error(f"{len(documents)} documents are too few to hold some out; give at least {EVERY}")
    tokenizer = train_tokenizer(first(texts, TOKENIZER_CHARACTERS), setup)
    train_tokens, other = (tokenize(each, tokenizer) for each in (texts, held_out))
    if min(len(train_tokens), len(other)) < 2 * setup.length:
        parser.error(f"the texts have {len(train_tokens)} and {len(other)} tokens; {2 * setup.length} each are needed")
    run(tokenizer, train_tokens, other, args, setup, "examples/train_reference.py")


if __name__ == "__main__":
    main()
