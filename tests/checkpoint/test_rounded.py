"""`--quantize`: the first start rounds, the next ones read the codes, and a changed file is never another's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers.subjects import byte_level
from helpers.toys import toy_model
from safetensors.torch import load_file, save_file

from arriero.checkpoint import rounded
from arriero.checkpoint.adapter import save_adapter
from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load, load_model, open_weights
from arriero.checkpoint.merge import merge
from arriero.checkpoint.quantize import quantize
from arriero.cli import main
from arriero.errors import CheckpointError
from arriero.io.reading import read_json
from arriero.model.config import LlamaConfig
from arriero.model.llama import EMBEDDINGS, HEAD
from arriero.model.lora import add_lora, lora_state
from arriero.model.lora_config import LoraConfig
from arriero.quant.rounding import nearest

TIED = LlamaConfig(64, 2, 4, 2, 192, 271, 64, tied_embeddings=True)
LINEAR = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(rounded, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "quantized"


@pytest.fixture
def source(tmp_path) -> Path:
    save_hf(toy_model(TIED).to(torch.bfloat16), tmp_path / "whole", byte_level())
    return tmp_path / "whole"


@pytest.fixture
def adapter(source) -> Path:
    model = load_model(source)
    add_lora(model, LoraConfig(rank=3), seed=1)
    for name, p in lora_state(model).items():
        if "lora_B" in name:
            p.data.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
    save_adapter(lora_state(model), source.parent / "adapter", LoraConfig(rank=3), str(source))
    return source.parent / "adapter"


def counted(monkeypatch) -> list[str]:
    """The matrices that are rounded from now on."""
    calls: list[str] = []
    kept = rounded.nearest

    def counting(weight, kind):
        calls.append(kind)
        return kept(weight, kind)

    monkeypatch.setattr(rounded, "nearest", counting)
    return calls


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_codes_are_the_nearest_and_the_second_start_reads_them(source, cache, kind, monkeypatch):
    calls = counted(monkeypatch)
    first = load_model(source, quantize=kind)
    assert len(calls) == 15 and len(list(cache.iterdir())) == 1
    second = load_model(source, quantize=kind)
    assert len(calls) == 15, "nothing is rounded again"
    whole = open_weights(source)
    for name, origin in ((LINEAR, LINEAR), (HEAD, EMBEDDINGS)):
        expected = nearest(whole.read(origin), kind)
        for model in (first, second):
            found = model.get_submodule(name.removesuffix(".weight")).matrix
            assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)
    ids = torch.tensor([[1, 2, 3, 200]])
    assert torch.equal(first(ids), second(ids))


def test_equal_files_share_an_entry_and_a_changed_one_has_its_own(source, cache, tmp_path):
    load_model(source, quantize="int4")
    save_hf(load_model(source), tmp_path / "copy", byte_level())
    copy = load_model(tmp_path / "copy", quantize="int4")
    assert len(list(cache.iterdir())) == 1
    file = tmp_path / "copy" / "model.safetensors"
    state = load_file(file)
    state[LINEAR][5, 7] += 0.5
    save_file(state, file, {"format": "pt"})
    changed = load_model(tmp_path / "copy", quantize="int4")
    assert len(list(cache.iterdir())) == 2
    a, b = (model.get_submodule(LINEAR.removesuffix(".weight")).matrix.dense() for model in (copy, changed))
    assert not torch.equal(a[5], b[5]) and torch.equal(a[6], b[6])


def test_a_damaged_entry_is_made_anew(source, cache, monkeypatch):
    load_model(source, quantize="int8")
    [file] = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    calls = counted(monkeypatch)
    load_model(source, quantize="int8")
    assert len(calls) == 15


def test_what_was_used_longest_ago_makes_room(source, cache, tmp_path, monkeypatch):
    load_model(source, quantize="int8")
    [first] = cache.iterdir()
    os.utime(first, (1, 1))
    monkeypatch.setattr(rounded, "MOST", first.stat().st_size + 100)
    load_model(source, quantize="int4")
    [left] = cache.iterdir()
    assert left != first


def test_a_cache_that_cannot_be_written_is_said_and_done_without(
    source, tmp_path, monkeypatch, caplog, fresh_warnings, capsys
):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setattr(rounded, "cache_dir", lambda: tmp_path / "file")
    model = load_model(source, quantize="int8")
    assert "rounded at each start" in capsys.readouterr().err + caplog.text
    expected = nearest(open_weights(source).read(LINEAR), "int8")
    assert torch.equal(model.get_submodule(LINEAR.removesuffix(".weight")).matrix.codes, expected.codes)


def test_matrices_that_are_quantised_already_stay_and_are_named(
    source, cache, tmp_path, fresh_warnings, capsys, caplog
):
    out = quantize(source, tmp_path / "four", type="int4", keep_head=True).out
    model = load_model(out, dtype=torch.bfloat16, quantize="int8")
    assert model.get_submodule(LINEAR.removesuffix(".weight")).kind == "int4" and model.head.kind == "int8"
    assert "14 of 15 matrices are stored quantised already" in capsys.readouterr().err + caplog.text


def test_a_width_that_cannot_be_cut_is_refused_with_the_remedy(tmp_path, cache):
    save_hf(toy_model(LlamaConfig(48, 1, 4, 2, 64, 67, 64)), tmp_path / "odd")
    with pytest.raises(CheckpointError, match="has 48 inputs, and int4 shares a scale among 32 of a row; take int8"):
        load_model(tmp_path / "odd", quantize="int4")


def test_an_adapter_acts_on_the_rounded_weights(source, cache, adapter):
    plain, _ = load(source, adapter=adapter, quantize="int8")
    linear = plain.get_submodule(LINEAR.removesuffix(".weight"))
    assert linear.base.kind == "int8" and "lora" in str(dict(linear.named_parameters()).keys())


def test_eval_measures_the_rounded_model(source, cache, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 9)
    say = ["eval", str(source), "--data", str(tmp_path / "text.txt"), "--precision", "fp32", "--out"]
    assert main([*say, str(tmp_path / "whole_out")]) == 0
    assert main([*say, str(tmp_path / "four_out"), "--quantize", "int4"]) == 0
    measured = [read_json(tmp_path / name / "results.json")["measures"] for name in ("whole_out", "four_out")]
    assert "whole in int4" in "".join(capsys.readouterr().out.split("\n"))
    assert measured[0] != measured[1]
    quantize(source, tmp_path / "four", type="int4")
    assert main(["eval", str(tmp_path / "four"), *say[2:], str(tmp_path / "file_out")]) == 0
    assert read_json(tmp_path / "file_out" / "results.json")["measures"] == measured[1]


def test_merge_writes_model_plus_adapter_in_codes(source, cache, adapter, tmp_path, capsys):
    assert main(["merge", str(source), str(adapter), str(tmp_path / "out"), "--quantize", "int4"]) == 0
    assert "model plus adapter in int4" in capsys.readouterr().out
    merge(source, adapter, tmp_path / "dense", dtype=torch.float32)
    written, dense = open_weights(tmp_path / "out"), open_weights(tmp_path / "dense")
    expected = nearest(dense.read(LINEAR), "int4")
    assert torch.equal(written.packed(LINEAR).codes, expected.codes)
    assert not torch.equal(written.packed(LINEAR).codes, nearest(open_weights(source).read(LINEAR), "int4").codes)
    assert written.packed(HEAD).kind == "int4"
