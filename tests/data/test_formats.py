"""Every layout in every container gives the same conversations; what cannot be used is refused with its place."""

import csv
import gzip
import importlib.util
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers.rows import read_conversations

from arriero.errors import DataError, UserError
from arriero.io.records import hub_files, source_files

from .conftest import turns, write_rows

QUESTIONS = [("How many legs has a llama?", "Four."), ('A "quote", a comma,\nand a line', "Sí, señor 🦙")]
EXPECTED = [turns(*pair) for pair in QUESTIONS]


def openai(q, a):
    return {"messages": turns(q, a)}


def sharegpt(q, a):
    return {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}


def alpaca(q, a):
    return {"instruction": q, "input": "", "output": a}


def pair(q, a):
    return {"prompt": q, "completion": a}


def pair_of_messages(q, a):
    user, assistant = turns(q, a)
    return {"prompt": [user], "completion": [assistant]}


LAYOUTS = [openai, sharegpt, alpaca, pair, pair_of_messages]


def messages(source):
    return [conversation.messages for conversation in read_conversations(source)]


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def write_csv(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)


def write_gz(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_parquet(path, rows):
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)


def write_arrow(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


CONTAINERS = {
    "rows.jsonl": write_rows,
    "rows.json": write_json,
    "lines.json": write_rows,
    "rows.csv": write_csv,
    "rows.tsv": write_csv,
    "rows.jsonl.gz": write_gz,
    "rows.parquet": write_parquet,
    "rows.arrow": write_arrow,
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", CONTAINERS)
def test_every_layout_in_every_container_gives_the_same_conversations(tmp_path, name, layout):
    if layout is pair_of_messages and name.endswith(("csv", "tsv")):
        pytest.skip("a CSV cell is a text, so a prompt in it is one")
    CONTAINERS[name](tmp_path / name, [layout(*qa) for qa in QUESTIONS])
    assert messages(tmp_path / name) == EXPECTED


def test_a_directory_is_read_in_the_order_of_its_names(tmp_path):
    write_rows(tmp_path / "b.jsonl", [openai("second", "2")])
    write_json(tmp_path / "a.json", [openai("first", "1")])
    (tmp_path / "deeper").mkdir()
    write_gz(tmp_path / "deeper" / "c.jsonl.gz", [openai("third", "3")])
    (tmp_path / "README.md").write_text("not data")
    assert [m[0]["content"] for m in messages(tmp_path)] == ["first", "second", "third"]


def test_rows_know_their_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(openai("a", "b")) + "\n\n" + json.dumps(openai("c", "d")) + "\n")
    assert [c.where for c in read_conversations(path)] == [f"row 1 of {path}", f"row 3 of {path}"]


def test_alpaca_input_follows_its_instruction(tmp_path):
    row = {"instruction": "Translate.", "input": "llama", "output": "lama", "system": "Be brief."}
    path = write_rows(tmp_path / "r.jsonl", [row])
    assert messages(path) == [[{"role": "system", "content": "Be brief."}, *turns("Translate.\n\nllama", "lama")]]


def test_tools_and_their_calls_are_kept(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    talk = [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
        {"role": "assistant", "content": "Five."},
    ]
    for tools in ([tool], json.dumps([tool])):
        [conversation] = read_conversations(write_rows(tmp_path / "r.jsonl", [{"messages": talk, "tools": tools}]))
        assert conversation.tools == [tool]
        assert conversation.messages[1] == {"role": "assistant", "tool_calls": [call]}
        assert conversation.messages[2] == talk[2]


def test_columns_that_parquet_fills_with_null_are_as_if_absent(tmp_path):
    nothing = dict.fromkeys(["instruction", "output", "tools"])
    rows = [openai(*QUESTIONS[0]) | nothing, {"messages": None} | alpaca(*QUESTIONS[1])]
    write_parquet(tmp_path / "r.parquet", rows)
    assert messages(tmp_path / "r.parquet") == EXPECTED


def test_sharegpt_names_become_roles(tmp_path):
    said = [("system", "s"), ("human", "h"), ("gpt", "g"), ("observation", "o"), ("chatgpt", "c")]
    path = write_rows(tmp_path / "r.jsonl", [{"conversations": [{"from": f, "value": v} for f, v in said]}])
    assert [m["role"] for m in messages(path)[0]] == ["system", "user", "assistant", "tool", "assistant"]


GOOD = json.dumps(openai("a", "b"))
BAD_ROWS = [
    ('{"messages": [}', "broken JSON: .*; mend or drop the line"),
    ("\xff\xfe", "broken JSON: .*utf-8"),
    ("[" * 100_000, "the JSON is nested too deeply"),
    ('{"prompt": "a", "completion": "b", "prompt": "c"}', "broken JSON: an object has the key 'prompt' twice; mend or"),
    (
        '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        "broken JSON: an object has the key 'content'",
    ),
    ("[1, 2]", "expected a JSON object, found list"),
    ('{"text": "a", "b": 1}', r"no known layout in its columns \('text', 'b'\); rename them to .*'messages' \(OpenAI"),
    ("{}", r"no known layout in its columns \(none\)"),
    ('{"messages": []}', "the conversation is empty"),
    ('{"messages": 5}', "'messages' is of type int; make it a list"),
    ('{"messages": "x"}', "'messages' is a text that is not JSON"),
    ('{"messages": ["hello"]}', "message 0 is of type str; make it {role, content}"),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "message 0 has the unknown role 'robot'; use one of sys"),
    ('{"messages": [{"content": "x"}]}', "message 0 has the unknown role None"),
    ('{"conversations": [{"from": "alien", "value": "x"}]}', "message 0 has the unknown role 'alien'"),
    ('{"messages": [{"role": ["user"], "content": "x"}]}', r"message 0 has the unknown role \['user'\]"),
    ('{"messages": [{"role": "user", "content": 5}]}', r"message 0 \(user\): it has content of type int"),
    ('{"messages": [{"role": "user"}]}', r"message 0 \(user\): it has content of type NoneType"),
    ('{"prompt": "x", "completion": ""}', r"message 1 \(assistant\): it is an empty answer; nothing to learn"),
    (
        '{"messages": [{"role": "user", "content": "x"}]}',
        "the last message is the user's, so there is no answer .* add",
    ),
]


@pytest.mark.parametrize(("line", "message"), BAD_ROWS)
def test_a_bad_row_is_refused_with_its_place_and_the_remedy(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"{GOOD}\n{GOOD}\n".encode() + line.encode("latin-1") + f"\n{GOOD}\n".encode())
    with pytest.raises(DataError, match=f"row 3 of {path}: {message}"):
        messages(path)


def test_files_without_rows_are_refused(tmp_path):
    for name, content in (("a.jsonl", "\n"), ("b.csv", "prompt,completion\n"), ("c.json", "[]")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"{name}: the file holds no rows"):
            messages(tmp_path / name)


def test_csv_with_a_wrong_number_of_fields_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    for line, word in (("a,b,c", "more"), ("a", "fewer")):
        path.write_text(f"prompt,completion\nx,y\n{line}\n")
        with pytest.raises(DataError, match=rf"row 2 of .*it has {word} fields than the header's 2; quote"):
            messages(path)
    path.write_text('prompt,completion\nx,"y\n')
    with pytest.raises(DataError, match=r"row 1 of .*broken CSV"):
        messages(path)
    path.write_bytes(b"prompt,completion\nx,\xff\xfe\n")
    with pytest.raises(DataError, match=r"row 1 of .*broken CSV"):
        messages(path)


def test_a_name_that_stands_twice_is_refused_in_every_container(tmp_path):
    rows = pa.table([pa.array([text]) for text in "abc"], names=["prompt", "completion", "prompt"])
    pa.parquet.write_table(rows, tmp_path / "r.parquet")
    with pa.OSFile(str(tmp_path / "r.arrow"), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows)
    (tmp_path / "r.csv").write_text("prompt,completion,prompt\na,b,c\n")
    (tmp_path / "r.tsv").write_text("prompt\tcompletion\tprompt\na\tb\tc\n")
    for name in ("r.parquet", "r.arrow", "r.csv", "r.tsv"):
        with pytest.raises(DataError, match=rf"{name}: two of its columns are called 'prompt'; rename or remove one"):
            messages(tmp_path / name)
    (tmp_path / "r.json").write_text('[{"prompt": "a", "completion": "b", "prompt": "c"}]')
    with pytest.raises(DataError, match=r"r\.json: broken JSON: an object has the key 'prompt' twice"):
        messages(tmp_path / "r.json")
    (tmp_path / "cell.csv").write_text('messages\n"[{""role"": ""user"", ""role"": ""user""}]"\n')
    with pytest.raises(DataError, match=r"row 1 of .*'messages' is a text that is not JSON \(an object has the key"):
        messages(tmp_path / "cell.csv")


def test_a_json_array_is_read_up_to_its_first_row_that_is_none(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(f"[{GOOD}, 5, {GOOD}]")
    conversations = read_conversations(path)
    assert next(conversations).row == 1
    with pytest.raises(DataError, match=f"row 2 of {path}: expected a JSON object, found int; one object a row"):
        next(conversations)


def test_damaged_files_are_refused_by_name(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    write_gz(path, [openai(str(i) * 97, "b") for i in range(997)])
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"rows.jsonl.gz: damaged gzip data after row \d+ .*fetch the file again"):
        messages(path)
    path.write_bytes(b"not gzip")
    with pytest.raises(DataError, match="damaged gzip data after row 0"):
        messages(path)
    for name, what in (("r.parquet", "Parquet"), ("r.arrow", "Arrow stream"), ("r.json", "broken JSON")):
        (tmp_path / name).write_bytes(b"[ this is none")
        with pytest.raises(DataError, match=rf"{name}: .*{what}"):
            messages(tmp_path / name)


def test_paths_that_name_no_data_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no such file or directory; give a file, a directory, or a Hub data set id"):
        source_files(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="no such file"):
        source_files("data/train.jsonl")  # looks like owner/name, but the ending says file
    with pytest.raises(DataError, match=r"no data file in this directory; put \.jsonl"):
        source_files(tmp_path)
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"files ending '\.xlsx' are not read; convert it to \.jsonl"):
        source_files(tmp_path / "a.xlsx")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the package 'datasets' is installed")
def test_a_hub_id_without_the_package_names_the_extra_to_install():
    with pytest.raises(UserError, match=r"needs the package 'datasets'.*pip install 'arriero\[data\]'"):
        source_files("nobody/nothing")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the package 'datasets' (extra: data)")
def test_a_hub_data_set_is_read_from_its_arrow_files(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)  # the package takes a directory where a Hub id could stand
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write_rows(tmp_path / "owner" / "name" / "train.jsonl", [openai(*qa) for qa in QUESTIONS])
    assert [c.messages for file in hub_files("owner/name") for c in read_conversations(file)] == EXPECTED
    with pytest.raises(DataError, match=r"Hub data set owner/other: .*check the id"):
        hub_files("owner/other")


def test_reading_needs_no_torch():
    modules = "arriero.data.formats, arriero.data.sft, arriero.data.docstrings, arriero.data.inspect"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_object_meta_is_where_a_row_comes_from_and_any_other_is_named(tmp_path, capsys):
    row = {"prompt": "p", "completion": "c"}
    for meta, named in (({"source": "x"}, False), ("text", True), (["x"], True)):
        path = tmp_path / f"{named}.jsonl"
        path.write_text(json.dumps(row | {"meta": meta}))
        (conversation,) = read_conversations(path)
        assert bool(conversation.unused) is named
