"""The template that a run was told: saved with what it trained, used by all that read it, and the same on resume."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.tokenizers import small_byte_level
from helpers.training import sft_settings
from safetensors.torch import load_file, save_file

import arriero
from arriero.checkpoint.convert import convert
from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load
from arriero.checkpoint.merge import merge
from arriero.cli import main as cli
from arriero.errors import CheckpointError, ConfigError, DataError, UserError
from arriero.infer.config import GenerateConfig
from arriero.io.gguf_header import read_metadata
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.tokenizer.template import ChatTemplate
from arriero.train.config import LoopConfig, SftConfig
from arriero.train.sft import main

NO_PROMPT = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
MINE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
MINE += "{% if add_generation_prompt %}<|im_start|>{% endif %}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ARRIERO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")  # three tokens are made sooner than the step is compiled


@pytest.fixture
def model(tmp_path) -> Path:
    tokenizer = small_byte_level()
    tokenizer.chat_template = ChatTemplate(NO_PROMPT, {}, {"rag": MINE})
    shape = LlamaConfig(22, 2, 11, 11, 29, tokenizer.vocab_size, 512, tied_embeddings=False)
    save_hf(Llama(shape).init_weights(seed=3), tmp_path / "model", tokenizer)
    return tmp_path / "model"


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    talks = [[{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": f"Yo {i}"}] for i in range(23)]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return path


def settings(model: Path, rows: Path, out: Path, **changes) -> SftConfig:
    loop = LoopConfig(steps=2, batch_rows=2, precision="fp32")
    return sft_settings(model, rows, out, **{"samples": 1, "loop": loop, **changes})


def run(*args: str | Path, code: int = 0) -> None:
    assert cli([str(arg) for arg in args]) == code


def test_a_run_with_another_template_saves_it_with_the_adapter_and_everything_uses_it(model, rows, tmp_path):
    with pytest.raises(
        DataError, match=r"row 1 of .*no generation prompt.*header '<\|im_start\|>assistant\\n' would be"
    ):
        main(settings(model, rows, tmp_path / "no"))
    (tmp_path / "mine.jinja").write_text(MINE)
    out = tmp_path / "run"
    main(settings(model, rows, out, chat_template=str(tmp_path / "mine.jinja")))
    adapter = out / "adapter"
    assert (adapter / "chat_template.jinja").read_text() == MINE
    assert load(model)[1].chat_template.source == NO_PROMPT
    assert load(model, adapter=adapter)[1].chat_template.source == MINE
    assert load(model, adapter=adapter, chat_template="chatml")[1].chat_template.source.startswith("{#- ChatML")
    merge(model, adapter, tmp_path / "merged")
    assert load(tmp_path / "merged")[1].chat_template.source == MINE
    merge(model, adapter, tmp_path / "merged", chat_template="chatml", force=True)
    assert load(tmp_path / "merged")[1].chat_template.source.startswith("{#- ChatML")
    assert load(tmp_path / "merged")[1].chat_template.others == {}


def test_full_training_saves_the_template_with_the_model(model, rows, tmp_path):
    main(settings(model, rows, tmp_path / "run", method="full", chat_template="rag"))
    assert load(tmp_path / "run" / "model")[1].chat_template.sources == {"default": MINE}


def test_a_run_is_not_resumed_with_another_template(model, rows, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(MINE)
    config = settings(model, rows, tmp_path / "run", chat_template=str(file))
    main(config)
    with pytest.raises(ConfigError, match=r"started with other settings \(chat_template\)"):
        main(replace(config, chat_template="chatml", resume=True))
    file.write_text(MINE + "{# other #}")
    with pytest.raises(DataError, match="the chat template has changed since run"):
        main(replace(config, resume=True))
    file.write_text(MINE)
    main(replace(config, resume=True))


def test_commands_take_a_template_by_name_or_file(model, rows, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.jinja").write_text(MINE)
    for template in ("chatml", "rag", tmp_path / "mine.jinja"):
        run("data", "inspect", rows, "--model", model, "--chat-template", template, "--rows", "1")
        run("generate", model, "Hi", "--chat-template", template, "--max-new-tokens", "3", "--precision", "fp32")
        run("eval", model, "--data", rows, "--chat-template", template, "--max-new-tokens", "3", "--precision", "fp32")
    run("convert", model, tmp_path / "chatml.gguf", "--to", "gguf", "--chat-template", "chatml")
    fields = read_metadata(tmp_path / "chatml.gguf")
    assert fields["tokenizer.chat_template"].startswith("{#- ChatML") and "tokenizer.chat_templates" not in fields
    run("convert", model, tmp_path / "own.gguf", "--to", "gguf")
    assert read_metadata(tmp_path / "own.gguf")["tokenizer.chat_template.rag"] == MINE
    run("plan", model, "--data", rows, "--chat-template", "chatml", "--steps", "1", "--samples", "0", "--seq-len", "64")
    capsys.readouterr()
    run("data", "inspect", rows, "--model", model, code=2)
    assert "no generation prompt" in capsys.readouterr().err
    run("generate", model, "Hi", "--chat-template", "chatlm", code=2)
    assert "did you mean 'chatml'?" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    run("chat", model, "--chat-template", "chatml", "--max-new-tokens", "3", "--precision", "fp32")
    assert "tokens" in capsys.readouterr().err


def test_a_template_that_could_not_be_used_is_refused(model, tmp_path):
    (tmp_path / "prose.txt").write_text("A llama is an animal.")
    with pytest.raises(ConfigError, match=r"texts are measured as they are; leave --chat-template out"):
        arriero.evaluate(model, tmp_path / "prose.txt", chat_template="chatml")
    with pytest.raises(ConfigError, match="chat_template is given with raw"):
        GenerateConfig(model=str(model), prompt="x", raw=True, chat_template="chatml")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    with pytest.raises(
        CheckpointError, match=r"a chat template is given \(chatml\), and there is no tokenizer to write"
    ):
        convert(model, tmp_path / "x.gguf", to="gguf", chat_template="chatml")


def test_an_end_that_is_not_special_stops_and_is_not_printed(model, capsys):
    state = json.loads((model / "tokenizer.json").read_text())
    for entry in state["added_tokens"]:
        entry["special"] = entry["content"] != "<|im_end|>"
    (model / "tokenizer.json").write_text(json.dumps(state))
    config = json.loads((model / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "special_tokens_map.json").write_text("{}")
    (model / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():  # a model that says token 2 for ever
        if "o_proj" in name or "down_proj" in name or name == "lm_head.weight":
            weight.zero_()
        if "embed_tokens" in name:
            weight[:] = 1.0
    weights["lm_head.weight"][2] = 1.0
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    network, tokenizer = load(model)
    assert tokenizer.special.words == {"<|im_end|>": 2}
    [answer] = arriero.generate(network, tokenizer, [[5, 6]], max_new_tokens=7)
    assert (answer.ids, answer.text, answer.stopped) == ([], "", True)
    run("generate", model, "Hi", "--chat-template", "chatml", "--max-new-tokens", "7", "--precision", "fp32")
    assert capsys.readouterr().out == "\n"


def test_raw_text_begins_as_the_tokenizer_begins(model, monkeypatch, capsys):
    import arriero.cli.chat as chat

    seen: list[list[int]] = []

    def stream(network, tokenizer, ids, *more):
        seen.append(ids)
        return iter([])

    monkeypatch.setattr(chat, "stream", stream)
    run("generate", model, "Hi", "--raw")
    tokenizer = load(model)[1]
    assert tokenizer.bos_id == 1 and seen == [tokenizer.encode("Hi")]
    state = json.loads((model / "tokenizer.json").read_text())
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (model / "tokenizer.json").write_text(json.dumps(state))
    run("generate", model, "Hi", "--raw")
    assert seen[1] == [1, *seen[0]]


def test_an_adapters_own_tokenizer_files_may_hold_its_template(model, rows, tmp_path):
    out = tmp_path / "run"
    main(settings(model, rows, out, chat_template="rag"))
    (out / "adapter" / "chat_template.jinja").unlink()
    assert load(model, adapter=out / "adapter")[1].chat_template.source == NO_PROMPT
    (out / "adapter" / "tokenizer_config.json").write_text(json.dumps({"chat_template": MINE}))
    assert load(model, adapter=out / "adapter")[1].chat_template.source == MINE
    (out / "adapter" / "tokenizer_config.json").write_text('{"chat_template": 7}')
    with pytest.raises(UserError, match="chat_template is 7; it must be a text"):
        load(model, adapter=out / "adapter")
