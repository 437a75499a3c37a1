"""transformers as a host: the same logits as our own runtime, through its loader, caches, masks and generation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, DynamicCache

import resq
from resq.errors import InputError


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import make_checkpoint

    root = tmp_path_factory.mktemp("host")
    source = make_checkpoint(root / "source", "qwen2", seed=3)
    text = root / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog while it rains. " * 60, encoding="utf-8")
    return resq.quantize(source, root / "packed", calibration=[text], windows=8, window_length=32).directory


@pytest.fixture(scope="module")
def hosted(packed: Path):
    return AutoModelForCausalLM.from_pretrained(packed)


@pytest.fixture(scope="module")
def own(packed: Path) -> resq.Model:
    return resq.load(packed)


PROMPT = torch.tensor([[40, 51, 62, 73, 84, 95, 106]])


def test_logits_equal_our_own_runtime(hosted, own: resq.Model) -> None:
    with torch.inference_mode():
        assert torch.equal(hosted(PROMPT).logits, own(PROMPT))
        assert torch.equal(hosted(PROMPT, use_cache=False).logits, own(PROMPT))
    assert hosted.dtype == torch.float32
    assert hosted.get_memory_footprint() > 0


def test_greedy_generation_equals_our_own(hosted, own: resq.Model, packed: Path) -> None:
    made = hosted.generate(PROMPT, max_new_tokens=12, do_sample=False)[0, PROMPT.shape[1] :]
    from resq.runtime.generate import Sampling, continue_tokens

    assert made.tolist() == list(continue_tokens(own, PROMPT, 12, Sampling(), own.end_tokens))
    tokenizer = AutoTokenizer.from_pretrained(packed)
    prompt = torch.tensor([tokenizer("the quick")["input_ids"]])
    tokens = list(continue_tokens(own, prompt, 5, Sampling(), own.end_tokens))
    assert own.generate("the quick", max_new_tokens=5) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_left_padded_batches_give_each_rows_own_text(hosted) -> None:
    short = PROMPT[:, 3:]
    padded = torch.cat([PROMPT, torch.cat([torch.zeros(1, 3, dtype=torch.int64), short], dim=1)])
    mask = (padded != 0).long()
    both = hosted.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)
    alone = hosted.generate(short, max_new_tokens=8, do_sample=False)
    assert both[1, 7:].tolist() == alone[0, 4:].tolist()
    with torch.inference_mode():
        right = torch.cat([short, torch.zeros(1, 3, dtype=torch.int64)], dim=1)
        logits = hosted(right, attention_mask=(right != 0).long()).logits[:, :4]
        assert torch.equal(logits, hosted(short).logits)


def test_beams_sampling_and_assisted_generation_run(hosted) -> None:
    beams = hosted.generate(PROMPT, max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False)
    assert beams.shape[0] == 2
    alone = hosted.generate(PROMPT, max_new_tokens=6, do_sample=False)
    looked = hosted.generate(PROMPT, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2)
    assert looked.tolist() == alone.tolist()
    uncached = hosted.generate(PROMPT, max_new_tokens=6, do_sample=False, use_cache=False)
    assert uncached.tolist() == alone.tolist()


def test_one_cache_over_two_turns_equals_one(hosted) -> None:
    cache = DynamicCache()
    with torch.inference_mode():
        hosted(PROMPT[:, :4], past_key_values=cache)
        assert cache.get_seq_length() == 4
        second = hosted(PROMPT[:, 4:], past_key_values=cache).logits
        whole = hosted(PROMPT).logits[:, 4:]
    assert torch.equal(second, whole)
    cache.crop(-3)
    assert cache.get_seq_length() == 4


def test_what_cannot_be_right_is_refused(hosted, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="copying its directory"):
        hosted.save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match="AutoModelForCausalLM"):
        AutoModelForSequenceClassification.from_pretrained(packed)
    blocks = torch.zeros(1, 1, 7, 7, dtype=torch.bool)
    blocks[..., :4, :4] = torch.ones(4, 4, dtype=torch.bool).tril()
    blocks[..., 4:, 4:] = torch.ones(3, 3, dtype=torch.bool).tril()
    with pytest.raises(InputError, match="attention mask"), torch.inference_mode():
        hosted(PROMPT, attention_mask=blocks)


def test_casts_leave_integers_scales_and_logits_alone(packed: Path, own: resq.Model) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    model.to(torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(model(PROMPT).logits, own(PROMPT))


def fresh(code: str, packed: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code.replace("DIR", repr(str(packed)))]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


LOAD = "AutoModelForCausalLM.from_pretrained(DIR)"


@pytest.mark.parametrize(
    "code",
    [
        f"import resq; from transformers import AutoModelForCausalLM; {LOAD}",
        f"from transformers import AutoModelForCausalLM; import resq; {LOAD}",
        f"from transformers import LlamaForCausalLM, AutoModelForCausalLM; import resq; {LOAD}",
    ],
)
def test_registration_works_in_any_order(packed: Path, code: str) -> None:
    done = fresh(code, packed)
    assert done.returncode == 0, done.stderr


def test_without_import_the_load_fails_loudly(packed: Path) -> None:
    done = fresh(f"from transformers import AutoModelForCausalLM; {LOAD}", packed)
    assert done.returncode != 0
    assert "norm.weight" in done.stderr


def test_import_resq_is_fast_and_loads_neither_torch_nor_transformers() -> None:
    done = fresh("import sys, resq; print([m for m in ('torch', 'transformers') if m in sys.modules])", Path())
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_more_of_what_cannot_be_right_is_refused(hosted) -> None:
    with pytest.raises(InputError, match="output_hidden_states"), torch.inference_mode():
        hosted(PROMPT, output_hidden_states=True)
    with pytest.raises(IndexError), torch.inference_mode():
        hosted(torch.tensor([[-100]]))
    from resq.hosts.transformers import ResQConfig, ResQQuantizer

    quantizer = ResQQuantizer(ResQConfig())
    with pytest.raises(InputError, match="backend cpu runs on cpu; leave it out"):
        quantizer.update_device_map({"": "cuda:0"})
    assert quantizer.update_device_map("auto") == {"": "cpu"}


def test_a_cache_made_in_inference_mode_goes_on_outside(hosted) -> None:
    cache = DynamicCache()
    with torch.inference_mode():
        hosted(PROMPT[:, :4], past_key_values=cache)
        whole = hosted(PROMPT).logits[:, 4:]
    with torch.no_grad():
        assert torch.equal(hosted(PROMPT[:, 4:], past_key_values=cache).logits, whole)


def test_a_checkpoint_of_too_few_layers_is_refused(packed: Path, tmp_path: Path) -> None:
    import json
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(packed, broken)
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = 3
    config["layer_types"] = ["full_attention"] * 3
    (broken / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=r"2 layers, its config\.json says 3"):
        AutoModelForCausalLM.from_pretrained(broken)
