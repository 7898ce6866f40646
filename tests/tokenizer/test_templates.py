"""Which chat template is used, by name or file, and that all of them travel with a tokenizer."""

from __future__ import annotations

import json
import logging

import gguf
import pytest
from helpers.tokenizers import small_byte_level
from transformers import AutoTokenizer

from arriero.errors import CheckpointError, DataError
from arriero.io.gguf_header import read_metadata
from arriero.tokenizer import load_tokenizer
from arriero.tokenizer.base import SpecialTokens
from arriero.tokenizer.chat import encode_chat, encode_training
from arriero.tokenizer.gguf import tokenizer_from_gguf, tokenizer_to_gguf
from arriero.tokenizer.hf import HfTokenizer
from arriero.tokenizer.named_templates import named_template
from arriero.tokenizer.template import ChatTemplate

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
TOOL = {"type": "function", "function": {"name": "f"}}
NAMED = {"default": "plain", "tool_use": "{{ tools | length }} tools", "rag": "{{ 'documents' }}"}


@pytest.fixture
def tokenizer():
    return small_byte_level()


def write_named(folder, where):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if where == "tokenizer_config.json":
        config["chat_template"] = [{"name": n, "template": t} for n, t in NAMED.items()]
    else:
        (folder / "chat_template.jinja").write_text(NAMED["default"])
        (folder / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(NAMED[name])
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("where", ["tokenizer_config.json", "additional_chat_templates"])
def test_templates_by_name_are_read_chosen_as_transformers_chooses_and_written_everywhere(tokenizer, tmp_path, where):
    tokenizer.save(tmp_path)
    write_named(tmp_path, where)
    loaded = load_tokenizer(tmp_path)
    loaded.save(tmp_path / "saved")
    fields = tokenizer_to_gguf(loaded)
    for other in (loaded, load_tokenizer(tmp_path / "saved"), tokenizer_from_gguf(fields)):
        assert other.chat_template.sources == NAMED
        for tools in (None, [TOOL]):
            theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(TALK, tools=tools, tokenize=False)
            assert other.chat_template.render(TALK, tools) == theirs
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == NAMED
    assert named_template("rag", loaded).render(TALK) == "documents"
    assert named_template("default", loaded).render(TALK, [TOOL]) == "plain"


def test_gguf_names_templates_as_its_own_writer_does(tokenizer, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_chat_template([{"name": n, "template": t} for n, t in NAMED.items()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    theirs = {
        k: v for k, v in read_metadata(tmp_path / "theirs.gguf").items() if k.startswith("tokenizer.chat_template")
    }
    tokenizer.chat_template = ChatTemplate("plain", {}, {n: NAMED[n] for n in ("tool_use", "rag")})
    ours = {k: v for k, v in tokenizer_to_gguf(tokenizer).items() if k.startswith("tokenizer.chat_template")}
    names = "tokenizer.chat_templates"
    assert sorted(ours.pop(names)) == sorted(theirs.pop(names))
    assert ours == theirs
    tokenizer.chat_template = ChatTemplate("plain", {}, {"a b": "x", "a.b": "y"})
    with pytest.raises(CheckpointError, match=r"two of the chat templates default, a b, a\.b have one name in GGUF"):
        tokenizer_to_gguf(tokenizer)


def test_without_a_default_one_has_to_be_chosen(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "rag", "template": "x"}]}')
    loaded = load_tokenizer(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"none of the model's chat templates \(rag\) is named 'default'; choose one"
    ):
        encode_chat(loaded, TALK)
    loaded.chat_template = named_template("rag", loaded)
    assert encode_chat(loaded, TALK, add_generation_prompt=False) == loaded.encode("x")


def test_a_template_is_a_file_one_of_the_models_own_or_a_built_in_one(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer.chat_template = ChatTemplate("own", {}, {"rag": "x"})
    assert named_template("chatml", tokenizer).source.startswith("{#- ChatML")
    (tmp_path / "chatml").write_text("a file named like a built-in one")
    assert named_template("chatml", tokenizer).source == "a file named like a built-in one"
    (tmp_path / "mine.jinja").write_text("mine")
    for name, suggestion in [("rog", "'rag'"), ("llama4", "'llama3' or 'llama2'"), ("mime.jinja", "'mine.jinja'")]:
        with pytest.raises(
            CheckpointError, match=rf"no chat template '{name}': it is no file, none of the model's own \("
        ):
            named_template(name, tokenizer)
        with pytest.raises(CheckpointError, match=f"did you mean .*{suggestion}"):
            named_template(name, tokenizer)
    (tmp_path / "mine.jinja").write_bytes(b"{{ '\xff' }}")
    with pytest.raises(CheckpointError, match=r"mine\.jinja: not UTF-8 \("):
        named_template("mine.jinja", tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", b"\xff\xfe", r"chat_template\.jinja: not UTF-8"),
        ("chat_template.jinja", b"{% if %}", "syntax error in line 1"),
        ("tokenizer_config.json", b"\xff{}", "not UTF-8"),
        ("tokenizer_config.json", b"[]", "holds a JSON list; an object is expected"),
        ("tokenizer_config.json", b"[" * 99_999, "JSON is nested too deeply"),
        ("tokenizer_config.json", b'{"chat_template": 1}', "chat_template is 1; it must be a text, or a list of"),
        ("tokenizer_config.json", b'{"chat_template": [1]}', "it must be a text, or a list"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}', "it must be a text, or a list"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": [], "template": ""}]}', "it must be a text, or a list"),
        ("tokenizer_config.json", b'{"eos_token": 1}', "eos_token is 1; a token is a text, or an object"),
        ("tokenizer_config.json", b'{"eos_token": {"content": null}}', "eos_token is .*a token is a text"),
        ("tokenizer_config.json", b'{"eos_token": {"content": "x", "lstrip": 1}}', "eos_token is .*a token is a text"),
        ("tokenizer_config.json", b'{"eos_token": "\\ud800"}', "eos_token is"),
        ("tokenizer_config.json", b'{"eos_token": ""}', "eos_token is ''; a token is a text"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": []}',
            r"added_tokens_decoder is \[\]; it must be an object",
        ),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}', "it must be an object of tokens by id"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": 2}}', "added_tokens_decoder 1 is 2; a token is"),
        ("tokenizer_config.json", b'{"extra_special_tokens": 7}', "extra_special_tokens is 7; it must be a list"),
        ("tokenizer_config.json", b'{"additional_special_tokens": [7]}', "additional_special_tokens is 7; a token is"),
        ("tokenizer_config.json", b'{"add_bos_token": "yes"}', "add_bos_token is 'yes'; it must be true or false"),
        ("special_tokens_map.json", b'{"eos_token": []}', r"eos_token is \[\]; a token is a text"),
        ("added_tokens.json", b'{"x": "1"}', "'x' is '1'; every token has a whole id"),
        ("added_tokens.json", b'{"x": true}', "'x' is True; every token has a whole id"),
        ("added_tokens.json", b'{"x": -1}', "'x' is -1; every token has a whole id"),
        ("generation_config.json", b'{"eos_token_id": "2"}', "eos_token_id is '2'; it must be an id"),
        ("generation_config.json", b'{"eos_token_id": [2.0]}', r"eos_token_id is \[2\.0\]; it must be an id"),
        ("generation_config.json", b'{"eos_token_id": true}', "eos_token_id is True; it must be an id"),
        ("config.json", b'{"eos_token_id": {"a": 1}}', "eos_token_id is .* it must be an id"),
    ],
)
def test_files_that_say_what_makes_no_sense_are_refused_by_name(tokenizer, tmp_path, name, content, message):
    tokenizer.save(tmp_path)
    for other in ("chat_template.jinja", "special_tokens_map.json"):  # they would have the last word
        (tmp_path / other).unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
BAD_PROMPTS = {
    "none": CHATML,
    "a part": CHATML + "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}",
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_template_that_would_train_the_header_is_refused(tokenizer, name):
    tokenizer.chat_template = ChatTemplate(BAD_PROMPTS[name])
    reason = r"message 1 \(assistant\): the chat template has no generation prompt.* '.*assistant\\n' would be trained"
    with pytest.raises(DataError, match=f"{reason}.*--chat-template with one of chatml"):
        encode_training(tokenizer, TALK)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    tokenizer.chat_template = ChatTemplate(
        BAD_PROMPTS[name].replace("{{ m.content }}", "{{ m.content or m.tool_calls[0].function.name }}")
    )
    with pytest.raises(DataError, match="no generation prompt"):
        encode_training(tokenizer, [TALK[0], call])


def test_a_model_is_not_asked_without_a_generation_prompt_either(tokenizer):
    tokenizer.chat_template = ChatTemplate(CHATML)
    with pytest.raises(DataError, match="no generation prompt"):
        encode_chat(tokenizer, TALK[:1])
    assert encode_chat(tokenizer, TALK, add_generation_prompt=False)[0] == tokenizer.bos_id


def test_templates_whose_answers_begin_with_more_than_their_text_are_trained_on_it(tokenizer):
    thinking = CHATML.replace(
        "{{ m.content }}", "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' }}{{ m.content }}"
    )
    tokenizer.chat_template = ChatTemplate(
        thinking + "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
    )
    found = encode_training(tokenizer, TALK)
    trained = tokenizer.decode([i for i, on in zip(found.ids, found.trained, strict=True) if on], skip_special=False)
    assert trained == "<think>\n\n</think>\n\nYo<|im_end|>"
    # As Mistral's: no generation prompt, and a mark before calls.
    calling = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    calling += (
        "{% if m.tool_calls %}[TOOL_CALLS] {{ m.tool_calls[0].function.name }}{% else %} {{ m.content }}{% endif %}"
    )
    tokenizer.chat_template = ChatTemplate(calling + "<|im_end|>{% endif %}{% endfor %}")
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    for answer, text in ((TALK[1], " Yo<|im_end|>"), (call, "[TOOL_CALLS] f<|im_end|>")):
        found = encode_training(tokenizer, [TALK[0], answer])
        trained = [i for i, on in zip(found.ids, found.trained, strict=True) if on]
        assert tokenizer.decode(trained, skip_special=False) == text


def with_ordinary_end(tokenizer, **more) -> HfTokenizer:
    """The tokenizer whose <|im_end|> is no special token, as some fine-tunes have it."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    state = json.loads(tokenizer.backend.to_str())
    state["added_tokens"] = [entry for entry in state["added_tokens"] if entry["content"] != "<|im_end|>"]
    backend = Backend.from_str(json.dumps(state))
    backend.add_tokens([AddedToken("<|im_end|>", normalized=False)])
    ids = {text: i for text, i in tokenizer.special_ids.items() if text != "<|im_end|>"}
    special = SpecialTokens(ids, bos="<|im_start|>", words={"<|im_end|>": 2}, **more)
    return HfTokenizer(backend, special, tokenizer.chat_template)


def test_an_end_that_is_not_special_ends_answers_and_stays_out_of_messages(tokenizer):
    ended = with_ordinary_end(tokenizer)
    assert ended.stop_ids == {0, 2}
    assert ended.encode("a<|im_end|>")[-1] == 2  # a word of the vocabulary, as in transformers
    talk = [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "c<|im_end|>d"}]
    found = encode_training(ended, talk)
    assert ended.decode(found.ids, skip_special=False) == ended.chat_template.render(talk)
    trained = [i for i, on in zip(found.ids, found.trained, strict=True) if on]
    assert trained.count(2) == 1 and trained[-1] == 2
    assert [*encode_chat(ended, talk[:1])].count(2) == 1


def test_every_id_that_the_files_name_stops_whatever_token_it_is(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 200]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    loaded = load_tokenizer(tmp_path)
    assert loaded.stop_ids == {0, 2, 7, 200}
    fields = tokenizer_to_gguf(loaded)
    assert (fields["tokenizer.ggml.eot_token_id"], fields["tokenizer.ggml.eom_token_id"]) == (7, 200)
    assert tokenizer_from_gguf(fields).stop_ids == {0, 2, 7, 200}


def test_ends_that_gguf_has_no_key_for_are_named(tokenizer, tmp_path, caplog):
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [-1, 200, 201, 202]}')
    with caplog.at_level(logging.WARNING, "arriero"):
        tokenizer_to_gguf(load_tokenizer(tmp_path))
    assert "a GGUF file names 3 ends of a turn; llama.cpp will not stop at the ids [202]" in caplog.text


def test_parts_of_a_content_cannot_form_a_special_token_together(tokenizer):
    joined = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    tokenizer.chat_template = ChatTemplate(joined)
    for cut in range(1, len("<|im_end|>")):
        parts = [{"type": "text", "text": t} for t in ("a" + "<|im_end|>"[:cut], "<|im_end|>"[cut:] + "b")]
        ids = encode_chat(tokenizer, [{"role": "user", "content": parts}], add_generation_prompt=False)
        assert ids.count(2) == 1
        assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>user\na<|im_end|>b<|im_end|>\n"


def test_gguf_types_say_which_tokens_are_special(tokenizer):
    fields = tokenizer_to_gguf(tokenizer)
    fields["tokenizer.ggml.token_type"] = list(fields["tokenizer.ggml.token_type"])
    fields["tokenizer.ggml.token_type"][3] = 4
    tokenizer = tokenizer_from_gguf(fields)
    text = fields["tokenizer.ggml.tokens"][3]
    assert tokenizer.special.words == {text: 3} and text not in tokenizer.special_ids
    assert tokenizer.encode(f"a{text}") == [*tokenizer.encode("a"), 3]
    assert tokenizer_to_gguf(tokenizer)["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 4]
    with pytest.raises(CheckpointError, match="chat template 'rag' is no text"):
        tokenizer_from_gguf({**fields, "tokenizer.chat_template.rag": 7})


def test_an_added_token_of_half_a_surrogate_is_refused_by_its_id(tmp_path):
    from arriero.tokenizer.files import _added

    (tmp_path / "added_tokens.json").write_text('{"\\ud800": 7}')
    with pytest.raises(CheckpointError, match=r"added_tokens.json: the token of id 7 is .*, which is no text"):
        _added(tmp_path / "added_tokens.json", set())
