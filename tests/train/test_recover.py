"""Recovery: a quantised model comes nearer to the original on rows that it did not see, with the codes that it had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.subjects import byte_level
from helpers.toys import toy_model

from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load_model, open_weights
from arriero.checkpoint.quantize import quantize
from arriero.errors import CheckpointError
from arriero.model.config import LlamaConfig
from arriero.train.recover import recover, trainable


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path, tokenizer = tmp_path_factory.mktemp("model") / "m", byte_level()
    save_hf(toy_model(LlamaConfig(64, 2, 4, 2, 96, tokenizer.vocab_size, 512)), path, tokenizer)
    return path


@pytest.fixture
def text(tmp_path) -> Path:
    file, generator = tmp_path / "text.txt", torch.Generator().manual_seed(5)
    words = ["llama", "hums", "alpaca", "listens", "Andes", "arriero", "leads", "wool", "puna", "¿qué?", "你好"]
    file.write_text(" ".join(words[i] for i in torch.randint(len(words), (4000,), generator=generator)))
    return file


@pytest.mark.parametrize("format", ["compressed-tensors", "gguf"])
def test_held_out_rows_come_nearer_and_the_codes_stay(format, source, text, tmp_path):
    out = tmp_path / ("q.gguf" if format == "gguf" else "q")
    quantize(source, out, type="int4", format=format)
    before = {name: open_weights(out).packed(name) for name in open_weights(out).entries}
    found = recover(source, out, text, steps=12, rows=20, rate=2e-2)
    assert found.after < 0.85 * found.before
    assert (found.rows, found.held_out) == (18, 2)
    weights, changed = open_weights(out), 0
    for name, matrix in before.items():
        if matrix is not None:
            now = weights.packed(name)
            assert torch.equal(now.codes, matrix.codes)
            changed += int((now.scales != matrix.scales).sum())
    assert changed > 100
    ids = torch.tensor([byte_level().encode(text.read_text()[-500:])])
    with torch.no_grad():
        p, q = (load_model(path, dtype=torch.float32)(ids).log_softmax(-1) for path in (source, out))
        old = load_model(source, dtype=torch.float32)
        old.load_state_dict({name: m.dense() for name, m in before.items() if m is not None}, strict=False)
        was = old(ids).log_softmax(-1)
    divergences = [float((p.exp() * (p - other)).sum(-1).mean()) for other in (q, was)]
    assert divergences[0] < 0.9 * divergences[1]


def test_before_training_it_is_the_quantised_model(source, tmp_path):
    quantize(source, tmp_path / "q", type="int4")
    weights = open_weights(tmp_path / "q")
    names = {name for name in weights.entries if weights.packed(name) is not None}
    plain, student = load_model(tmp_path / "q", dtype=torch.float32), load_model(tmp_path / "q", dtype=torch.float32)
    student = trainable(student, weights, names).set_compute_dtype(torch.float32)
    ids = torch.tensor([[3, 5, 7, 11]])
    torch.testing.assert_close(student(ids), plain(ids), rtol=1e-5, atol=1e-5)
    assert (
        sum(p.numel() for p in student.parameters() if p.requires_grad)
        == sum(weights.packed(name).scales.numel() for name in names) + 5 * 64
    )


def test_what_has_no_scales_to_train_is_refused(source, text, tmp_path):
    with pytest.raises(CheckpointError, match="holds no matrix in int8 or int4, whose scales could be trained"):
        recover(source, source, text)
