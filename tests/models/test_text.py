"""Texts become the windows the tokenizer says they are, and a file that cannot be used is refused with its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import byte_tokenizer
from tests.test_processes import linux, said_by

from resq.errors import InputError
from resq.models import text
from resq.models.text import (
    Pieces,
    all_windows,
    calibration_documents,
    load_tokenizer,
    read_documents,
    sampled_windows,
    tokenize,
)

SAMPLE = "aß\N{GRINNING FACE}\n\nLast."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("chat")
    byte_tokenizer(directory, chat=True)
    return load_tokenizer(directory)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def write(name: str, content: str | bytes) -> Path:
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return write


def refused(match: str, action: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=match) as caught:
        action()
    assert "\n" not in str(caught.value)


def test_a_text_file_is_one_document_word_for_word(tokenizer: Any, written: Callable[..., Path]) -> None:
    assert read_documents(written("a.txt", SAMPLE), tokenizer, evaluation=True) == [SAMPLE]


def test_each_line_of_a_jsonl_is_a_document_and_blank_lines_are_none(
    tokenizer: Any, written: Callable[..., Path]
) -> None:
    lines = [json.dumps({"text": SAMPLE, "id": 3}), "", "  ", json.dumps({"text": ""}), json.dumps({"text": "b"})]
    assert read_documents(written("a.jsonl", "\r\n".join(lines)), tokenizer, evaluation=True) == [SAMPLE, "", "b"]


def test_only_line_feeds_end_a_line_of_a_jsonl(tokenizer: Any, written: Callable[..., Path]) -> None:
    # JSON allows these inside a string, and str.splitlines() would cut there.
    text = "a\N{LINE SEPARATOR}b\N{PARAGRAPH SEPARATOR}c\x85d\x7f"
    file = written("a.jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\n" + json.dumps({"text": "b"}))
    assert read_documents(file, tokenizer, evaluation=True) == [text, "b"]


def test_messages_go_through_the_chat_template(chat: Any, written: Callable[..., Path]) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    file = written("a.jsonl", json.dumps({"messages": messages}))
    assert read_documents(file, chat, evaluation=True) == ["<s>user: Hi\n<s>assistant: Yo\n"]


def test_a_template_that_wrote_the_beginning_token_gets_no_second(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def record(document: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        calls.append((document, add_special_tokens))
        return {"input_ids": [5]}

    class Recorder:
        bos_token = "<s>"
        __call__ = staticmethod(record)

    assert torch.equal(tokenize(["<s>a", "a"], Recorder()), torch.tensor([5, 5]))
    assert calls == [("<s>a", False), ("a", True)]


def test_messages_without_a_chat_template_are_refused(tokenizer: Any, written: Callable[..., Path]) -> None:
    file = written("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
    refused(
        "a.jsonl holds chats but the tokenizer has no chat template",
        lambda: read_documents(file, tokenizer, evaluation=True),
    )


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 3 is not JSON"),
        ("plain words", "line 3 is not JSON"),
        ('{"text": 3}', "line 3 has neither `text` nor `messages`"),
        ('{"messages": "Hi"}', "line 3 has neither"),
        ("[]", "line 3 has neither"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(
    line: str, match: str, tokenizer: Any, written: Callable[..., Path]
) -> None:
    file = written("a.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    refused(f"a.jsonl, {match}", lambda: read_documents(file, tokenizer, evaluation=True))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bytes_that_are_not_utf8_are_refused(name: str, tokenizer: Any, written: Callable[..., Path]) -> None:
    file = written(name, b'{"text": "caf\xe9"}')
    refused(rf"{name} is not UTF-8 text \(line 1: .* 0xe9 ", lambda: read_documents(file, tokenizer, evaluation=True))


def test_a_missing_file_and_a_directory_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    refused("no text at", lambda: read_documents(tmp_path / "none.txt", tokenizer, evaluation=True))
    refused("no text at", lambda: read_documents(tmp_path, tokenizer, evaluation=True))


def test_documents_are_encoded_one_after_the_other(tokenizer: Any) -> None:
    # One token per UTF-8 byte.
    parts = [tokenize([document], tokenizer) for document in (SAMPLE, "", "b")]
    assert [len(part) for part in parts] == [len(SAMPLE.encode()), 0, 1]
    assert torch.equal(tokenize([SAMPLE, "", "b"], tokenizer), torch.cat(parts))


def test_windows_are_the_text_in_order_without_its_tail(tokenizer: Any, written: Callable[..., Path]) -> None:
    file = written("a.txt", "0123456789" * 3)
    tokens = tokenize(["0123456789" * 3], tokenizer)
    windows = all_windows(file, tokenizer, 7)
    assert (windows.tokens.shape, windows.origin) == ((4, 7), str(file))
    assert torch.equal(windows.tokens.flatten(), tokens[:28])


def test_wikitext_rows_are_joined_by_blank_lines(tokenizer: Any, written: Callable[..., Path]) -> None:
    # Rows of the data set end with their newline and blank ones are empty: " = A = \n", "", "b\n".
    file = written("wiki.raw", " = A = \n \nb")
    expected = tokenize([" = A = \n\n\n\n\nb\n"], tokenizer)
    assert torch.equal(all_windows(file, tokenizer, len(expected), wikitext=True).tokens[0], expected)


def test_a_text_shorter_than_one_window_is_refused(tokenizer: Any, written: Callable[..., Path]) -> None:
    file = written("a.txt", "012345")
    assert all_windows(file, tokenizer, 6).tokens.shape == (1, 6)
    for take in (lambda: all_windows(file, tokenizer, 7), lambda: sampled(file, tokenizer, count=1, length=7)):
        refused("has 6 tokens, fewer than one window of 7", take)


def sampled(file: Path, tokenizer: Any, **options: int) -> torch.Tensor:
    return sampled_windows([file], tokenizer, **({"count": 5, "length": 16, "seed": 0} | options)).tokens


def test_sampled_windows_are_pieces_of_the_text_that_do_not_overlap(tokenizer: Any, text: Path) -> None:
    # Two letters count the text's place, so that every window says where it was cut.
    text.write_bytes(bytes(33 + n // 90 if n % 2 else 33 + n // 2 % 90 for n in range(8000)))
    whole = tokenize([text.read_text()], tokenizer)
    count = 8000 // 16 - 1
    windows = sampled(text, tokenizer, count=count)
    starts = []
    for window in windows:
        found = (whole.unfold(0, 16, 1) == window).all(dim=1).nonzero().flatten()
        assert len(found) == 1
        starts.append(int(found))
    assert len(set(starts)) == count
    assert len({start % 16 for start in starts}) == 1
    assert starts != sorted(starts)


def test_the_seed_alone_decides_the_sample(tokenizer: Any, text: Path) -> None:
    assert torch.equal(sampled(text, tokenizer, seed=3), sampled(text, tokenizer, seed=3))
    assert not torch.equal(sampled(text, tokenizer, seed=3), sampled(text, tokenizer, seed=4))
    state = torch.random.get_rng_state()
    sampled(text, tokenizer)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_more_windows_than_the_text_holds_are_refused_with_what_it_holds(
    tokenizer: Any, written: Callable[..., Path]
) -> None:
    file = written("a.txt", "x" * 100)
    assert sampled(file, tokenizer, count=6).shape == (6, 16)
    refused(
        "has 100 tokens, 6 windows of 16, but 7 were asked for; use --windows 6",
        lambda: sampled(file, tokenizer, count=7),
    )


def test_several_files_are_one_text_and_no_file_is_refused(tokenizer: Any, written: Callable[..., Path]) -> None:
    files = [written("a.txt", "ab"), written("b.jsonl", '{"text": "cd"}')]
    windows = sampled_windows(files, tokenizer, count=1, length=4, seed=0)
    assert torch.equal(windows.tokens[0], tokenize(["abcd"], tokenizer))
    refused("no calibration text", lambda: sampled_windows([], tokenizer, count=1, length=4, seed=0))


def test_the_hash_of_windows_follows_their_tokens(tokenizer: Any, text: Path) -> None:
    first, second = (sampled_windows([text], tokenizer, count=3, length=16, seed=seed) for seed in (0, 1))
    again = sampled_windows([text], tokenizer, count=3, length=16, seed=0)
    assert first.sha256 == again.sha256 != second.sha256


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    refused("has no tokenizer", lambda: load_tokenizer(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "{}", '{"version": "1.0", "model": {"type": "none"}}'])
def test_a_damaged_tokenizer_is_refused(content: str, tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    refused("the tokenizer in .* cannot be loaded", lambda: load_tokenizer(tmp_path))


def test_a_generic_tokenizer_is_read_from_its_own_file_whatever_the_model_type(checkpoint: Callable[..., Path]) -> None:
    # transformers' Qwen2 class would split digits and ignore the file's own pre-tokenizer.
    from tokenizers import Tokenizer

    directory = checkpoint("qwen2")
    file = directory / "tokenizer.json"
    own = json.loads(file.read_text(encoding="utf-8"))
    own["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(own), encoding="utf-8")
    text = "In 2000 LOUD"
    assert load_tokenizer(directory)(text)["input_ids"] == Tokenizer.from_file(str(file)).encode(text).ids
    assert load_tokenizer(directory)(text)["input_ids"] == load_tokenizer(directory)(text.lower())["input_ids"]


def test_every_calibration_file_gives_windows_however_long_the_others_are(
    written: Callable[[str, str], Path], tokenizer: Any
) -> None:
    long, short = written("long.txt", "a" * 200_000), written("short.txt", "b" * 30_000)
    for seed in range(4):
        tokens = sampled_windows([long, short], tokenizer, count=40, length=64, seed=seed).tokens
        texts = [tokenizer.decode(window) for window in tokens]
        assert any("a" in text for text in texts)
        assert any("b" in text for text in texts)


def test_of_many_documents_enough_are_tokenized_and_others_by_another_seed(
    written: Callable[[str, str], Path], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": chr(97 + i % 26) * 100}) for i in range(2000)]
    file = written("many.jsonl", "\n".join(lines))
    seen: list[int] = []
    plain = text.encode

    def encode(document: str, *rest: Any, **options: Any) -> list[int]:
        seen.append(len(document))
        return plain(document, *rest, **options)

    monkeypatch.setattr(text, "encode", encode)
    first = sampled_windows([file], tokenizer, count=10, length=50, seed=0).tokens
    assert text.OVERSAMPLED * 10 * 50 <= sum(seen) < text.OVERSAMPLED * 10 * 50 + 200
    assert torch.equal(first, sampled_windows([file], tokenizer, count=10, length=50, seed=0).tokens)
    assert not torch.equal(first, sampled_windows([file], tokenizer, count=10, length=50, seed=1).tokens)


LINES = "".join(f"line {number} is {'l' * (number % 40)}ong\n" for number in range(90))


@pytest.mark.parametrize(
    "content",
    [
        LINES.encode(),
        LINES.removesuffix("\n").encode(),
        LINES.replace("\n", "\r\n").encode(),
        LINES.replace("\n", "\r").encode(),
        LINES.encode("utf-8-sig"),
        "\N{GRINNING FACE}ß".encode() * 400,
        b"x" * 127 + b"\n" + "ü".encode() * 200 + b"\r\n" + b"y" * 127 + b"\r\n\r\n" + b"z" * 300,
        b"\n" * 700,
    ],
    ids=["lines", "no last line feed", "crlf", "cr", "mark", "one line of emoji", "long lines", "blank lines"],
)
@pytest.mark.parametrize("piece", [64, 127, 128])
def test_the_pieces_of_a_large_text_are_the_text(
    content: bytes, piece: int, written: Callable[..., Path], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "PIECE", piece)
    file = written("a.txt", content)
    whole = read_documents(file, tokenizer, evaluation=False)[0]
    pieces = list(Pieces(file, len(content)))
    assert "".join(pieces) == whole
    assert all(len(each.encode()) <= 2 * piece for each in pieces)
    if whole == LINES and b"\n" in content:
        assert all(each.endswith("\n") for each in pieces if each)


def test_only_a_calibration_text_above_the_bound_is_cut(
    written: Callable[..., Path], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "WHOLE", len(LINES))
    monkeypatch.setattr(text, "PIECE", 100)
    at, above = written("at.txt", LINES), written("above.txt", LINES + "!")
    assert calibration_documents(at, tokenizer) == [LINES]
    assert len(calibration_documents(above, tokenizer)) == -(-(len(LINES) + 1) // 100)
    assert len(calibration_documents(written("a.jsonl", json.dumps({"text": LINES * 2})), tokenizer)) == 1
    whole = tokenize([LINES + "!"], tokenizer)
    assert torch.equal(all_windows(above, tokenizer, len(whole)).tokens[0], whole)


def test_pieces_are_drawn_until_they_are_enough(
    written: Callable[..., Path], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "WHOLE", 1000)
    monkeypatch.setattr(text, "PIECE", 100)
    content = "".join(f"{number:09}\n" for number in range(2000))
    file, seen, plain = written("a.txt", content), list[str](), text.encode

    def encode(document: str, *rest: Any, **options: Any) -> list[int]:
        seen.append(document)
        return plain(document, *rest, **options)

    monkeypatch.setattr(text, "encode", encode)
    first = sampled(file, tokenizer, count=4, length=20)
    drawn = "".join(seen)
    assert text.OVERSAMPLED * 4 * 20 <= len(drawn) < text.OVERSAMPLED * 4 * 20 + 200
    assert all(len(each) == 100 and each in content for each in seen)
    assert seen != sorted(seen)
    assert all(tokenizer.decode(window) in drawn for window in first)
    assert torch.equal(first, sampled(file, tokenizer, count=4, length=20))
    assert not torch.equal(first, sampled(file, tokenizer, count=4, length=20, seed=1))
    with pytest.raises(InputError, match="1000 windows of 20, but 1001 were asked for"):
        sampled(file, tokenizer, count=1001, length=20)


def test_a_piece_that_is_not_utf8_is_refused_with_its_line(
    written: Callable[..., Path], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "WHOLE", 1000)
    monkeypatch.setattr(text, "PIECE", 100)
    file = written("a.txt", b"fine words\n" * 150 + b"caf\xe9\n" + b"fine words\n" * 9)
    refused(r"a.txt is not UTF-8 text \(line 151: ", lambda: sampled(file, tokenizer, count=80))


@linux
@pytest.mark.slow
def test_a_large_text_takes_little_more_memory_than_one_of_its_pieces(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    file = tmp_path / "large.txt"
    file.write_text("the quick brown fox jumps over the lazy dog\n" * (1 + text.WHOLE // 44))
    one, several = said_by(
        """
from pathlib import Path
from resq.models import text
from resq.processes import Peak, held
import json, sys
tokenizer, file = text.load_tokenizer(Path(sys.argv[1])), Path(sys.argv[2])
before = held()
with Peak() as one:
    text.tokenize([text.Pieces(file, file.stat().st_size)[0]], tokenizer)
with Peak() as several:
    text.sampled_windows([file], tokenizer, count=128, length=2048, seed=0)
print(json.dumps([one.bytes - before, several.bytes - before]))
""",
        str(tmp_path),
        str(file),
    )
    # 128 windows are two pieces of one-byte tokens; as one document the text would be sixteen.
    assert several < 2 * one
