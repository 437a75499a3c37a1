"""Text files to token windows with a model's own tokenizer."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from resq import embedded
from resq.embedded import corpus
from resq.errors import InputError, nearest_path

# Windows to draw from for each window asked for, where there are documents enough.
OVERSAMPLED = 8
GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint directory. Raises InputError when it has none."""
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(
            f"{path} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json); copy the model's there"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # transformers 5 builds some families' pipelines (Llama, Qwen2) anew and ignores tokenizer.json; a directory that
    # names the generic class means its tokenizer.json as it stands.
    settings = path / "tokenizer_config.json"
    named = None
    if settings.is_file() and (path / "tokenizer.json").is_file():
        try:
            named = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class")
        except (ValueError, AttributeError) as error:
            raise InputError(f"{settings} is not a JSON object; fetch it again") from error
    try:
        kind = PreTrainedTokenizerFast if named in GENERIC_TOKENIZERS else AutoTokenizer
        return kind.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the tokenizer in {path} cannot be loaded: {reason}") from error


def read_documents(file: Path, tokenizer: Any, *, evaluation: bool) -> list[str]:
    """The documents of a file: a text file is one; each line of a .jsonl holds `text`, or `messages` to which the
    model's chat template is applied. `stdlib` is Python's standard library, whose files for `evaluation` are others
    than those for calibration (a file of that name is reached by its whole path). Raises InputError naming file and
    line."""
    if str(file) == embedded.TEXT:
        return corpus.documents(evaluation=evaluation)
    if not file.is_file():
        raise no_text(file)
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text ({error}); convert it first") from error
    if file.suffix != ".jsonl":
        return [content]
    documents = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}, line {number} is not JSON: {error}") from error
        if isinstance(record, dict) and isinstance(record.get("text"), str):
            documents.append(record["text"])
        elif isinstance(record, dict) and isinstance(record.get("messages"), list):
            if not tokenizer.chat_template:
                raise InputError(f"{file} holds chats but the tokenizer has no chat template; give `text` instead")
            try:
                documents.append(tokenizer.apply_chat_template(record["messages"], tokenize=False))
            except (TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise InputError(f"{file}, line {number}: the chat template refuses the messages: {reason}") from error
        else:
            raise InputError(f"{file}, line {number} has neither `text` nor `messages`")
    return documents


def text_sha256(file: str | Path) -> str:
    """Hash of a calibration text: of the file, of all documents of `stdlib`. Raises InputError when there is none."""
    if str(file) == embedded.TEXT:
        documents = corpus.documents(evaluation=False)
        return hashlib.sha256("\0".join(documents).encode()).hexdigest()
    if not Path(file).is_file():
        raise no_text(file)
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def no_text(file: str | Path) -> InputError:
    """What is said of a file that is not there."""
    return InputError(
        f"no text at {file}; give a UTF-8 text file, a .jsonl with `text` or `messages` in each line, or "
        f"{embedded.TEXT} for the sources of Python's standard library{nearest_path(file, embedded.TEXT)}"
    )


def encode(text: str, tokenizer: Any, what: str, *, special: bool = True) -> list[int]:
    """Token ids of one text. Raises InputError for characters that are no UTF-8 text (lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} holds characters that are not text ({error.reason}); remove them") from error
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def tokenize(documents: Sequence[str], tokenizer: Any, *, order: int | None = None, enough: float = math.inf) -> Tensor:
    """All documents one after the other, int64 [tokens]; each is encoded as the tokenizer does by default (with its
    beginning-of-text token where it adds one), and not twice when a chat template wrote it.

    order: the seed of a random order, None for their own. enough: stop after the document that reaches so many tokens.
    """
    numbers = list(range(len(documents)))
    if order is not None:
        numbers = torch.randperm(len(documents), generator=torch.Generator().manual_seed(order)).tolist()
    ids: list[int] = []
    for number in numbers:
        if len(ids) >= enough:
            break
        document = documents[number]
        begins = bool(tokenizer.bos_token) and document.startswith(tokenizer.bos_token)
        ids.extend(encode(document, tokenizer, f"document {number + 1}", special=not begins))
    return torch.tensor(ids, dtype=torch.int64)


@dataclass(frozen=True)
class Windows:
    """Non-overlapping windows of tokens int64 [windows, length], and where they came from."""

    tokens: Tensor
    origin: str

    @property
    def sha256(self) -> str:
        """Hash of the tokens as little-endian int64, row by row."""
        return hashlib.sha256(self.tokens.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def all_windows(file: Path, tokenizer: Any, length: int, *, wikitext: bool = False) -> Windows:
    """Every whole window of `length` tokens, in order, the tail dropped (perplexity as the paper takes it).

    wikitext: the file is a WikiText split whose lines are the rows of the data set (each ends with its newline, blank
    rows are empty); they are joined by blank lines, the text that published perplexities are taken on.
    """
    if length < 2:
        raise InputError(f"a window of {length} tokens predicts nothing; use at least 2")
    documents = read_documents(file, tokenizer, evaluation=True)
    if wikitext:
        lines = [line for document in documents for line in document.removesuffix("\n").split("\n")]
        rows = [f"{line}\n" if line.strip() else "" for line in lines]
        documents = ["\n\n".join(rows)]
    tokens = tokenize(documents, tokenizer)
    count = len(tokens) // length
    if count < 1:
        raise InputError(
            f"{file} has {len(tokens)} tokens, fewer than one window of {length}; give more text or a shorter window"
        )
    return Windows(tokens[: count * length].view(count, length), str(file))


def sampled_windows(files: Sequence[Path], tokenizer: Any, *, count: int, length: int, seed: int) -> Windows:
    """`count` windows with starts drawn at random from the text: from a shuffled grid of non-overlapping windows while
    they last. Of a file's many documents only as many, drawn at random, are tokenized as hold `OVERSAMPLED` times
    what is asked for. Raises InputError when the text is too short for that many."""
    if not files:
        raise InputError(
            "no calibration text was given; name a text or .jsonl file with --calibration, or for a first try "
            f"{embedded.TEXT}, the sources of Python's standard library"
        )
    enough = OVERSAMPLED * count * length
    parts = [
        tokenize(read_documents(file, tokenizer, evaluation=False), tokenizer, order=seed, enough=enough)
        for file in files
    ]
    tokens = torch.cat(parts)
    available = len(tokens) // length
    names = ", ".join(str(file) for file in files)
    if available < 1:
        raise InputError(f"{names} has {len(tokens)} tokens, fewer than one window of {length}; give more text")
    if available < count:
        raise InputError(
            f"{names} has {len(tokens)} tokens, {available} windows of {length}, but {count} were asked for; "
            f"use --windows {available} or give more text"
        )
    generator = torch.Generator().manual_seed(seed)
    shift = int(torch.randint(len(tokens) - available * length + 1, (), generator=generator))
    chosen = torch.randperm(available, generator=generator)[:count]
    grid = tokens[shift : shift + available * length].view(available, length)
    return Windows(grid[chosen].clone(), names)
