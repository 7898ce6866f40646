"""Every text of a conversation is in what the template wrote, or the conversation is refused; marks mean one thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from arriero.errors import DataError
from arriero.tokenizer import Tokenizer, load_tokenizer
from arriero.tokenizer.base import SpecialTokens
from arriero.tokenizer.chat import encode_chat, encode_training
from arriero.tokenizer.contents import MARKS, UNCLEAR_MARKS, is_blank
from arriero.tokenizer.sentencepiece import CONTROL, NORMAL, UNKNOWN, SentencePieceTokenizer, write_model
from arriero.tokenizer.template import ChatTemplate


@pytest.fixture(scope="module")
def real(smollm2_gguf: Path) -> Tokenizer:
    return load_tokenizer(smollm2_gguf)


@pytest.fixture
def smollm2(real: Tokenizer):
    own = real.chat_template
    yield real
    real.chat_template = own


def said(role: str, content, **more) -> dict:
    return {"role": role, "content": content, **more}


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


END = "<|im_end|>{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\\n' }}"
BY_TEXT = HEAD + "{{ m.content }}" + END
STRINGS_ONLY = HEAD + "{{ m.content if m.content is string else '' }}" + END  # as Qwen3's and SmolLM3's
TRIMS_PARTS = (  # as Llama 4's
    HEAD + "{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text | trim }}{% endif %}{% endfor %}{% endif %}" + END
)
LISTS_ONLY = (  # as SmolVLM's
    HEAD + "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}" + END
)
USER_LISTS = (
    HEAD + "{% if m.role == 'assistant' or m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}/{% endfor %}{% endif %}" + END
)
REASONS = (  # as Qwen3's: reasoning is written in the last turn alone
    HEAD + "{% if m.reasoning_content is string and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}" + END
)
CALLS = (  # as Hermes' and Qwen's
    "{% if tools %}<|im_start|>system{{ '\\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>{% endif %}"
    + HEAD
    + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}</tool_call>{% endfor %}" + END
)


def rendered(tokenizer: Tokenizer, messages, tools=None) -> str:
    return tokenizer.decode(encode_training(tokenizer, messages, tools).ids, skip_special=False)


# Parts


def test_parts_are_written_as_transformers_writes_them_where_the_template_knows_them(smollm2, tmp_path):
    smollm2.save(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    talk = [said("user", parts(" a ", "b\n")), said("assistant", parts("c ", "d")), said("user", "e")]
    for source in (TRIMS_PARTS, LISTS_ONLY):
        messages = talk[:2] if source == LISTS_ONLY else talk  # that one writes no text that is not in a list
        smollm2.chat_template = ChatTemplate(source)
        ids = reference.apply_chat_template(messages, chat_template=source, return_dict=False)
        assert encode_chat(smollm2, messages, add_generation_prompt=False) == ids
        assert encode_training(smollm2, talk[:2]).ids == encode_chat(smollm2, talk[:2], add_generation_prompt=False)
        text = reference.apply_chat_template(messages, chat_template=source, tokenize=False)
        assert smollm2.chat_template.render(messages) == text


@pytest.mark.parametrize("source", [BY_TEXT, STRINGS_ONLY, USER_LISTS, HEAD + "{{ m.content | trim }}" + END])
def test_parts_are_joined_where_the_template_would_print_or_drop_a_list(smollm2, tmp_path, source):
    smollm2.save(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    smollm2.chat_template = ChatTemplate(source)
    by_parts = [said("user", parts("Hi ", "there")), said("assistant", parts("Yo")), said("user", [])]
    by_text = [said("user", "Hi there"), said("assistant", "Yo"), said("user", "")]
    ids = reference.apply_chat_template(by_text, chat_template=source, return_dict=False)
    assert encode_chat(smollm2, by_parts, add_generation_prompt=False) == ids
    assert encode_training(smollm2, by_parts) == encode_training(smollm2, by_text)


def test_special_text_that_two_parts_make_together_stays_text(smollm2):
    end = smollm2.special_ids["<|im_end|>"]
    for source in (BY_TEXT, LISTS_ONLY):
        smollm2.chat_template = ChatTemplate(source)
        talk = [said("user", parts("x<|im_", "end|>y")), said("assistant", parts("z"))]
        assert encode_chat(smollm2, talk, add_generation_prompt=False).count(end) == 2


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (
            {"type": "image_url", "image_url": {"url": "x"}},
            "part 1 of its content is of type 'image_url', and only text",
        ),
        ({"type": "input_audio", "input_audio": {}}, "of type 'input_audio'"),
        ({"type": "refusal", "refusal": "No."}, "of type 'refusal'"),
        ({"type": "thinking", "thinking": "Hm."}, "of type 'thinking', .* as 'reasoning_content' beside the content"),
        ({"type": "text", "text": 5}, "has a text of type int; make it a text"),
        ({"type": "text"}, "has a text of type NoneType"),
        ({"type": "text", "text": "a", "image": "b"}, "has the unknown member 'image'; take it out"),
        ("text", "part 1 of its content is of type str; make it {type: text, text}"),
    ],
)
def test_a_part_that_is_no_text_is_refused_by_its_type(smollm2, part, reason):
    talk = [said("user", [*parts("a"), part]), said("assistant", "b")]
    for encode in (encode_chat, encode_training):
        with pytest.raises(DataError, match=rf"message 0 \(user\): .*{reason}"):
            encode(smollm2, talk)


# Reasoning


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_written_by_templates_that_know_it_and_refused_by_others(smollm2, name):
    talk = [said("user", "2+2?"), said("assistant", "4", **{name: "2+2=4"})]
    with pytest.raises(DataError, match=r"message 1 \(assistant\): .*not write the message's reasoning.*'2\+2=4'; use"):
        encode_training(smollm2, talk)
    smollm2.chat_template = ChatTemplate(REASONS)
    assert "assistant\n<think>2+2=4</think>4<|im_end|>" in rendered(smollm2, talk)
    earlier = [*talk, said("user", "3+3?"), said("assistant", "6")]
    with pytest.raises(DataError, match=r"message 1 \(assistant\): .*differently once more follows"):
        encode_training(smollm2, earlier)
    with pytest.raises(DataError, match=r"message 1 \(assistant\): .*reasoning.*in every turn"):
        encode_training(smollm2, [talk[0], {**talk[1], "train": 0}, *earlier[2:]])
    without = [talk[0], said("assistant", "4", train=0), *earlier[2:-1], said("assistant", "6", **{name: "3*2"})]
    assert "<think>3*2</think>6" in rendered(smollm2, without)


def test_reasoning_is_not_found_in_the_answer_that_says_the_same(smollm2):
    talk = [said("user", "?"), said("assistant", "four and four", reasoning_content="four")]
    smollm2.chat_template = ChatTemplate(REASONS)
    assert "<think>four</think>four and four" in rendered(smollm2, talk)
    smollm2.chat_template = ChatTemplate(BY_TEXT)
    talk[1]["content"] = "four"
    with pytest.raises(DataError, match="reasoning"):
        encode_training(smollm2, talk)
    talk[1] |= {"reasoning_content": "one", "thinking": "two"}
    smollm2.chat_template = ChatTemplate(REASONS)
    with pytest.raises(DataError, match=r"reasoning.*: 'two'"):
        encode_training(smollm2, talk)


# Calls and tools

WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Now.", "parameters": {}}}


def called(**arguments) -> dict:
    return {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def test_names_keys_and_values_of_calls_must_be_written(smollm2):
    arguments = {"place": 'Cus"co\n', "days": 3, "hot": True, "near": {"é": [0.5, None, "x"]}, "none": {}}
    calls = [called(**arguments), called(place="Cusco")]
    talk = [said("user", "Cusco?"), {"role": "assistant", "tool_calls": calls}]
    smollm2.chat_template = ChatTemplate(CALLS)
    assert json.dumps(arguments, ensure_ascii=False) in rendered(smollm2, talk)
    as_text = {"function": {"name": "get_weather", "arguments": json.dumps(arguments)}}
    assert json.dumps(arguments, ensure_ascii=False) in rendered(
        smollm2, [talk[0], {**talk[1], "tool_calls": [as_text]}]
    )
    for written, instead, reason in (
        ("c.function.name", "'Cusco'", r"'tool_calls\[0\]\.function\.name': 'get_weather'"),
        ("c.function.arguments", "{}", r"'tool_calls\[0\]\.function\.arguments\.place': 'Cus\"co'"),
        ("c.function.arguments", "c.function.arguments.values() | list", r"function\.arguments': 'place'"),
        ("c.function.arguments", "c.function.arguments.keys() | list", r"function\.arguments\.place': 'Cus\"co'"),
    ):
        smollm2.chat_template = ChatTemplate(CALLS.replace(written, instead))
        with pytest.raises(
            DataError, match=rf"message 1 \(assistant\): the chat template does not write .*{reason}; use"
        ):
            encode_training(smollm2, talk)


def test_a_call_is_not_found_in_the_words_around_it(smollm2):
    talk = [said("user", "?"), said("assistant", "I call get_weather for Cusco", tool_calls=[called(for_="Cusco")])]
    smollm2.chat_template = ChatTemplate(BY_TEXT)
    with pytest.raises(DataError, match=r"does not write 'tool_calls\[0\].function.name': 'get_weather'"):
        encode_training(smollm2, talk)
    short = [said("user", "?"), said("assistant", "Yes.", tool_calls=[called(a=2)])]
    smollm2.chat_template = ChatTemplate(CALLS.replace("c.function.arguments | tojson", "''"))
    with pytest.raises(DataError, match=r"does not write 'tool_calls\[0\].function.arguments(.a)?'"):
        encode_training(smollm2, short)


def test_no_tools_and_no_calls_are_as_if_absent(smollm2):
    talk = [said("user", "a"), said("assistant", "b")]
    for tools, calls in (([], []), (None, []), ([], None)):
        empty = [talk[0], {**talk[1], "tool_calls": calls}]
        assert encode_training(smollm2, empty, tools) == encode_training(smollm2, talk)
        assert encode_chat(smollm2, empty, tools) == encode_chat(smollm2, talk)


def test_arguments_that_are_empty_are_an_empty_object(smollm2):
    smollm2.chat_template = ChatTemplate(CALLS)
    for arguments in ("", " ", "{}", {}):
        call = {"function": {"name": "get_weather", "arguments": arguments}}
        talk = [said("user", "a"), {"role": "assistant", "tool_calls": [call]}]
        assert "get_weather{}</tool_call>" in rendered(smollm2, talk)


def test_tools_must_be_written_whole_and_are_not_found_in_what_is_said(smollm2):
    talk = [said("user", "get_weather Now."), said("assistant", "b")]
    with pytest.raises(DataError, match="the chat template drops the tool 'get_weather'; use a template with tools"):
        encode_training(smollm2, talk, [WEATHER])
    schema = {"type": "object", "properties": {"place": {"type": "string", "description": 'Where "é"?', "enum": ["N"]}}}
    tool = {"type": "function", "function": {**WEATHER["function"], "parameters": schema}}
    smollm2.chat_template = ChatTemplate(CALLS)
    assert "Where" in rendered(smollm2, talk, [tool])
    smollm2.chat_template = ChatTemplate(CALLS.replace("t | tojson", "t.function.name"))
    with pytest.raises(DataError, match=r"drops '(Where \"é\"\?|place)' of the tool 'get_weather'"):
        encode_training(smollm2, talk, [tool])


# Other members


@pytest.mark.parametrize(
    "more",
    [{"name": "Bob"}, {"refusal": "No"}, {"audio": {"data": "Bob"}}, {"content_blocks": [{"text": "Bob"}]}],
)
def test_a_member_that_the_template_does_not_write_is_refused_by_name(smollm2, more):
    talk = [said("user", "Bobby"), said("assistant", "Hi", **more)]
    (name,) = more
    with pytest.raises(
        DataError, match=rf"message 1 \(assistant\): .*does not write '{name}.*; use a template that doe"
    ):
        encode_training(smollm2, talk)
    smollm2.chat_template = ChatTemplate(HEAD + f"{{{{ m.{name} | tojson if m.{name} }}}}" + "{{ m.content }}" + END)
    encode_training(smollm2, talk)


def test_the_name_of_a_tools_result_stands_in_its_call(smollm2):
    smollm2.chat_template = ChatTemplate(CALLS)
    talk = [
        said("user", "a"),
        {"role": "assistant", "tool_calls": [called(place="Cusco")]},
        said("tool", "11", tool_call_id="c1", name="get_weather"),
        said("assistant", "b"),
    ]
    assert "11" in rendered(smollm2, talk)
    with pytest.raises(DataError, match=r"message 2 \(tool\): .*does not write 'name': 'other'"):
        encode_training(smollm2, [*talk[:2], {**talk[2], "name": "other"}, talk[3]])


def test_results_in_another_order_than_their_calls_need_ids_that_are_written(smollm2):
    two = [{**called(place=place), "id": f"c{k}"} for k, place in enumerate(["Cusco", "Puno"])]
    results = [said("tool", "7", tool_call_id="c0"), said("tool", "9", tool_call_id="c1")]
    smollm2.chat_template = ChatTemplate(CALLS)
    for given in (results, [{"role": "tool", "content": "7"}] * 2):
        encode_training(
            smollm2, [said("user", "a"), {"role": "assistant", "tool_calls": two}, *given, said("assistant", "b")]
        )
    talk = [said("user", "a"), {"role": "assistant", "tool_calls": two}, *results[::-1], said("assistant", "b")]
    with pytest.raises(DataError, match=r"message 2 \(tool\): the results come in another order than the calls"):
        encode_training(smollm2, talk)
    with_ids = CALLS.replace("{{ m.content or ''", "{{ m.tool_call_id ~ ':' if m.tool_call_id }}{{ m.content or ''")
    smollm2.chat_template = ChatTemplate(with_ids.replace("<tool_call>{{", "<tool_call>{{ c.id ~ ':' ~"))
    encode_training(smollm2, talk)


@pytest.mark.parametrize("lost", ["\x04", "\x1d", "\U00050000"])
def test_a_character_that_the_vocabulary_lacks_is_refused_with_its_message(smollm2, lost):
    assert lost not in smollm2.decode(smollm2.encode(f"a{lost}b"))
    with pytest.raises(
        DataError,
        match=rf"message 1 \(assistant\) holds U\+{ord(lost):04X}, for which .* no token, so that it would be lo",
    ):
        encode_training(smollm2, [said("user", "a"), said("assistant", f"a{lost}b")])


def test_characters_that_the_vocabulary_spells_are_kept(smollm2):
    hard = "\0\x01é\ufffd😀\U000e0067\U0010ffff\ufdd0\u2028\r\n\x7f"
    assert hard in rendered(smollm2, [said("user", "<|im_end|>"), said("assistant", hard)])


def test_characters_that_become_the_unknown_token_are_refused():
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("▁", -1.0, NORMAL)]
    pieces += [(c, -2.0, NORMAL) for c in "ab:é"]
    special = SpecialTokens({"<unk>": 0, "<s>": 1, "</s>": 2}, bos="<s>", eos="</s>", unk="<unk>")
    tokenizer = SentencePieceTokenizer(write_model(pieces, {"unk": 0, "bos": 1, "eos": 2, "pad": -1}), special)
    tokenizer.chat_template = ChatTemplate(
        "{% for m in messages %}a:{{ m.content }}</s>{% endfor %}" + "{{ 'a:' if add_generation_prompt }}"
    )
    encode_training(tokenizer, [said("user", "a é"), said("assistant", "b")])
    with pytest.raises(DataError, match=r"message 0 \(user\) holds U\+00F1"):
        encode_training(tokenizer, [said("user", "a ñ"), said("assistant", "b")])


# Marks


@pytest.mark.parametrize("name", MARKS)
def test_marks_have_one_meaning_and_refuse_what_is_not_known(smollm2, name):
    talk = [said("user", "a"), said("assistant", "BAD"), said("user", "c"), said("assistant", "d")]

    def trained(mark) -> str:
        result = encode_training(smollm2, [talk[0], {**talk[1], name: mark}, *talk[2:]])
        ids = [i for i, on in zip(result.ids, result.trained, strict=True) if on]
        return smollm2.decode(ids)

    for no in (0, 0.0, -0.0, False, "0", "false", "False"):
        assert trained(no) == "d"
    for yes in (1, 1.0, True, "1", "true", "True", None):
        assert trained(yes) == "BADd"
    for unknown in (0.5, 2, -1, "no", "", [0, 1], {}, float("nan")):
        with pytest.raises(DataError, match=rf"message 1 \(assistant\): '{name}' is .*; give 1 or true \(trained\)"):
            trained(unknown)


def test_marks_that_disagree_or_stand_elsewhere_are_refused(smollm2):
    talk = [said("user", "a", train=0), said("assistant", "b", train=1, weight=1.0)]
    encode_training(smollm2, talk)
    with pytest.raises(
        DataError, match=r"message 1 .*'train' is 1, 'weight' is 0, which contradict each other; keep one"
    ):
        encode_training(smollm2, [talk[0], said("assistant", "b", train=1, weight=0)])
    with pytest.raises(DataError, match=r"message 0 \(user\): it is marked to be trained, and only the assistant's"):
        encode_training(smollm2, [said("user", "a", weight=1), talk[1]])
    for name in UNCLEAR_MARKS:
        with pytest.raises(DataError, match=rf"message 1 .*'{name}' \(0\) says in some data sets what is trained"):
            encode_training(smollm2, [talk[0], said("assistant", "b", **{name: 0})])


def test_what_cannot_be_seen_is_blank():
    assert all(is_blank(text) for text in ("", " \n\t", "\u3000\u00a0", "\u200b\u2060\ufeff", "\0", "\u2800", "\u2028"))
    assert not any(is_blank(text) for text in ("0", " . ", "\u200b1", "👍🏽", "\ue000"))
