"""Text files to token windows with a model's own tokenizer."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from jinja2 import TemplateError
from torch import Tensor

from resq import embedded
from resq.embedded import corpus
from resq.errors import InputError, nearest_path

# Windows to draw from for each window asked for, where there are documents enough.
OVERSAMPLED = 8
# A calibration text of more bytes than this is cut into pieces of about so many: a tokenizer takes some 172 bytes of
# memory for each of a document.
WHOLE, PIECE = 16 << 20, 1 << 20
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
    check_text(file)
    try:
        with open(file, encoding="utf-8-sig") as stream:
            if file.suffix != ".jsonl":
                return [stream.read()]
            lines = enumerate(stream, start=1)
            return [_document(file, number, line, tokenizer) for number, line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise not_utf8(file) from error


def _document(file: Path, number: int, line: str, tokenizer: Any) -> str:
    """The document of a line of a .jsonl."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}, line {number} is not JSON: {error}") from error
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return record["text"]
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise InputError(f"{file}, line {number} has neither `text` nor `messages`")
    if not tokenizer.chat_template:
        raise InputError(f"{file} holds chats but the tokenizer has no chat template; give `text` instead")
    try:
        return tokenizer.apply_chat_template(record["messages"], tokenize=False)
    except (TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file}, line {number}: the chat template refuses the messages: {reason}") from error


def not_utf8(file: Path) -> InputError:
    """What is said of a file that is not UTF-8, with its first such line."""
    what = "it was changed while it was read"
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                what = f"line {number}: {error}"
                break
    return InputError(f"{file} is not UTF-8 text ({what}); convert it first")


@dataclass(frozen=True)
class Pieces(Sequence[str]):
    """A plain text file of `size` bytes as documents of about `PIECE` bytes, each read when it is asked for: whole
    lines, or whole characters where a line is longer than that. Joined they are the file's text. Raises InputError for
    a piece that is not UTF-8."""

    file: Path
    size: int

    def __len__(self) -> int:
        return -(-self.size // PIECE)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        with open(self.file, "rb") as stream:
            start, stop = (self._cut(stream, number) for number in (index, index + 1))
            stream.seek(start)
            content = stream.read(stop - start)
        try:
            # As when the file is read whole: every line end becomes a line feed.
            return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8" if start else "utf-8-sig").read()
        except UnicodeDecodeError as error:
            raise not_utf8(self.file) from error

    def _cut(self, stream: io.BufferedReader, number: int) -> int:
        """The byte at which a piece begins: after the first line feed from its nominal place on, if that is less than a
        piece away, else at the first character."""
        nominal = min(number * PIECE, self.size)
        if nominal in (0, self.size):
            return nominal
        stream.seek(nominal - 1)
        ahead = stream.read(PIECE)
        found = ahead.find(b"\n")
        if found >= 0:
            return nominal + found
        inside = next((place for place in range(1, len(ahead)) if ahead[place] & 0xC0 != 0x80), len(ahead))
        return nominal + inside - 1


def calibration_documents(file: Path, tokenizer: Any) -> Sequence[str]:
    """The documents of a calibration text: `read_documents`, or the `Pieces` of a text file that is too large to be
    tokenized as one. Raises InputError."""
    plain = str(file) != embedded.TEXT and file.suffix != ".jsonl" and file.is_file()
    size = file.stat().st_size if plain else 0
    return Pieces(file, size) if size > WHOLE else read_documents(file, tokenizer, evaluation=False)


def check_text(file: str | Path) -> None:
    """Raises InputError when there is no such text."""
    if str(file) != embedded.TEXT and not Path(file).is_file():
        raise no_text(file)


def text_sha256(file: str | Path) -> str:
    """Hash of a calibration text: of the file, of all documents of `stdlib`. Raises InputError when there is none."""
    if str(file) == embedded.TEXT:
        documents = corpus.documents(evaluation=False)
        return hashlib.sha256("\0".join(documents).encode()).hexdigest()
    check_text(file)
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
    parts = [tokenize(calibration_documents(file, tokenizer), tokenizer, order=seed, enough=enough) for file in files]
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
