"""Calibration: layers are run as the whole model runs them, each behind those rounded before, and the text is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.subjects import byte_level
from helpers.toys import toy_model

from arriero.checkpoint.calibrate import Calibration, calibration_rows
from arriero.checkpoint.hf import LINEAR_ENDS, save_hf
from arriero.checkpoint.load import load_model, open_weights
from arriero.checkpoint.quantize import quantize
from arriero.checkpoint.weights import from_model
from arriero.errors import CheckpointError, DataError
from arriero.model.config import LlamaConfig
from arriero.model.linear import named_products
from arriero.quant.calibrated import calibrated
from arriero.quant.rounding import nearest

TEXT = "The llama hums, and the alpaca listens. ¿Qué dice la llama? 你好 " * 60


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path, tokenizer = tmp_path_factory.mktemp("model") / "m", byte_level()
    save_hf(toy_model(LlamaConfig(64, 2, 4, 2, 96, tokenizer.vocab_size, 1024)), path, tokenizer)
    return path


@torch.no_grad()
def test_each_matrix_is_rounded_for_the_inputs_that_it_has_behind_those_rounded_before_its_layer(source):
    weights = open_weights(source)
    kinds = {name: "int4" for name in weights.entries if name.endswith(LINEAR_ENDS)}
    rows = torch.randint(weights.config.vocab_size, (6, 31), generator=torch.Generator().manual_seed(1))
    calibration = Calibration(weights, kinds, rows)
    found = {name: calibration.packed(name)[0].dense() for name in kinds}
    model = load_model(source, dtype=torch.float32)
    linears = dict(named_products(model)) | {"lm_head": model.lm_head}
    for layer in ("model.layers.0.", "model.layers.1.", "lm_head"):
        seen: dict[str, torch.Tensor] = {}
        here = {name: linear for name, linear in linears.items() if name.startswith(layer)}
        hooks = [
            linear.register_forward_pre_hook(
                lambda _, x, name=name, seen=seen: seen.__setitem__(name, x[0].flatten(0, 1))
            )
            for name, linear in here.items()
        ]
        model(rows)
        for hook in hooks:
            hook.remove()
        for name, linear in here.items():
            expected = calibrated(linear.weight, seen[name].T @ seen[name], "int4").dense()
            same = (expected - found[f"{name}.weight"]).abs() < 1e-6
            assert same.float().mean() > 0.97, name  # sums in another order round otherwise now and then
        for name, linear in here.items():
            linear.weight.copy_(found[f"{name}.weight"])


def test_the_command_calibrates_writes_and_says_the_error_of_the_outputs(source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    found = quantize(source, tmp_path / "q", type="int4", calibrate=text)
    assert all(0 < matrix.output_error < 0.2 for matrix in found.matrices)
    plain = quantize(source, tmp_path / "n", type="int4")
    assert all(matrix.output_error is None for matrix in plain.matrices)
    model, rounded, near = (load_model(path) for path in (source, tmp_path / "q", tmp_path / "n"))
    rows = calibration_rows(byte_level(), text)
    with torch.no_grad():
        off = [(other(rows).float() - model(rows)).norm() for other in (rounded, near)]
    assert off[0] < 0.8 * off[1]


def test_a_text_may_be_rows_of_texts_or_of_conversations_or_pythons_manual(tmp_path):
    tokenizer = byte_level()
    rows = tmp_path / "rows.jsonl"
    messages = {"messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}]}
    rows.write_text("\n".join(map(json.dumps, [{"text": TEXT}, messages])))
    assert calibration_rows(tokenizer, rows, length=64).shape[1] == 64
    assert calibration_rows(tokenizer, None, tokens=2048).shape == (4, 512)


def test_rows_are_taken_from_all_over_the_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i // 1000) for i in range(26_000)))
    tokenizer = byte_level()
    rows = calibration_rows(tokenizer, text, tokens=1024, length=64)
    firsts = {tokenizer.decode(row.tolist())[-1] for row in rows}
    assert len(firsts) >= 8


def test_what_calibration_cannot_do_is_said(source, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Hm.")
    with pytest.raises(
        DataError, match=r"short.txt: \d+ tokens to calibrate by, and a row has 512; give a longer text"
    ):
        quantize(source, tmp_path / "q", type="int4", calibrate=short)
    with pytest.raises(CheckpointError, match="nf4 is rounded to the nearest level only; take --type int4"):
        quantize(source, tmp_path / "q", type="nf4", calibrate="default")
    save_hf(toy_model(LlamaConfig(64, 1, 2, 1, 96, 211, 64)), tmp_path / "bare")
    with pytest.raises(CheckpointError, match="there is no tokenizer; put the model's tokenizer files"):
        quantize(tmp_path / "bare", tmp_path / "q", type="int4", calibrate="default")
    assert not (tmp_path / "q").exists()


def test_one_layer_is_held_at_a_time(source):
    weights = open_weights(source)
    read: list[str] = []

    def noted(name: str) -> torch.Tensor:
        read.append(name)
        return weights.read(name)

    kinds = {name: "int8" for name in weights.entries if name.endswith(LINEAR_ENDS)}
    calibration = Calibration(replace(weights, read=noted), kinds, torch.ones(1, 31, dtype=torch.long))
    for name in kinds:
        calibration.packed(name)
        assert sum(len(matrix.codes) for matrix, _ in calibration._done.values()) <= max(64 * 4 + 64 + 96 * 2, 512)
    layers = [name.split(".")[2] for name in read if "layers" in name]
    assert layers == sorted(layers)
    assert isinstance(nearest(weights.read(name), "int8").kind, str)
    assert from_model(load_model(source)).packed(name) is None
