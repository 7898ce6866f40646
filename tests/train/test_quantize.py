"""Fine-tuning over a base held in few bits: it trains, goes on where it stopped, and merges onto what it saw."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers.training import sft_settings
from rich.console import Console
from safetensors.torch import load_file, save_file

from arriero import cli
from arriero.checkpoint.load import load
from arriero.checkpoint.merge import merge
from arriero.errors import CheckpointError, ConfigError
from arriero.model.linear import named_products
from arriero.model.lora_config import LoraConfig
from arriero.model.quantized import QuantizedLinear
from arriero.plan.run import plan
from arriero.quant import nf4
from arriero.quant.formats import FORMATS
from arriero.settings import from_dict
from arriero.train.config import DataConfig, LoopConfig, SftConfig
from arriero.train.metrics import surviving_records
from arriero.train.sft import build, main

TOKENS = torch.arange(7, 48).view(1, -1)
FORMATS_LEVELS = nf4.LEVELS


def settings(model: Path, rows: Path, out: Path, kind: str) -> SftConfig:
    loop = LoopConfig(steps=6, batch_rows=4, micro_rows=2, precision="fp32", save_every=2, keep_last=9)
    return sft_settings(model, rows, out, quantize=kind, loop=loop)


def rounded(model: Path, kind: str, out: Path) -> Path:
    """The model's directory with the matrices of its blocks as the format holds them."""
    shutil.copytree(model, out)
    weights = load_file(out / "model.safetensors")
    held = {n: FORMATS[kind].rounded(w) if n.endswith("proj.weight") else w for n, w in weights.items()}
    save_file(held, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_it_trains_as_over_the_rounded_model_and_peft_agrees(kind, toy_model, rows, tmp_path):
    config = settings(toy_model, rows, tmp_path / "run", kind)
    held = [m for _, m in named_products(build(config, Console(quiet=True)).tuned.base.model)]
    assert {type(m.base) for m in held} == {QuantizedLinear}
    main(config)
    plain = rounded(toy_model, kind, tmp_path / "rounded")
    main(replace(settings(plain, rows, tmp_path / "plain", "none")))
    records = [list(surviving_records(tmp_path / run / "metrics.jsonl")) for run in ("run", "plain")]
    losses = [[r["loss"] for r in found if "event" not in r] for found in records]
    assert len(losses[0]) == 6 and losses[0][-1] < losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=1e-5)

    base = transformers.AutoModelForCausalLM.from_pretrained(plain)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    ours, _ = load(toy_model, adapter=tmp_path / "run" / "adapter")  # knows how its base was held
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=1e-5, rtol=1e-4)


def test_a_run_that_was_stopped_ends_in_the_bytes_of_one_that_was_not(toy_model, rows, tmp_path):
    config = settings(toy_model, rows, tmp_path / "run", "nf4")
    main(config)
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    main(replace(config, resume=True))
    assert file.read_bytes() == whole
    with pytest.raises(ConfigError, match="quantize"):
        main(replace(config, resume=True, quantize="int8"))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_merging_names_the_base_that_the_adapter_was_trained_on(kind, toy_model, rows, tmp_path, capsys):
    main(settings(toy_model, rows, tmp_path / "run", kind))
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "base_quantization.json").read_text()) == {"format": kind}
    capsys.readouterr()
    cli.main(["merge", str(toy_model), str(adapter), str(tmp_path / "merged")])
    said = " ".join(capsys.readouterr().out.split())
    assert f"merged onto {toy_model} as {kind} holds it, which the adapter was trained on" in said
    plain = rounded(toy_model, kind, tmp_path / "rounded")
    base = transformers.AutoModelForCausalLM.from_pretrained(plain)
    theirs = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS).logits, theirs(TOKENS).logits, atol=1e-5, rtol=1e-4)

    cli.main(["merge", str(toy_model), str(adapter), str(tmp_path / "onto-original"), "--original-base"])
    assert " as " not in capsys.readouterr().out.splitlines()[0]
    other = load_file(tmp_path / "onto-original" / "model.safetensors")
    first = load_file(tmp_path / "merged" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(other[name], first[name])


def test_a_fault_in_the_format_is_seen_when_merging(toy_model, rows, tmp_path, monkeypatch):
    main(replace(settings(toy_model, rows, tmp_path / "run", "nf4"), samples=0))
    monkeypatch.setattr("arriero.quant.nf4.LEVELS", tuple(level * 1.01 for level in FORMATS_LEVELS))
    with pytest.raises(CheckpointError, match=r"not written: .*_proj\.weight differs"):
        merge(toy_model, tmp_path / "run" / "adapter", tmp_path / "merged")


def test_an_unknown_format_beside_an_adapter_is_refused(toy_model, rows, tmp_path):
    main(replace(settings(toy_model, rows, tmp_path / "run", "nf4"), samples=0))
    adapter = tmp_path / "run" / "adapter"
    (adapter / "base_quantization.json").write_text('{"format": "nf5"}')
    with pytest.raises(CheckpointError, match=r"base_quantization.json: format is 'nf5'; known are int8, nf4"):
        load(toy_model, adapter=adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full"}, "quantize is nf4 and method full; only frozen weights are held in few bits"),
        ({"quantize": "nf5"}, "quantize"),
    ],
)
def test_what_cannot_be_held_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(SftConfig, {"model": "x", "quantize": "nf4", **changes})


def test_the_plan_of_8b_in_nf4_fits_in_seven_and_a_half_gib():
    config = SftConfig(
        model="llama3.1-8b", quantize="nf4", lora=LoraConfig(rank=8), loop=LoopConfig(recompute="full"),
        data=DataConfig(train="", seq_len=2048),
    )  # fmt: skip
    found = plan(config)
    assert found.memory["matrices of the blocks, nf4"] == 6_979_321_856 * 9 // 16
    assert sum(found.memory.values()) <= 7.5 * 2**30
