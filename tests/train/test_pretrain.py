"""The recipe from shards to a model, on a toy shape with a vocabulary of its own."""

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from helpers.shards import write_documents, write_shards
from helpers.tokenizers import small_sentencepiece
from helpers.training import assert_same, losses, whole_and_resumed

from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load
from arriero.cli.recipes import validate
from arriero.data.held_out import held_out_rows
from arriero.data.sharding import shard_sources
from arriero.data.shards import open_sources
from arriero.errors import ConfigError, DataError
from arriero.model import catalogue as shapes
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.tokenizer import load_tokenizer
from arriero.tokenizer.train import learn_llama3
from arriero.train.config import LoopConfig, OptimConfig, PretrainConfig, PretrainDataConfig, TrainingStage
from arriero.train.hardware import refuse_what_cannot_fit
from arriero.train.metrics import surviving_records
from arriero.train.phases import Phase, count_steps, durations, timetable
from arriero.train.pretrain import build, main
from arriero.train.recipe import few_steps_note, warmup_note
from arriero.train.validation import validation_interval

SHAPE = LlamaConfig(44, 2, 11, 11, 29, 101, 64, tied_embeddings=True)


@pytest.fixture(autouse=True)
def toy_shape(monkeypatch):
    monkeypatch.setitem(shapes.LADDER, "toy", SHAPE)
    monkeypatch.setitem(shapes.SHAPES, "toy", SHAPE)


def settings(shards: Path, out: Path, **changes) -> PretrainConfig:
    config = PretrainConfig(
        model="toy",
        out=str(out),
        prompts=("The",),
        data=PretrainDataConfig(train=str(shards), seq_len=64, validation_tokens=2000),
        optim=OptimConfig(lr=1e-2, warmup=2.0),
        loop=LoopConfig(steps=6, batch_rows=4, micro_rows=2, precision="fp32", validate_every=3),
    )
    return replace(config, **changes)


def records(out: Path, event: str | None = None):
    return [record for record in surviving_records(out / "metrics.jsonl") if record.get("event") == event]


def test_a_run_learns_and_leaves_a_model_that_transformers_opens(shards, tmp_path):
    out = tmp_path / "run"
    assert main(settings(shards, out)).progress.step == 6
    steps = records(out)
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[0]["mfu"] > 0
    validation = records(out, "validation")
    assert [record["step"] for record in validation] == [0, 3, 6]
    assert validation[-1]["loss"] < validation[0]["loss"]
    assert validation[0].keys() >= {"bits_per_byte", "bits_per_byte_long", "bits_per_byte_short", "samples"}
    assert validation[-1]["samples"][0].startswith("The")

    ours, tokenizer = load(out / "model")
    assert ours.config.vocab_size == tokenizer.vocab_size == 512
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    theirs_tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    ids = tokenizer.encode("def f(x): return x")
    assert theirs_tokenizer.encode("def f(x): return x", add_special_tokens=False) == ids
    with torch.no_grad():
        torch.testing.assert_close(ours(torch.tensor([ids])), theirs(torch.tensor([ids])).logits, atol=1e-5, rtol=1e-4)


def test_bits_per_byte_are_those_of_whole_documents_each_alone(shards, tmp_path):
    config = settings(shards, tmp_path / "run")
    config = replace(config, data=replace(config.data, seq_len=8192, validation_tokens=10**9))
    run = build(config, None)
    measured = run.trainer.validate()
    nats, n_bytes = 0.0, 0
    for source in open_sources(shards / "validation").values():
        n_bytes += source.n_bytes
        for i in range(len(source)):
            ids = torch.tensor(source.tokens(i).astype("int64"))
            with torch.no_grad():
                nats += F.cross_entropy(run.model(ids[None])[0, :-1], ids[1:], reduction="sum").item()
    assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def mixed_shards(family: str, out: Path, smollm2_gguf: Path) -> Path:
    """English and Chinese, whose tokens have other numbers of bytes, as two sources that are all held out."""
    from pydoc_data.topics import topics

    rng = random.Random(3)
    english = [text[: rng.randint(200, 2000)] for _, text in sorted(topics.items())[:23]]
    letters = "今天天气很好我们一起去公园散步"
    chinese = ["".join(rng.choices(letters, k=rng.randint(50, 500))) for _ in range(19)]
    tokenizer = {
        "llama3": lambda: learn_llama3([text.encode() for text in english], 512, n_special=11),
        "sentencepiece": small_sentencepiece,
        "smollm2": lambda: load_tokenizer(smollm2_gguf),
    }[family]()
    documents = [*((text, "english") for text in english), *((text, "chinese") for text in chinese)]
    path = write_documents(out.parent / f"{out.name}.jsonl", documents)
    shard_sources([path], tokenizer, out, validation=0.5, by_source=True)
    return out


def bytes_of_text(ids: list[int], tokenizer: transformers.PreTrainedTokenizerFast, family: str) -> int:
    """By the letters of byte-level BPE, a letter a byte, or by SentencePiece's marks."""
    pieces = tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)
    if family != "sentencepiece":
        assert set("".join(pieces)) <= set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        return sum(map(len, pieces))
    return sum(1 if piece.startswith("<0x") else len(piece.replace("▁", " ").encode()) for piece in pieces)


@pytest.mark.parametrize("family", ["llama3", "sentencepiece", "smollm2"])
@pytest.mark.parametrize("n_tokens", [64, 700, 10**6])
def test_bits_per_byte_are_over_the_bytes_of_the_tokens_that_are_measured(tmp_path, smollm2_gguf, family, n_tokens):
    shards = mixed_shards(family, tmp_path / "shards", smollm2_gguf)
    config = settings(shards, tmp_path / "run")
    run = build(replace(config, data=replace(config.data, validation_tokens=n_tokens)), None)
    measured = run.trainer.validate()
    save_hf(run.model, tmp_path / "model", run.tokenizer, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(shards / "tokenizer")
    bits, n_bytes = {}, {}
    for name, rows in held_out_rows(run.held_out, run.tokenizer, config.data.seq_len, n_tokens).items():
        nats, n_bytes[name] = 0.0, 0
        for row in map(rows.row, range(rows.n_rows)):
            at = 0
            for n in row.lengths.tolist():  # a document, or a piece of one, that sees nothing else
                ids, targets = (torch.tensor(x[at : at + n].astype("int64")) for x in (row.tokens, row.targets))
                with torch.no_grad():
                    nats += F.cross_entropy(model(ids[None]).logits[0], targets, reduction="sum").item()
                n_bytes[name] += bytes_of_text(targets.tolist(), tokenizer, family)
                if family == "sentencepiece" and ids[0] == tokenizer.bos_token_id:
                    n_bytes[name] -= 1  # the space that SentencePiece puts before a text
                at += n
        bits[name] = nats / math.log(2)
        assert measured[f"bits_per_byte_{name}"] == pytest.approx(bits[name] / n_bytes[name], rel=1e-5)
    assert measured["bits_per_byte"] == pytest.approx(sum(bits.values()) / sum(n_bytes.values()), rel=1e-5)
    if n_tokens == 10**6 and family != "smollm2":  # whole documents, and every byte predicted
        whole = {name: source.n_bytes for name, source in open_sources(shards / "validation").items()}
        assert n_bytes == whole


def test_held_out_documents_of_one_token_are_passed_over_or_refused(tmp_path, caplog):
    tokenizer, data = small_sentencepiece(), PretrainDataConfig()
    limits = data.seq_len, data.validation_tokens
    ones, more = write_shards(tmp_path / "ones", [1, 1, 1]), write_shards(tmp_path / "more", [1, 5, 7])
    with pytest.raises(DataError, match="ones: every held-out document is one token, which nothing predicts; hold"):
        held_out_rows({"ones": ones}, tokenizer, *limits)
    with caplog.at_level("WARNING"):
        assert [*held_out_rows({"ones": ones, "more": more}, tokenizer, *limits)] == ["more"]
    assert "ones: its documents are of one token each, which nothing predicts: not measured" in caplog.text
    assert held_out_rows({}, tokenizer, *limits) == {}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_and_resumed_gives_the_same_weights_across_a_stage(shards, tmp_path, optimizer):
    stages = (TrainingStage(start=0.5, batch_rows=2, seq_len=128, weights={"short": 1.0}),)
    changes = dict(stages=stages, optim=OptimConfig(optimizer=optimizer, lr=1e-2), z_loss=1e-4)
    loop = LoopConfig(steps=6, batch_rows=4, micro_rows=2, precision="fp32", save_every=1, keep_last=9, average=0.5)
    assert_same(*whole_and_resumed(settings(shards, tmp_path, loop=loop, **changes), tmp_path))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_a_stage_changes_what_a_step_reads(shards, tmp_path):
    config = settings(shards, tmp_path / "run", stages=(TrainingStage(start=0.5, batch_rows=2, seq_len=128),))
    batches = build(config, None).trainer.batches
    assert [len(batches(step)) for step in (0, 2, 3, 5)] == [2, 2, 1, 1]
    longest = [max(max(batch.documents.lengths) for batch in batches(step)) for step in range(6)]
    assert max(longest[:3]) <= 64 < max(longest[3:]) <= 128


def test_the_timetable_counts_rows_by_hand():
    config = settings(
        Path("x"),
        Path("y"),
        stages=(TrainingStage(0.25, batch_rows=8), TrainingStage(0.5, seq_len=128, weights={"a": 1.0})),
    )
    phases = timetable(config, {"a": 1.0, "b": 3.0}, 20)
    assert phases == [
        Phase(0, 0, 4, 64, {"a": 1.0, "b": 3.0}),
        Phase(5, 20, 8, 64, {"a": 1.0, "b": 3.0}),
        Phase(10, 60, 8, 128, {"a": 1.0}),
    ]
    assert durations(phases, 20) == [5, 5, 10]
    # a quarter at 256 tokens a step, a quarter at 512, half at 1024: 704 on average
    by_tokens = LoopConfig(steps=0, batch_rows=4)
    assert count_steps(replace(config, tokens=7040.0, loop=by_tokens), 0) == 10
    assert count_steps(config, 0) == 6
    assert count_steps(replace(config, loop=LoopConfig(epochs=2.0, batch_rows=4)), 3520) == 10


def test_other_prompts_on_resume_cost_no_report(shards, tmp_path):
    config = settings(shards, tmp_path / "run")
    config = replace(config, loop=replace(config.loop, steps=2, validate_every=1), prompts=("The", "A"))
    main(config)
    (tmp_path / "run" / "report.html").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    main(replace(config, resume=True, prompts=("One\u2028", "The", "Two")))
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert page.count("<dt>step 0</dt>") == 1 and "One\u2028" in page and "Two" in page
    assert [len(record["samples"]) for record in records(tmp_path / "run", "validation")] == [2, 2, 3]


def test_going_on_with_a_model_keeps_its_weights_and_takes_a_longer_context(shards, tmp_path):
    main(settings(shards, tmp_path / "first"))
    config = settings(shards, tmp_path / "second", model=str(tmp_path / "first" / "model"), rope_theta=5e5)
    run = build(replace(config, data=replace(config.data, seq_len=256)), None)
    assert (run.model.config.max_context, run.model.config.rope_theta) == (256, 5e5)
    first = load(tmp_path / "first" / "model")[0]
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), first.parameters(), strict=True))


def test_what_cannot_be_trained_on_is_refused_before_step_1(shards, tmp_path):
    config = settings(shards, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"no source 'shrot'.*did you mean 'short'"):
        main(replace(config, data=replace(config.data, weights={"shrot": 1.0})))
    with pytest.raises(ConfigError, match="no shape or model '2m'; did you mean '124m' or '1m'"):
        build(replace(config, model="2m"), None)
    with pytest.raises(ConfigError, match="stages start at"):
        replace(config, stages=(TrainingStage(0.5), TrainingStage(0.25)))
    with pytest.raises(ConfigError, match="batch_rows 3 is not a multiple of micro_rows 2"):
        replace(config, stages=(TrainingStage(0.5, batch_rows=3),))
    with pytest.raises(ConfigError, match=r"the run reads 24 rows, but max_epochs ends the sources after \d+; raise"):
        main(replace(config, data=replace(config.data, max_epochs={"short": 0.001, "long": 0.001})))
    small = Llama(replace(SHAPE, vocab_size=128)).init_weights(seed=1)
    save_hf(small, tmp_path / "small")  # without a tokenizer, which it could not be written with
    with pytest.raises(ConfigError, match=r"has 128 tokens, the shards were made with a tokenizer of 512"):
        main(replace(config, model=str(tmp_path / "small")))
    with pytest.raises(ConfigError, match="no source has a weight above 0"):
        main(replace(config, data=replace(config.data, weights={"short": 0.0, "long": 0.0})))
    assert not (tmp_path / "run").exists()


def test_a_model_does_not_go_on_with_ids_that_its_own_tokenizer_reads_as_other_text(shards, tmp_path):
    other = Llama(replace(SHAPE, vocab_size=512)).init_weights(seed=1)
    save_hf(other, tmp_path / "other", small_sentencepiece())
    config = settings(shards, tmp_path / "run", model=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="its own tokenizer reads them as other text; shard the data with it"):
        main(config)
    for file in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / "other" / file).unlink(missing_ok=True)
    build(config, None)  # a model without a tokenizer is taken on trust


def test_a_run_does_not_go_on_where_the_shards_have_changed(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "shards")
    config = settings(copy, tmp_path / "run", loop=LoopConfig(steps=1, batch_rows=2, precision="fp32"))
    main(config)
    manifest = copy / "train" / "short" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"made": "later"}))
    with pytest.raises(DataError, match=r"source 'short' has changed since run .* began"):
        main(replace(config, resume=True))
    with pytest.raises(DataError, match=r"source 'short' has changed since run .* began"):
        validate("pretrain", replace(config, resume=True))


def test_validations_do_not_outweigh_a_short_run():
    assert validation_interval(1000, tokens=10**9, measured=10**5) == 100
    assert validation_interval(1000, tokens=10**6, measured=10**5) == 334
    assert validation_interval(7, tokens=10**4, measured=10**5) == 7


def test_a_warmup_that_outlasts_the_run_is_said():
    assert "the warmup takes 50 steps, and there are 49" in warmup_note(OptimConfig(warmup=50), 49)
    assert not warmup_note(OptimConfig(warmup=50), 50) and not warmup_note(OptimConfig(warmup=0.99), 1)


def test_so_few_steps_that_nothing_is_learned_are_said():
    assert few_steps_note(LoopConfig(), 1).endswith("--epochs 8")
    assert few_steps_note(LoopConfig(epochs=2), 3).endswith("--epochs 6")
    assert few_steps_note(LoopConfig(), 8) == "" == few_steps_note(LoopConfig(steps=2), 2)


def test_the_record_names_the_data(shards, tmp_path):
    main(settings(shards, tmp_path / "run", loop=LoopConfig(steps=1, batch_rows=2, precision="fp32")))
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    sources = open_sources(shards / "train")
    held_out = open_sources(shards / "validation")
    assert data["fingerprints"] == {
        **{f"source {name!r}": source.fingerprint for name, source in sources.items()},
        **{f"validation source {name!r}": source.fingerprint for name, source in held_out.items()},
    }
    assert data["tokens"] == {name: source.n_tokens for name, source in sources.items()}


def validated(preset: str, shards: Path, tmp_path: Path, *flags: str) -> int:
    from arriero import cli

    file = tmp_path / "preset.toml"
    assert cli.main(["cp", preset, str(file)]) == 0
    return cli.main(["validate", str(file), "--data", str(shards), "--out", str(tmp_path / "run"), *flags])


def test_small_presets_validate_on_any_shards(shards, tmp_path, capsys):
    assert validated("pretrain-1m", shards, tmp_path) == 0
    size = replace(shapes.LADDER["1m"], vocab_size=512).n_params
    assert (
        f"1m: {size:,} parameters, from random weights (bf16), muon\n1,282 steps, 21,004,288 tokens"
        in capsys.readouterr().out
    )


def test_presets_with_a_mixture_want_its_sources(shards, tmp_path, capsys):
    assert validated("pretrain-llama1-7b", shards, tmp_path) == 2
    assert "no source 'commoncrawl' in" in capsys.readouterr().err


def test_a_model_that_this_machine_cannot_hold_is_refused_before_it_is_made(shards, tmp_path, capsys, monkeypatch):
    assert validated("pretrain-llama3-405b", shards, tmp_path) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "llama3.1-405b: weights, gradients and optimizer of 405,853,388,800 parameters take at least 4,870 GB" in said
    )
    assert "start more processes (torchrun), or take a smaller shape" in said
    monkeypatch.setenv("WORLD_SIZE", "16384")
    refuse_what_cannot_fit("llama3.1-405b", 405_853_388_800)


def test_a_prompt_without_room_is_refused_before_the_run_directory_is_made(shards, tmp_path):
    message = r"prompts: 'all the words .{26}' has [0-9]+ tokens; for a context of 64 it must"
    with pytest.raises(ConfigError, match=message):
        main(settings(shards, tmp_path / "run", prompts=("all the words " * 40,)))
    assert not (tmp_path / "run").exists()


def test_stages_that_get_no_step_are_named(shards, tmp_path):
    stages = (TrainingStage(start=0.05, batch_rows=2), TrainingStage(start=0.95, batch_rows=4))
    said = build(settings(shards, tmp_path / "run", stages=stages), None).summary()
    assert said.endswith(
        "\nnone of so few steps is left for what comes before the stages"
        "\nnone of so few steps is left for the stage at 0.95"
    )
