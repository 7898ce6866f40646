"""What rows say beside question and answer: used, refused by name, or told of once; nothing is lost in silence."""

import io
import json
import logging
import math
import random

import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers.rows import read_conversations
from rich.console import Console

from arriero.data.inspect import inspect
from arriero.data.sft import build_dataset
from arriero.data.sft_cache import encode_conversation
from arriero.errors import DataError
from arriero.show.terminal import warn_once
from arriero.tokenizer.template import ChatTemplate

from .conftest import turns, write_rows

TALK = turns("Hi", "Yo")
TURNS = turns("a", "b", "c", "d")
SYSTEM = {"role": "system", "content": "Be brief"}


@pytest.fixture(autouse=True)
def said_anew():
    warn_once.cache_clear()


def read(tmp_path, row):
    [conversation] = read_conversations(write_rows(tmp_path / "r.jsonl", [row]))
    return conversation


USED = {
    "a system column beside messages": ({"messages": TALK, "system": "Be brief"}, [SYSTEM, *TALK]),
    "beside conversations": ({"conversations": TALK, "system_prompt": "Be brief"}, [SYSTEM, *TALK]),
    "beside a pair": ({"prompt": "Hi", "completion": "Yo", "system_message": "Be brief"}, [SYSTEM, *TALK]),
    "the same system twice": ({"messages": [SYSTEM, *TALK], "system": "Be brief"}, [SYSTEM, *TALK]),
    "a blank system": ({"messages": TALK, "system": " "}, TALK),
    "history before an instruction": (
        {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "Be brief"},
        [SYSTEM, *turns("a", "b", "c", "d")],
    ),
    "history before a pair, as JSON text": (
        {"prompt": "c", "response": "d", "history": '[["a", 0]]'},
        turns("a", "0", "c", "d"),
    ),
    "no history": ({"instruction": "Hi", "output": "Yo", "history": []}, TALK),
    "no history, as text": ({"question": "Hi", "answer": "Yo", "history": "[]"}, TALK),
    "Dolly's context": (
        {"instruction": "Who?", "context": "A llama.", "response": "It"},
        turns("Who?\n\nA llama.", "It"),
    ),
    "an empty context": ({"instruction": "Hi", "context": "", "response": "Yo"}, TALK),
    "an input that is JSON": ({"instruction": "Sort", "input": "[]", "output": "null"}, turns("Sort\n\n[]", "null")),
    "answers in a prompt, which are given": (
        {"prompt": [TURNS[0], {**TURNS[1], "train": None}, TURNS[2]], "completion": TURNS[3:]},
        [TURNS[0], {**TURNS[1], "train": 0}, *TURNS[2:]],
    ),
    "answers in a prompt that are marked": (
        {"prompt": [TURNS[0], {**TURNS[1], "weight": 1}, TURNS[2]], "completion": "d"},
        [TURNS[0], {**TURNS[1], "weight": 1}, *TURNS[2:]],
    ),
    "an id that is a number": (
        {"messages": [TALK[0], {"role": "tool", "content": "x", "tool_call_id": 7}, TALK[1]]},
        [TALK[0], {"role": "tool", "content": "x", "tool_call_id": 7}, TALK[1]],
    ),
    "zeros": ({"instruction": 0, "input": 0, "output": 0}, turns("0\n\n0", "0")),
    "numbers": ({"question": 12, "answer": -0.5}, turns("12", "-0.5")),
    "NaN for an empty cell": ({"instruction": "Sum", "input": math.nan, "output": "1"}, turns("Sum", "1")),
    "NaN and null everywhere": (
        {
            "instruction": "Hi",
            "output": "Yo",
            "system": math.nan,
            "tools": math.nan,
            "history": None,
            "train": math.nan,
        },
        TALK,
    ),
    "NaN in a message": ({"messages": [TALK[0], {**TALK[1], "weight": math.nan, "name": None}]}, TALK),
    "prompt messages as JSON text": ({"prompt": json.dumps([SYSTEM, TALK[0]]), "completion": "Yo"}, [SYSTEM, *TALK]),
    "JSON that is no message": ({"prompt": '[{"a": 1}]', "completion": "Yo"}, turns('[{"a": 1}]', "Yo")),
    "a prompt that the messages hold": ({"messages": TALK, "prompt": "Hi"}, TALK),
    "completion messages that the messages hold": ({"messages": TALK, "completion": TALK[1:]}, TALK),
    "marks of the row": ({"messages": TALK, "weight": 1, "train": "true"}, TALK),
    "a text with U+0000": ({"prompt": "a\0b", "completion": "c"}, turns("a\0b", "c")),
}


@pytest.mark.parametrize("name", USED)
def test_what_stands_beside_the_talk_is_used(tmp_path, name):
    row, expected = USED[name]
    conversation = read(tmp_path, row)
    assert conversation.messages == expected and conversation.tools is None


EMPTY = ["", " ", "[]", "{}", "null", [], {}, None, math.nan]


@pytest.mark.parametrize("empty", EMPTY, ids=repr)
def test_no_tools_and_no_calls_are_as_if_absent(tmp_path, empty):
    row = {"messages": [TALK[0], {**TALK[1], "tool_calls": empty}], "tools": empty, "functions": empty}
    conversation = read(tmp_path, row)
    assert conversation.messages == TALK and conversation.tools is None and not conversation.unused


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
ANSWERED = {"prompt": "Hi", "completion": "Yo"}
INSTRUCTED = {"instruction": "Hi", "output": "Yo"}


def calls(*entries):
    return {"messages": [TALK[0], {"role": "assistant", "tool_calls": list(entries)}]}


def last(**more):
    return {"messages": [TALK[0], {**TALK[1], **more}]}


REFUSED = {
    "another system": (
        {"messages": [{**SYSTEM, "content": "x"}, *TALK], "system": "y"},
        "'system' stands beside a first",
    ),
    "two systems": ({**ANSWERED, "system": "a", "system_prompt": "b"}, "'system' and 'system_prompt' differ; keep one"),
    "a system that is a list": ({**ANSWERED, "system": ["a"]}, r"'system' is of type list .*; make it a text"),
    "history beside messages": (
        {"messages": TALK, "history": [["a", "b"]]},
        "'history' stands beside 'messages', and w",
    ),
    "history that is no pairs": (
        {**INSTRUCTED, "history": ["a"]},
        r"'history' is no list of \[question, answer\] pairs",
    ),
    "a blank answer in history": (
        {**INSTRUCTED, "history": [["a", " "]]},
        r"message 1 \(assistant\): it is an empty ans",
    ),
    "context beside messages": ({"messages": TALK, "context": "x"}, "'context' stands beside 'messages'"),
    "context beside a question": (
        {"question": "a", "answer": "b", "context": "x"},
        "'context' stands beside 'question'",
    ),
    "input beside conversations": ({"conversations": TALK, "input": "x"}, "'input' stands beside 'conversations'"),
    "input and context": ({**INSTRUCTED, "input": "x", "context": "y"}, "'context' stands beside 'instruction'"),
    "two layouts": ({"messages": TALK, "prompt": "other"}, "'prompt' stands beside 'messages', and would be lost; put"),
    "two talks": ({"messages": TALK, "conversations": turns("a", "b")}, "'conversations' stands beside 'messages'"),
    "two answers": ({**ANSWERED, "response": "other"}, "'response' stands beside 'prompt'"),
    "reasoning in a column": ({**ANSWERED, "reasoning": "because"}, "'reasoning' stands beside 'prompt'"),
    "thoughts beside a response": ({"prompt": "a", "response": "b", "cot": "c"}, "'cot' stands beside 'prompt'"),
    "choices": ({"question": "a", "choices": ["x"], "answer": 0}, "'choices' stands beside 'question'"),
    "images": ({**ANSWERED, "images": ["x.png"]}, "'images' stands beside 'prompt'"),
    "preferences": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "'chosen' and 'rejected' are preferences, .*; keep",
    ),
    "preferences beside messages": ({"messages": TALK, "chosen": "b"}, "'chosen' and 'rejected' are preferences"),
    "a judged answer": ({**ANSWERED, "label": False}, "'label' says whether the answer is good"),
    "a text alone": ({"text": "Once"}, "no known layout .*; a 'text' alone is for pretraining: arriero shard"),
    "functions": (
        {"messages": TALK, "functions": [{"name": "f"}]},
        "'functions' is the older form of tools; rename it",
    ),
    "a layout in capitals": ({"Messages": TALK}, "no known layout .*; did you mean 'messages' by 'Messages'"),
    "spaces in names": (
        {"prompt ": "a", " completion": "b"},
        "did you mean 'prompt' by 'prompt ', 'completion' by ' comp",
    ),
    "a system in capitals": ({**ANSWERED, "System": "x"}, "the column 'System' is not known; did you mean 'system'"),
    "an answer that is null": ({"prompt": "a", "completion": None}, "'completion' is null or NaN here: drop the row"),
    "an answer that is NaN": (
        {"prompt": "a", "completion": math.nan},
        "'completion' is null or NaN here: drop the row",
    ),
    "semicolons between columns": ({"prompt;completion": "a;b"}, "columns are divided by ',' .* and here by ';'"),
    "instructions": ({**ANSWERED, "instructions": "Be brief"}, "'instructions' stands beside 'prompt', and would be"),
    "an empty prompt": ({"prompt": " ", "completion": "b"}, "'prompt' is empty, so there is nothing to answer"),
    "an empty instruction": ({"instruction": "", "input": "\n", "output": "b"}, "'instruction' is empty"),
    "false for an answer": ({"question": "a", "answer": False}, "'answer' is false; write the word that it stands for"),
    "infinity": ({"question": "a", "answer": math.inf}, r"'answer' is of type float \(inf\)"),
    "an answer that is a list": (
        {"instruction": "a", "output": ["b"]},
        r"'output' is of type list \(\['b'\]\); make it",
    ),
    "Python's lists": (
        {"messages": "[{'role': 'user'}]"},
        "not JSON .*; it looks as Python prints a list: write it by",
    ),
    "tools by name": (
        {"messages": TALK, "tools": ["add"]},
        "tool 0 has no name; write it as {type: function, function:",
    ),
    "one tool": ({"messages": TALK, "tools": CALL}, "'tools' is of type dict; make it a list"),
    "tools of broken text": ({"messages": TALK, "tools": "add"}, "'tools' is a text that is not JSON"),
    "a call without a name": (
        calls({"function": {"arguments": {}}}),
        r"message 1 \(assistant\): tool call 0 names no fun",
    ),
    "another kind of call": (calls(CALL | {"type": "custom"}), "tool call 0 names no function"),
    "a call of broken arguments": (
        calls({"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}),
        "the arguments of its call of 'f' are not JSON .*an object has the key 'a' twice",
    ),
    "a call of an infinite number": (
        calls({"function": {"name": "f", "arguments": '{"a": 1e400}'}}),
        "the arguments of its call of 'f' are not JSON .*Out of range",
    ),
    "a call of a list": (
        calls({"function": {"name": "f", "arguments": "[1]"}}),
        "'f' are of type list; make them an obj",
    ),
    "the older form of a call": (
        {"messages": [TALK[0], {"role": "assistant", "content": None, "function_call": CALL["function"]}]},
        "it has a function_call, the older form; write it as tool_calls",
    ),
    "a user's call": (
        {"messages": [{**TALK[0], "tool_calls": [CALL]}, TALK[1]]},
        r"message 0 \(user\): it has tool_calls",
    ),
    "an id without a call": (
        {
            "messages": [
                *calls(CALL | {"id": "1"})["messages"],
                {"role": "tool", "content": "2", "tool_call_id": "7"},
                TALK[1],
            ]
        },
        r"message 2 \(tool\) has the tool_call_id '7', which no call before it has",
    ),
    "a result that is an object": (
        {"messages": [TALK[0], {"role": "tool", "content": {"t": 1}}, TALK[1]]},
        r"message 1 \(tool\): it has content of type dict; write it as JSON text",
    ),
    "an image": (
        last(content=[{"type": "image_url", "image_url": "x"}]),
        "part 0 of its content is of type 'image_url'",
    ),
    "an answer of spaces": (last(content=" \n"), "it is an empty answer; nothing to learn; write it or drop the row"),
    "an answer of parts of spaces": (last(content=[{"type": "text", "text": " "}]), "it is an empty answer"),
    "an answer of nothing to see": (last(content="\u200b"), "it is an empty answer"),
    "an empty context answer": ({"messages": [TALK[0], {**TALK[1], "content": "", "train": 0}, *TALK]}, "empty answer"),
    "a role in capitals": ({"messages": [{**TALK[0], "role": "User"}]}, "unknown role 'User'; .*; did you mean 'user'"),
    "a role of ShareGPT": ({"messages": [{**TALK[0], "role": "human"}]}, "unknown role 'human'.*did you mean 'user'"),
    "a call as a role": (
        {"conversations": [{"from": "function_call", "value": "{}"}]},
        "unknown role 'function_call'.*write a call as tool_calls of the assistant's message",
    ),
    "parts as JSON text": (
        last(content=json.dumps([{"type": "text", "text": "x"}])),
        "its content is a text of a list of",
    ),
    "parts as Python prints them": (
        last(content=str([{"type": "text", "text": "x"}])),
        "its content is a text of a list o",
    ),
    "a name that is nearly one": ({"conversation": TALK}, "did you mean 'conversations' by 'conversation'"),
    "a number for a role": ({"messages": [{**TALK[0], "role": 0}]}, "message 0 has the unknown role 0; use one of"),
    "a member in capitals": (
        {"messages": [{"Role": "user", "content": "x"}]},
        "role None; .*did you mean 'role' by 'Role'",
    ),
    "content in capitals": (last(Content="x"), "it has the unknown member 'Content'; did you mean 'content'"),
    "both names of a text": (
        {"conversations": [{"from": "human", "value": "a", "content": "b"}]},
        "message 0 has both 'value' and 'content'; keep one",
    ),
    "reasoning that is a list": (last(reasoning=["a"]), "its 'reasoning' is of type list; make it a text"),
    "a fraction of a weight": (last(weight=0.5), r"message 1 \(assistant\): 'weight' is 0.5; give 1 or true"),
    "a mask": (last(mask=0), r"'mask' \(0\) says in some data sets what is trained"),
    "a fraction for the row": ({"messages": TALK, "loss": 2.31}, "'loss' is 2.31; give 1 or true"),
    "a mask of the row": ({"conversations": TALK, "mask": "User"}, r"'mask' \('User'\) says in some data sets"),
    "a row not to be trained": ({"messages": TALK, "train": 0}, "nothing to learn: the row itself is marked not to be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_with_its_name(tmp_path, name):
    row, message = REFUSED[name]
    write_rows(tmp_path / "r.jsonl", [{"messages": TALK}, row])
    with pytest.raises(DataError, match=rf"^row 2 of {tmp_path}/r\.jsonl: .*{message}") as found:
        list(read_conversations(tmp_path / "r.jsonl"))
    assert str(found.value).count("row 2 of") == 1


def test_cells_of_tables_are_texts_numbers_and_lists(tmp_path):
    columns = {"instruction": ["a", "b"], "input": [None, 7.0], "output": [0, 4], "history": [[], [["c", "d"]]]}
    pa.parquet.write_table(pa.table(columns), tmp_path / "r.parquet")
    assert [c.messages for c in read_conversations(tmp_path / "r.parquet")] == [
        turns("a", "0"),
        turns("c", "d", "b\n\n7.0", "4"),
    ]
    text = 'instruction,input,output,train,tools\r\n"a\r\nb",,"c\r\n",1,[]\r\nd,0,0,True,\r\n'
    (tmp_path / "r.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [c.messages for c in read_conversations(tmp_path / "r.csv")] == [
        turns("a\r\nb", "c\r\n"),
        turns("d\n\n0", "0"),
    ]


def test_a_member_that_is_nested_without_end_is_refused(tmp_path, tokenizer):
    deep = "[" * 900 + "]" * 900
    (tmp_path / "r.jsonl").write_text(json.dumps({"messages": TALK}).replace('"Yo"', f'"Yo", "notes": {deep}'))
    with pytest.raises(DataError, match=r"row 1 of .*(nested too deeply|does not write)"):
        build_dataset(tmp_path / "r.jsonl", tokenizer)


# What is not used


def test_columns_that_are_not_used_are_told_of_once_a_file_and_again_from_the_cache(tmp_path, tokenizer, caplog):
    rows = [{"messages": turns(f"q{i}", "a"), "id": i, "source": "web", "score": None, "note": ""} for i in range(9)]
    rows[5]["messages"][1] |= {"timestamp": "now", "likes": 3}
    rows[5]["split"] = "train"
    path = write_rows(tmp_path / "r.jsonl", rows)
    names = "'id', 'likes' (in its messages), 'source', 'split', 'timestamp' (in its messages)"
    expected = f"columns {names} of {path} are not used"
    for _ in range(2):
        build_dataset(path, tokenizer)
        assert caplog.messages == [expected]
    warn_once.cache_clear()
    list(read_conversations(path))
    build_dataset(path, tokenizer)  # from the cache
    assert caplog.messages == [expected] * 2
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_many_unused_columns_are_counted(tmp_path, caplog):
    read(tmp_path, {"messages": TALK} | {f"c{i:03}": i for i in range(97)})
    assert "'c018', 'c019' and 77 more of" in caplog.text


def test_inspect_shows_the_row_as_training_sees_it_and_says_what_is_not_used(tmp_path, tokenizer, caplog):
    said = io.StringIO()
    row = {"system": "Be brief", "messages": TALK, "id": 1}
    inspect(write_rows(tmp_path / "r.jsonl", [row]), tokenizer, console=Console(file=said, width=150))
    assert "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi<|im_end|>" in said.getvalue()
    assert "columns 'id' of" in caplog.text


# Random rows

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
KNOWS_MORE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    + HEAD.replace("\n{{", "\n<think>{{ m.reasoning_content or '' }}</think>{{")
    + "{% for c in m.tool_calls or [] %}{{ c.function.name ~ (c.function.arguments | tojson) }}{% endfor %}"
    + "{{ m.name or '' }}"
    + END
)


class Words:
    """Texts that each occur nowhere else."""

    def __init__(self, seed: int) -> None:
        self.rng, self.given = random.Random(seed), []

    def __call__(self, content: bool = False) -> object:
        word = f"w{len(self.given)}q"
        self.given.append(word)
        if not content:
            return word
        shapes = [word, f" {word}\n", [{"type": "text", "text": word}], [{"type": "text", "text": word, "image": None}]]
        return self.rng.choice(shapes) if self.rng.random() < 0.9 else [{"type": "image", "text": word}]

    def some(self, **members) -> dict:
        """Each of these members with some chance."""
        return {name: make() for name, make in members.items() if self.rng.random() < 0.12}


def random_row(words: Words) -> dict:
    rng = words.rng

    def message(role: str) -> dict:
        more = words.some(
            name=words,
            reasoning=words,
            thinking=words,
            refusal=words,
            timestamp=lambda: "now",
            notes=lambda: [words()],
            train=lambda: rng.choice([0, 1, True, "0", 0.5]),
            function_call=lambda: {"name": words(), "arguments": "{}"},
            tool_calls=lambda: [{"function": {"name": words(), "arguments": {words(): words()}}}],
        )
        return {"role": role, "content": words(content=True), **more}

    talk = [message(role) for _ in range(rng.randrange(1, 3)) for role in ("user", "assistant")]
    layouts = [
        lambda: {"messages": talk},
        lambda: {"messages": json.dumps(talk)},
        lambda: {"conversations": [{"from": m.pop("role"), "value": m.pop("content"), **m} for m in talk]},
        lambda: {"prompt": talk[:-1], "completion": talk[-1:]},
        lambda: {"prompt": words(), "response": words()},
        lambda: {"question": words(), "answer": words()},
        lambda: {"instruction": words(), "output": words()},
        lambda: {"instruction": words(), "response": words()},
    ]
    columns = dict.fromkeys(
        ["system", "system_prompt", "input", "context", "prompt", "completion", "id", "Messages", "reasoning", "topic"],
        words,
    )
    row = rng.choice(layouts)()
    more = words.some(
        **columns,
        history=lambda: [[words(), words()]],
        tools=lambda: [{"function": {"name": words(), "description": words()}}],
        chosen=lambda: words(content=True),
    )
    return more | row


@pytest.mark.parametrize("source", [HEAD + END, KNOWS_MORE], ids=["a plain template", "one that knows more"])
def test_every_text_of_a_random_row_is_in_its_tokens_or_named_as_unused_or_the_row_is_refused(
    tmp_path, tokenizer, source
):
    own, tokenizer.chat_template = tokenizer.chat_template, ChatTemplate(source.replace("\n", "{{ '\\n' }}"))
    kept = 0
    try:
        for seed in range(601):
            words = Words(seed)
            row = random_row(words)
            try:
                conversation = read(tmp_path, row)
                ids, _ = encode_conversation(tokenizer, conversation)
            except DataError as error:
                assert str(error).startswith("row 1 of ")
                continue
            kept += 1
            text = tokenizer.decode(ids, skip_special=False)
            unused = json.dumps([v for k, v in row.items() if repr(k) in conversation.unused])
            missing = [
                word for word in words.given if word in json.dumps(row) and word not in text and word not in unused
            ]
            assert not missing, row
    finally:
        tokenizer.chat_template = own
    assert kept > 100
