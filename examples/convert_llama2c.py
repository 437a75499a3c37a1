"""Convert a llama2.c checkpoint and its tokenizer to a Hugging Face directory.

    python examples/convert_llama2c.py stories260K.bin tok512.bin OUT_DIR

Reads the legacy layout of https://github.com/karpathy/llama2.c (export.py, version 0), float32 throughout.
"""

import argparse
import json
import struct
import sys
import tempfile
from math import prod
from pathlib import Path

import numpy as np
from einops import rearrange
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

HEADER_BYTES = 28
# The file may spell these three otherwise ("\n<s>\n"); run.c knows them by their ids.
SPECIAL = ["<unk>", "<s>", "</s>"]
BOS, EOS = 1, 2
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def convert(model_bin: str | Path, tokenizer_bin: str | Path, out: str | Path) -> None:
    """Write `out` whole or not at all: `convert("stories260K.bin", "tok512.bin", "stories260K")`."""
    model_bin, tokenizer_bin, out = Path(model_bin), Path(tokenizer_bin), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists, the output must be a new directory: remove it or name another")
    config, tensors = read_model(model_bin)
    tokenizer = build_tokenizer(*read_tokenizer(tokenizer_bin, size=config["vocab_size"]))
    tokenizer_config = {
        # Not LlamaTokenizer: in transformers 5 that class ignores the pipeline in tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": SPECIAL[0],
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        # To llama2.c "<s>" in a text is three characters.
        "split_special_tokens": True,
    }
    # The training stories were separated by BOS, so run.c stops at it; such a model never learned EOS.
    generation_config = {"bos_token_id": BOS, "eos_token_id": [BOS, EOS]}

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        # One level down, because a temporary directory itself is private to its user.
        folder = Path(scratch) / out.name
        folder.mkdir()
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", generation_config)
        write_json(folder / "tokenizer_config.json", tokenizer_config)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
        folder.rename(out)


def read_model(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """The Llama config and the named float32 weights: `config, tensors = read_model(Path("model.bin"))`."""
    data = path.read_bytes()
    if len(data) < HEADER_BYTES:
        raise ValueError(
            f"{path} has {len(data)} bytes, a llama2.c header alone has {HEADER_BYTES}: fetch the file again"
        )
    header = struct.unpack_from("<7i", data)
    dim, hidden, layers, heads, kv_heads, vocab, context = header
    # A negative vocabulary size says that the classifier does not share the embedding's weights.
    tied, vocab = vocab > 0, abs(vocab)
    if min(dim, hidden, layers, heads, kv_heads, vocab, context) <= 0 or dim % (2 * heads) or heads % kv_heads:
        raise ValueError(
            f"{path} starts with {header}, the legacy llama2.c header is (dim, hidden, layers, heads,"
            " kv_heads, vocab, context) with an even head size: export the model with `export.py --version 0`"
        )
    head_dim = dim // heads
    kv_dim = kv_heads * head_dim

    # In the order of the file; "{}" stands for the layer.
    shapes = {
        "model.embed_tokens": (vocab, dim),
        "model.layers.{}.input_layernorm": (layers, dim),
        "model.layers.{}.self_attn.q_proj": (layers, dim, dim),
        "model.layers.{}.self_attn.k_proj": (layers, kv_dim, dim),
        "model.layers.{}.self_attn.v_proj": (layers, kv_dim, dim),
        "model.layers.{}.self_attn.o_proj": (layers, dim, dim),
        "model.layers.{}.post_attention_layernorm": (layers, dim),
        "model.layers.{}.mlp.gate_proj": (layers, hidden, dim),
        "model.layers.{}.mlp.down_proj": (layers, dim, hidden),
        "model.layers.{}.mlp.up_proj": (layers, hidden, dim),
        "model.norm": (dim,),
        "rope tables": (2, context, head_dim // 2),
    }
    if not tied:
        shapes["lm_head"] = (vocab, dim)
    sizes = [prod(shape) for shape in shapes.values()]
    expected = HEADER_BYTES + 4 * sum(sizes)
    if len(data) != expected:
        raise ValueError(
            f"{path} has {len(data)} bytes, its header {header} asks for {expected}: fetch the file again, or"
            " export the model with `export.py --version 0`"
        )

    tensors = {}
    parts = np.split(np.frombuffer(data, "<f4", offset=HEADER_BYTES), np.cumsum(sizes)[:-1])
    for (name, shape), part in zip(shapes.items(), parts, strict=True):
        if name == "rope tables":  # transformers computes them from rope_theta
            continue
        block = part.reshape(shape)
        for layer, W in enumerate(block) if "{}" in name else [(0, block)]:
            if name.endswith(("q_proj", "k_proj")):
                W = half_split(W, head_dim)
            tensors[name.format(layer) + ".weight"] = np.ascontiguousarray(W)

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "hidden_act": "silu",
        # model.py of llama2.c, and not in the file: norm_eps, precompute_freqs_cis.
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": tied,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "dtype": "float32",
    }
    return config, tensors


def half_split(W: np.ndarray, head_dim: int) -> np.ndarray:
    """W [out, in], rows of each head from RoPE pairs (2i, 2i+1) to (i, i + half): `half_split(W, 8)`."""
    return rearrange(W, "(head pair two) dim -> (head two pair) dim", pair=head_dim // 2, two=2)


def read_tokenizer(path: Path, *, size: int) -> tuple[list[str], list[float]]:
    """Pieces and scores by token id: `pieces, scores = read_tokenizer(Path("tok512.bin"), size=512)`."""
    data = path.read_bytes()
    raw, scores, at = [], [], 4  # after max_token_length, which only sizes run.c's buffers
    while len(raw) < size and at + 8 <= len(data):
        score, length = struct.unpack_from("<fi", data, at)
        if length < 0:
            break
        raw.append(data[at + 8 : at + 8 + length])
        scores.append(score)
        at += 8 + length
    if len(raw) != size or at != len(data):
        raise ValueError(
            f"{path} holds {len(raw)} pieces in {at} of {len(data)} bytes, the model needs exactly {size}:"
            " give the tokenizer the model was trained with, or fetch the file again"
        )
    try:
        pieces = SPECIAL + [piece.decode() for piece in raw[len(SPECIAL) :]]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} has a piece that is not UTF-8 ({error}): fetch the file again") from None
    if pieces[len(SPECIAL) :][: len(BYTES)] != BYTES or len(set(pieces)) != size:
        raise ValueError(
            f"{path} does not hold three special pieces, {BYTES[0]} to {BYTES[-1]} and then distinct texts:"
            " export it with `tokenizer.py` of llama2.c"
        )
    return pieces, scores


def build_tokenizer(pieces: list[str], scores: list[float]) -> Tokenizer:
    """The encoder of run.c: `build_tokenizer(pieces, scores).encode("Once upon a time").ids`.

    run.c joins, again and again, the leftmost neighbours whose joint text is the piece with the best score.
    BPE joins the pair that comes first in its list, so the list is all pairs that form a piece, by its score.
    The order differs only where unlike pairs with one score meet (ab|a and a|ba, both to aba), which no
    pieces of tok512.bin do.

    Spaces stay spaces: with the usual stand-in U+2581, a text that contains that character would change.
    """
    ids = {piece: id for id, piece in enumerate(pieces)}
    texts = dict(zip(pieces, scores, strict=True))
    for piece in SPECIAL + BYTES:
        del texts[piece]
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(texts, key=lambda piece: -texts[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in texts and piece[cut:] in texts
    ]
    tokenizer = Tokenizer(BPE(vocab=ids, merges=merges, unk_token=SPECIAL[0], byte_fallback=True))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", BOS)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def write_json(path: Path, content: dict) -> None:
    """One indented JSON file: `write_json(Path("config.json"), config)`."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_bin", type=Path)
    parser.add_argument("tokenizer_bin", type=Path)
    parser.add_argument("out", type=Path)
    try:
        convert(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
