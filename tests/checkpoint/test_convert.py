"""Conversions end to end, what they refuse, and what they cost in memory."""

import itertools
import subprocess
import sys

import pytest
import torch
from helpers.toys import equal_weights, toy_model

from arriero.checkpoint.convert import convert
from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load, load_model
from arriero.errors import CheckpointError
from arriero.model.config import LlamaConfig

FORMATS = {"hf": "h", "meta": "m", "gguf": "g.gguf"}


@pytest.mark.parametrize("route", list(itertools.permutations(FORMATS)), ids="-".join)
def test_any_route_through_the_formats_is_bit_exact(family, route, tmp_path):
    model = toy_model(family, torch.bfloat16)
    save_hf(model, tmp_path / "start")
    at = tmp_path / "start"
    for to in route:
        at = convert(at, tmp_path / FORMATS[to], to=to)
    final = load_model(convert(at, tmp_path / "end", to="hf"))
    assert equal_weights(model, final)
    assert final.config == model.config


def test_number_types(tmp_path):
    model = toy_model(LlamaConfig(96, 2, 3, 1, 160, 211, 64))
    save_hf(model, tmp_path / "hf")
    for name, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16), ("f32", torch.float32)):
        expected = toy_model(model.config).to(dtype)
        for to, suffix in FORMATS.items():
            got = load_model(convert(tmp_path / "hf", tmp_path / f"{name}-{suffix}", to=to, dtype=name), dtype=dtype)
            if to == "gguf":  # norms stay fp32 there, so they are compared after rounding
                assert got.state_dict().keys() == expected.state_dict().keys()
            assert equal_weights(expected, got)
    q8 = load_model(convert(tmp_path / "hf", tmp_path / "q8.gguf", to="gguf", dtype="q8_0"))
    assert q8.lm_head.weight.dtype == torch.float32


def test_the_real_model_goes_to_hugging_face_and_back_with_its_tokenizer(smollm2_gguf, tmp_path):
    ids, chat, turn = {}, {}, [{"role": "user", "content": "Hi"}]
    convert(smollm2_gguf, tmp_path / "hf", to="hf", dtype="bf16")
    convert(tmp_path / "hf", tmp_path / "back.gguf", to="gguf")
    text = "  The llama, 1234567 times:\n\n\tdef f(x): return x ** 2  # ¿qué? 你好 🦙 <|im_end|>"
    for path in (smollm2_gguf, tmp_path / "hf", tmp_path / "back.gguf"):
        model, tokenizer = load(path, dtype=torch.bfloat16)
        ids[path.name] = tokenizer.encode(text)
        chat[path.name] = tokenizer.chat_template.render(turn, add_generation_prompt=True)
        assert tokenizer.eos_id == 2
        assert 2 in tokenizer.stop_ids
    assert len(set(map(tuple, ids.values()))) == 1
    assert len(set(chat.values())) == 1
    assert torch.equal(model.lm_head.weight, load_model(smollm2_gguf, dtype=torch.bfloat16).lm_head.weight)


def test_nothing_is_overwritten_without_force(tmp_path):
    model, other = toy_model("llama3-8b"), toy_model("smollm2-135m")
    save_hf(model, tmp_path / "src")
    save_hf(other, tmp_path / "dst")
    (tmp_path / "dst.gguf").write_text("precious")
    for dst, to in ((tmp_path / "dst", "hf"), (tmp_path / "dst.gguf", "gguf")):
        with pytest.raises(CheckpointError, match=r"exists already.*--force"):
            convert(tmp_path / "src", dst, to=to)
    assert equal_weights(load_model(tmp_path / "dst"), other)
    assert (tmp_path / "dst.gguf").read_text() == "precious"
    for dst, to in ((tmp_path / "dst", "hf"), (tmp_path / "dst.gguf", "gguf")):
        assert equal_weights(load_model(convert(tmp_path / "src", dst, to=to, force=True)), model)
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "src", tmp_path / "empty", to="meta")
    with pytest.raises(CheckpointError, match="source and destination are the same"):
        convert(tmp_path / "src", tmp_path / "src", to="hf", force=True)


@pytest.mark.parametrize(
    ("dst", "to", "dtype", "problem"),
    [
        ("x", "ggml", None, "no format 'ggml'.*did you mean 'gguf'"),
        ("x", "hf", "bfloat", r"no number type 'bfloat'.*f32, f16, bf16, q8_0"),
        ("x", "hf", "q8_0", "q8_0 is a type of GGUF files"),
        ("x", "gguf", None, r"give it a name that ends in \.gguf"),
        ("x.gguf", "meta", None, "writes a directory"),
    ],
)
def test_requests_that_make_no_sense_are_refused(tmp_path, dst, to, dtype, problem):
    save_hf(toy_model("smollm2-135m"), tmp_path / "src")
    with pytest.raises(CheckpointError, match=problem):
        convert(tmp_path / "src", tmp_path / dst, to=to, dtype=dtype)


@pytest.mark.parametrize(("to", "name"), FORMATS.items())
def test_a_conversion_that_fails_leaves_nothing(tmp_path, to, name):
    save_hf(toy_model("llama3-8b"), tmp_path / "src")
    (tmp_path / "src" / "tokenizer.json").write_text("{broken")
    with pytest.raises(CheckpointError, match="tokenizer"):
        convert(tmp_path / "src", tmp_path / name, to=to)
    (tmp_path / "src" / "tokenizer.json").unlink()
    weights = tmp_path / "src" / "model.safetensors"
    convert(tmp_path / "src", tmp_path / name, to=to)
    expected = (tmp_path / name).stat().st_mtime_ns
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut short"):
        convert(tmp_path / "src", tmp_path / name, to=to, force=True)
    assert (tmp_path / name).stat().st_mtime_ns == expected
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(["src", name])


PEAK = """
import sys
import torch
from arriero.checkpoint.convert import convert
from arriero.checkpoint.load import load_model

def rss(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

kind, source, target, warm_up = sys.argv[1:]
load_model(warm_up)  # what torch imports at its first use is not the load's
before = rss("VmRSS")
result = load_model(source, dtype=getattr(torch, target)) if kind == "load" else convert(source, target, to=kind)
print(rss("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a process is read from /proc")
def test_a_load_holds_one_model_and_a_conversion_a_few_tensors(tmp_path):
    """113 M parameters: 225 MB in bf16, 450 MB in fp32; the largest tensor is 17 MB."""
    config = LlamaConfig(1024, 11, 8, 2, 2048, 8191, 64)
    model = toy_model(config, torch.bfloat16)
    size = sum(p.nbytes for p in model.parameters())
    assert 220e6 < size < 260e6
    save_hf(model, tmp_path / "hf")
    save_hf(toy_model("smollm2-135m"), tmp_path / "small")

    def peak(*arguments: str) -> int:
        command = [sys.executable, "-c", PEAK, *arguments, str(tmp_path / "small")]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    source = str(tmp_path / "hf")
    assert peak("load", source, "bfloat16") < 1.2 * size
    assert peak("load", source, "float32") < 2 * 1.4 * size  # both copies would be 3 * size
    assert peak("gguf", source, str(tmp_path / "m.gguf")) < 0.5 * size
    assert peak("hf", str(tmp_path / "m.gguf"), str(tmp_path / "back")) < 0.5 * size
    assert peak("load", str(tmp_path / "m.gguf"), "bfloat16") < 1.2 * size
