"""The converted checkpoint computes and encodes what llama2.c does, and a bad file leaves nothing behind."""

import importlib.util
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "convert_llama2c.py"
STORIES = ROOT.parent / "shared" / "data" / "stories260K"
MODEL_BIN, TOKENIZER_BIN = STORIES / "stories260K.bin", STORIES / "tok512.bin"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is absent")

# llama2.c, doc/stories260K.md: `./run stories260K.bin -z tok512.bin -t 0.0`, all 256 steps.
GREEDY = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she \
saw a big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to \
play with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she said, "I'm sorry, mom. I didn't know what to do." Her mom said, \
"Don't worry, Lily. We can help you."""

spec = importlib.util.spec_from_file_location("convert_llama2c", SCRIPT)
assert spec
assert spec.loader
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    out = tmp_path_factory.mktemp("llama2c") / "stories260K"
    example.convert(MODEL_BIN, TOKENIZER_BIN, out)
    return out


@pytest.fixture(scope="module")
def model(stories):
    return LlamaForCausalLM.from_pretrained(stories)


@pytest.fixture(scope="module")
def tokenizer(stories):
    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture
def bins(tmp_path):
    """A random model of one layer and a vocabulary with one merge, as llama2.c writes them."""
    dim, hidden, layers, heads, kv_heads, context = 8, 12, 1, 2, 1, 4
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *example.BYTES, " ", "a", " a"]
    weights = 2 * dim * dim + 2 * dim * dim // 2 + 3 * hidden * dim + 2 * dim
    floats = torch.randn(
        len(pieces) * dim + layers * weights + dim + context * dim // heads,
        generator=torch.Generator().manual_seed(0),
    )
    header = struct.pack("<7i", dim, hidden, layers, heads, kv_heads, len(pieces), context)
    model_bin, tokenizer_bin = tmp_path / "model.bin", tmp_path / "tok.bin"
    model_bin.write_bytes(header + floats.numpy().tobytes())
    tokenizer_bin.write_bytes(
        struct.pack("<i", 8)
        + b"".join(struct.pack("<fi", -id, len(piece)) + piece.encode() for id, piece in enumerate(pieces))
    )
    return model_bin, tokenizer_bin


def encode_as_run_c(text, pieces, scores):
    """`encode` of llama2.c's run.c, step by step."""
    ids = {piece: id for id, piece in enumerate(pieces)}
    tokens = [1] + ([ids[" "]] if text else [])
    for character in text:
        tokens += [ids[character]] if character in ids else [byte + 3 for byte in character.encode()]
    while True:
        best_score, best_at, best_id = -1e10, -1, -1
        for at in range(len(tokens) - 1):
            id = ids.get(pieces[tokens[at]] + pieces[tokens[at + 1]])
            if id is not None and scores[id] > best_score:
                best_score, best_at, best_id = scores[id], at, id
        if best_at == -1:
            return tokens
        tokens[best_at : best_at + 2] = [best_id]


def texts(pieces):
    """Unusual characters, look-alikes of special tokens, a story, random strings of pieces and characters."""
    yield from (
        "",
        " ",
        "  two  spaces ",
        "a\n\n\tb",
        "naïve café",
        "日本語",
        "👩‍👩‍👧",
        "\u0301",
        "▁",
        "\ufffd",
        "\x01",
    )
    yield from (
        "<s>",
        "</s> <s>Once",
        "<unk>",
        "<0x41>",
        "<0x0A",
        "“Hi”—she said…",
        "aaaaaaa",
        "Lilily",
        GREEDY,
    )
    draw = random.Random(0)
    odd = ["<s>", "▁", "\n", "é", "ß", "漢", "😀", "<0x20>"]
    for alphabet in (pieces[259:], pieces[259:] + 20 * odd, list(" aehilnorstTy")):
        for _ in range(300):
            yield "".join(draw.choices(alphabet, k=draw.randrange(24)))


@needs_stories
def test_greedy_decoding_gives_the_text_of_llama2c(model, tokenizer):
    ids = tokenizer(GREEDY, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    # Each token is the best one after those before it, from BOS on: that is greedy decoding in one pass.
    assert ids[0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(logits[0, :-1].argmax(-1)) == GREEDY


@needs_stories
def test_generate_starts_the_text_of_llama2c(model, tokenizer):
    ids = model.generate(torch.tensor([[tokenizer.bos_token_id]]), do_sample=False, max_new_tokens=12)
    story = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert story.startswith("Once upon a time")
    assert GREEDY.startswith(story)


@needs_stories
def test_loss_on_a_story_opening_is_that_of_llama2c(model, tokenizer):
    opening, _ = GREEDY.split(" She wanted")
    ids = tokenizer(opening, return_tensors="pt").input_ids
    # shared/data/README.md: a numpy forward pass of the .bin gives 0.324 nats per token, to three digits.
    assert abs(model(ids, labels=ids).loss.item() - 0.324) <= 0.0005


@needs_stories
def test_the_tokenizer_encodes_as_run_c(tokenizer):
    pieces, scores = example.read_tokenizer(TOKENIZER_BIN, size=512)
    # The names in the file, so that a text can spell "<s>" here as there.
    pieces[1:3] = ["\n<s>\n", "\n</s>\n"]
    for text in texts(pieces):
        assert tokenizer.encode(text) == encode_as_run_c(text, pieces, scores), repr(text)


@needs_stories
def test_decode_inverts_encode_whole_and_streamed(tokenizer):
    pieces, _ = example.read_tokenizer(TOKENIZER_BIN, size=512)
    for text in texts(pieces):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        stream = DecodeStream(skip_special_tokens=True)
        chunks = [stream.step(tokenizer.backend_tokenizer, id) for id in ids]
        # A stream keeps an unfinished character back, and U+FFFD looks like one.
        if "\ufffd" not in text:
            assert "".join(chunk or "" for chunk in chunks) == text


def test_a_negative_vocabulary_size_appends_an_untied_classifier(bins, tmp_path):
    model_bin, tokenizer_bin = bins
    example.convert(model_bin, tokenizer_bin, tmp_path / "tied")
    data = bytearray(model_bin.read_bytes())
    dim, vocab = struct.unpack_from("<i16xi", data)
    embedding = torch.frombuffer(data, dtype=torch.float32, offset=28, count=vocab * dim).clone()
    struct.pack_into("<i", data, 20, -vocab)
    model_bin.write_bytes(data + (2 * embedding).numpy().tobytes())
    example.convert(model_bin, tokenizer_bin, tmp_path / "untied")

    ids = torch.tensor([[1, 259, 260, 261]])
    tied, untied = (LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("tied", "untied"))
    assert tied.config.tie_word_embeddings
    assert not untied.config.tie_word_embeddings
    # Doubling is exact in floating point.
    assert torch.equal(untied(ids).logits, 2 * tied(ids).logits)


@pytest.mark.parametrize(
    ("which", "damage"),
    [
        (0, lambda data: b""),
        (0, lambda data: data[:27]),
        (0, lambda data: data[:-1]),
        (0, lambda data: data + bytes(4)),
        (0, lambda data: bytes(28) + data[28:]),
        (0, lambda data: b"24ka" + data[4:]),
        (1, lambda data: b""),
        (1, lambda data: data[:-1]),
        (1, lambda data: data[:-10]),
        (1, lambda data: data + data[-10:]),
        (1, lambda data: data[:-1] + b"\xff"),
        (1, lambda data: data.replace(b"<0x41>", b"<0x42>")),
        (1, lambda data: data[:8] + struct.pack("<i", -9) + data[12:]),
    ],
)
def test_a_bad_file_is_one_line_and_leaves_no_output(bins, tmp_path, which, damage):
    bins[which].write_bytes(damage(bins[which].read_bytes()))
    with pytest.raises(ValueError, match=bins[which].name) as error:
        example.convert(*bins, tmp_path / "deep" / "out")
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == sorted(bins)


def test_a_failed_write_leaves_no_output(bins, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(example, "save", full)
    with pytest.raises(OSError, match="No space left"):
        example.convert(*bins, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted(bins)


def test_an_existing_output_is_kept(bins, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match="remove it or name another"):
        example.convert(*bins, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_the_command_line_converts_and_reports_errors_in_one_line(bins, tmp_path):
    command = [sys.executable, SCRIPT, *bins, tmp_path / "out"]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert second.returncode == 1
    assert second.stderr.startswith("error: ")
    assert second.stderr.count("\n") == 1
