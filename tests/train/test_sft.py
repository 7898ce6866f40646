"""The recipe from settings to files, on a toy model with the real tokenizer."""

import json
import shutil
import sys
import tomllib
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from helpers.training import sft_settings
from safetensors.torch import load_file

from arriero.checkpoint.hf import read_config, save_hf
from arriero.checkpoint.load import load
from arriero.errors import ConfigError, DataError, UserError
from arriero.model.llama import Llama
from arriero.model.lora_config import LoraConfig
from arriero.settings import load_recipe
from arriero.tokenizer.load import load_tokenizer
from arriero.train.config import LoopConfig, OptimConfig, SftConfig
from arriero.train.metrics import surviving_records
from arriero.train.recipe import compiles
from arriero.train.sft import SftRun, main

TOKENS = torch.arange(7, 48).view(1, -1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_leaves_a_complete_record_and_an_adapter_that_peft_opens(toy_model, rows, tmp_path):
    out = tmp_path / "run"
    outcome = main(sft_settings(toy_model, rows, out))
    assert outcome.progress.step == 6 and outcome.interrupted is None
    files = {path.name for path in out.iterdir()}
    assert files >= {"config.toml", "data.json", "environment.json", "metrics.jsonl", "samples.jsonl", "checkpoints"}
    assert files >= {"loss.png", "report.html", "adapter"}
    steps = [record for record in surviving_records(out / "metrics.jsonl") if "event" not in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["loss"] < steps[0]["loss"]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 and samples[0].keys() == {"prompt", "reference", "before", "after"}
    assert json.loads((out / "data.json").read_text())["trained_tokens"] > 0

    ours, _ = load(toy_model, adapter=out / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(toy_model)
    theirs = peft.PeftModel.from_pretrained(base, out / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(TOKENS), theirs(TOKENS).logits, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(ours(TOKENS), load(toy_model)[0](TOKENS), atol=1e-3)


def test_full_fine_tuning_leaves_a_model_that_transformers_opens(toy_model, rows, tmp_path):
    out, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(toy_model, base)
    said = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "eos_token_id": 0}
    (base / "generation_config.json").write_text(json.dumps(said))
    main(sft_settings(base, rows, out, method="full"))
    for directory in (out / "model", next((out / "checkpoints").iterdir()) / "weights"):
        kept = transformers.GenerationConfig.from_pretrained(directory)
        assert (kept.do_sample, kept.temperature, kept.top_p) == (True, 0.7, 0.8)
        assert kept.eos_token_id == [0, 2]  # 2 ends an answer in the template that was trained with
    ours = load(out / "model")[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(ours(TOKENS), load(toy_model)[0](TOKENS), atol=1e-3)


def test_the_same_settings_give_the_same_adapter(toy_model, rows, tmp_path):
    adapters = []
    for name in ("one", "two"):
        main(sft_settings(toy_model, rows, tmp_path / name, samples=0, lora=LoraConfig(rank=3, dropout=0.1)))
        adapters.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())


def test_a_finished_run_is_not_overwritten(toy_model, rows, tmp_path):
    config = sft_settings(toy_model, rows, tmp_path / "run", samples=0)
    main(config)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="holds a run already; add --resume to go on with it"):
        main(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(toy_model, rows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    config = sft_settings(toy_model, rows, tmp_path / "run", samples=0)
    with pytest.raises(UserError, match="this needs the package 'trackio', which is not installed"):
        main(replace(config, loop=replace(config.loop, trackers=("trackio",))))
    assert not (tmp_path / "run").exists()


def test_a_start_that_was_cut_short_is_begun_again(toy_model, rows, tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    config = sft_settings(toy_model, rows, tmp_path / "run", samples=0)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(SftRun, "data_statistics", interrupted)
        main(config)
    assert main(config).interrupted is None


def test_samples_that_fail_cost_no_result(toy_model, rows, tmp_path, monkeypatch):
    def failing(self, when):
        if when == "after":
            raise OSError("no space left")

    config = sft_settings(toy_model, rows, tmp_path / "run")
    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space left"):
        patched.setattr(SftRun, "sample", failing)
        main(config)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_samples_with_any_character_and_another_number_of_them_survive_a_resume(toy_model, rows, tmp_path):
    text = rows.read_text().replace(" + 2?", " +\\u2028 2?\\u0085 \\ud83d")
    rows.write_text(text)
    config = sft_settings(toy_model, rows, tmp_path / "run")
    main(config)
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").unlink()
    main(replace(config, resume=True, samples=4))
    lines = (tmp_path / "run" / "samples.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert ["before" in row for row in found] == [True, True, False, False]
    assert all("\u2028" in row["prompt"] and "after" in row for row in found)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_a_run_of_a_model_whose_tie_flag_lies_resumes_with_its_own_head(toy_model, rows, tmp_path):
    """config.json says tied, the file has a head that differs: it is kept, trained, and there after a resume."""
    tokenizer = load_tokenizer(toy_model)
    base = tmp_path / "base"
    shape = replace(read_config(toy_model), tied_embeddings=False)
    save_hf(Llama(shape).init_weights(seed=5), base, tokenizer)
    described = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(described | {"tie_word_embeddings": True}))
    config = sft_settings(base, rows, tmp_path / "run", method="full", samples=0)
    config = replace(config, loop=replace(config.loop, save_every=3))
    main(config)
    whole = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert not torch.equal(whole["lm_head.weight"], whole["model.embed_tokens.weight"])
    assert not torch.equal(whole["lm_head.weight"], load_file(base / "model.safetensors")["lm_head.weight"])
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    shutil.rmtree(tmp_path / "run" / "model")
    main(replace(config, resume=True))
    again = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_resuming_with_other_settings_is_refused_by_name(toy_model, rows, tmp_path):
    config = sft_settings(toy_model, rows, tmp_path / "run", samples=0)
    main(config)
    other = replace(config, resume=True, optim=OptimConfig(lr=3e-3))
    with pytest.raises(ConfigError, match=r"started with other settings \(optim.lr\)"):
        main(other)


def test_resuming_with_other_data_is_refused(toy_model, rows, tmp_path):
    config = sft_settings(toy_model, rows, tmp_path / "run", samples=0)
    main(config)
    with open(rows, "a") as file:
        file.write(rows.read_text().splitlines()[0].replace("0 + 2", "71 + 2") + "\n")
    with pytest.raises(DataError, match=r"the training data has changed since run .* began .*: rows would be others"):
        main(replace(config, resume=True))


def test_resuming_where_nothing_ran_is_refused(toy_model, rows, tmp_path):
    with pytest.raises(ConfigError, match="holds no run to resume"):
        main(sft_settings(toy_model, rows, tmp_path / "empty", resume=True))


def test_config_toml_runs_the_same_again(toy_model, rows, tmp_path):
    config = sft_settings(toy_model, rows, tmp_path / "run", samples=0)
    main(config)
    file = tmp_path / "run" / "config.toml"
    assert load_recipe({"sft": SftConfig}, file) == ("sft", config)
    assert tomllib.loads(file.read_text())["recipe"] == "sft"


def test_compiling_is_chosen_by_the_length_of_the_run():
    assert not compiles(LoopConfig(), 1000)
    assert not compiles(LoopConfig(compile="off"), 10**9)
    assert compiles(LoopConfig(compile="on"), 1000)


def test_a_run_goes_on_from_an_adapter_where_that_ended(toy_model, rows, tmp_path):
    first = main(sft_settings(toy_model, rows, tmp_path / "first", lora=LoraConfig(rank=5, alpha=7)))
    adapter = tmp_path / "first" / "adapter"
    settings = sft_settings(toy_model, rows, tmp_path / "second", adapter=str(adapter), lora=LoraConfig(rank=2))
    second = main(settings)
    assert second.progress.validation[0] == pytest.approx(first.result_loss, rel=1e-5)
    assert min(second.progress.validation.values()) < first.result_loss
    saved = json.loads((tmp_path / "second" / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (5, 7)  # the adapter's own settings hold


def test_an_adapter_to_go_on_with_is_refused_where_it_does_not_fit_the_settings(toy_model, rows, tmp_path):
    with pytest.raises(ConfigError, match=r"method full; to train every weight from there, merge it first"):
        sft_settings(toy_model, rows, tmp_path / "run", adapter="some/where", method="full")
    main(sft_settings(toy_model, rows, tmp_path / "first", quantize="int8"))
    with pytest.raises(ConfigError, match="trained on a base held in int8, and quantize is none"):
        main(sft_settings(toy_model, rows, tmp_path / "second", adapter=str(tmp_path / "first" / "adapter")))
