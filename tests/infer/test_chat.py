"""The chat as people meet it: through a pipe and through a pseudo-terminal, with the real model."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from arriero.checkpoint.load import load_model
from arriero.cli.chat import BLOCK, Chat, Screen, _joined, run_generate
from arriero.errors import ConfigError, DataError
from arriero.infer.config import ChatConfig, GenerateConfig, SamplingConfig

TALK = (
    "from arriero.cli.chat import run_chat; from arriero.infer.config import ChatConfig, SamplingFlags; "
    "run_chat(ChatConfig(model={model!r}, sampling=SamplingFlags(temperature=0), max_new_tokens={n}))"
)


def command(model, n):
    return [sys.executable, "-c", TALK.format(model=str(model), n=n)]


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    import torch

    return load_model(smollm2_gguf, dtype=torch.bfloat16)


@pytest.fixture
def chat(smollm2, tokenizer, native, capsys):
    return Chat(smollm2, tokenizer, ChatConfig(max_new_tokens=9), Screen(), SamplingConfig())


def test_a_piped_chat_writes_answers_to_stdout_and_the_rest_to_stderr(smollm2_gguf, tmp_path):
    talk = f"Name the capital city of France.\n/save {tmp_path / 'talk.jsonl'}\n/sav\n\nAnd of Italy?\n"
    done = subprocess.run(
        command(smollm2_gguf, 12), input=talk, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert "Paris" in answers[0]
    assert "Rome" in done.stdout.partition("\n")[2]
    assert "/sav is no command; did you mean 'save'?" in done.stderr
    assert re.search(r"\(\d+ tokens, [\d.]+ tokens/s; \d+ of \d+ prompt tokens read", done.stderr)
    assert "\x1b[" not in done.stdout + done.stderr
    row = json.loads((tmp_path / "talk.jsonl").read_text())
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    assert row["messages"][1]["content"].strip() == answers[0].strip()


def test_ctrl_c_stops_the_answer_and_not_the_program(smollm2_gguf):
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, command(smollm2_gguf, 2000))
    seen = ""

    def wait_for(pattern):
        nonlocal seen
        end = time.monotonic() + 150
        while not (found := re.search(pattern, seen)):
            assert time.monotonic() < end, seen
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 4096).decode(errors="replace")
        seen = seen[found.end() :]
        return found

    try:
        wait_for("/help lists the commands")
        wait_for("> ")
        os.write(terminal, b"Tell me a very long story.\n")
        wait_for(r"story\.\s+\S[\s\S]{40}")  # the echo, then the answer
        os.write(terminal, b"\x03")
        wait_for("stopped by Ctrl-C")
        wait_for("> ")
        time.sleep(1)  # a Ctrl-C between the prompt and readline's wait would be seen at the next key only
        os.write(terminal, b"\x03")
        wait_for("Ctrl-D or /quit leaves")
        os.write(terminal, b"/help\n")
        wait_for("/retry")
        wait_for("> ")
        os.write(terminal, b"\x04")
        for _ in range(100):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                break
            time.sleep(0.1)
        assert ended, "end of input did not leave"
        assert os.waitstatus_to_exitcode(status) == 0
        pid = 0
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(terminal)


def test_undo_retry_and_reset_edit_the_conversation(chat, capsys):
    chat.take("Say A.")
    chat.take("Say B.")
    before = list(chat.turns)
    chat.take("/retry")
    assert chat.turns == before  # greedy says the same again
    chat.take("/undo")
    assert chat.turns == before[:2]
    chat.take("/reset")
    with pytest.raises(ConfigError, match="/undo: nothing has been said yet"):
        chat.take("/undo")
    with pytest.raises(ConfigError, match="/retry: nothing has been said yet"):
        chat.take("/retry")


def test_a_turn_reads_only_what_is_new(chat, capsys):
    chat.take("Name a colour.")
    chat.take("Name another.")
    read, whole = re.findall(r"(\d+) of (\d+) prompt tokens", capsys.readouterr().err)[-1]
    assert int(whole) - int(read) > 20  # the system prompt and the first question at least


def test_the_system_prompt_changes_the_answer_and_is_shown(chat, capsys):
    chat.take("Who are you?")
    plain = chat.turns[-1]["content"]
    chat.take("/system You are a pirate named Redbeard.")
    assert chat.turns == []
    chat.take("Who are you?")
    assert chat.turns[-1]["content"] != plain
    assert chat.messages[0] == {"role": "system", "content": "You are a pirate named Redbeard."}
    chat.take("/system")
    assert "Redbeard" in capsys.readouterr().err


def test_params_change_sampling_and_refuse_what_they_do_not_know(chat, capsys):
    chat.take("/params temperature=0.5 top_k=7 seed=3")
    assert (chat.sampling.temperature, chat.sampling.top_k) == (0.5, 7)
    chat.take("Say something.")
    first = chat.turns[-1]["content"]
    chat.sampling = replace(chat.sampling, logit_bias={49_151: -1.0})
    chat.take("/params seed=3")
    assert chat.sampling.logit_bias == {49_151: -1.0}
    chat.take("/retry")
    assert chat.turns[-1]["content"] == first
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        chat.take("/params temprature=0.5")
    with pytest.raises(ConfigError, match="temperature='hot' is no number"):
        chat.take("/params temperature=hot")
    with pytest.raises(ConfigError, match="top_p is 3"):
        chat.take("/params top_p=3.0")


def test_old_turns_are_dropped_when_the_context_is_full(smollm2, tokenizer, native, capsys):
    small = Chat(smollm2, tokenizer, ChatConfig(context=128, max_new_tokens=8), Screen(), SamplingConfig())
    for i in range(6):
        small.take(f"This is message number {i}, and it is not short at all.")
    assert len(small.turns) < 12
    assert small.turns[-2]["content"].startswith("This is message number 5")
    assert "old messages that no longer fit" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"the message makes [\d,]+ tokens, and 120 fit; shorten it"):
        small.take("word " * 200)
    assert small.turns[-1]["role"] == "assistant"


def test_a_terminal_is_spared_control_characters_and_a_pipe_gets_all(capsys, monkeypatch):
    screen = Screen()
    for is_terminal in (True, False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda answer=is_terminal: answer)
        screen.answer("a\x1b[2J\tb\r\n")
    assert capsys.readouterr().out == "a\\x1b[2J\tb\n" + "a\x1b[2J\tb\r\n"


def test_save_says_why_it_cannot_write(chat, tmp_path):
    with pytest.raises(ConfigError, match=r"/save: cannot write .*no/where: No such file"):
        chat.take(f"/save {tmp_path}/no/where")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["one line"], "one line"),
        (["first \\", "second \\", "third"], "first \nsecond \nthird"),
        ([BLOCK + "def f():", "    return 1", BLOCK], "def f():\n    return 1\n"),
        ([BLOCK + "all in one" + BLOCK], "all in one"),
    ],
)
def test_messages_of_several_lines(typed, message):
    lines = iter(typed)
    assert _joined(lambda prompt: next(lines)) == message


def test_generate_answers_a_pipe(smollm2_gguf, native, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Name the capital city of France.")))
    run_generate(GenerateConfig(model=str(smollm2_gguf), max_new_tokens=12))
    assert "Paris" in capsys.readouterr().out
    run_generate(GenerateConfig(model=str(smollm2_gguf), prompt="1, 2, 3, 4,", raw=True, max_new_tokens=8))
    assert capsys.readouterr().out.startswith(" 5, 6")


def test_generate_refuses_an_empty_prompt(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b" \n")))
    with pytest.raises(ConfigError, match="the prompt is empty"):
        run_generate(GenerateConfig(model="smollm2-135m"))


def test_a_prompt_from_a_file_has_its_own_bytes(monkeypatch):
    seen = []
    tokenizer = SimpleNamespace(begin_ids=(), encode=lambda text: seen.append(text) or [])
    monkeypatch.setattr("arriero.cli.chat.load_chosen", lambda config: (None, tokenizer))
    monkeypatch.setattr("arriero.cli.chat.stream", lambda *_: [])
    monkeypatch.setattr("arriero.cli.chat.sampling_for", lambda *_: None)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfone\r\ntwo\rthree\n")))
    run_generate(GenerateConfig(model="x", raw=True))
    assert seen == ["one\r\ntwo\rthree\n"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    with pytest.raises(DataError, match="standard input: not UTF-8 at byte 3; convert it"):
        run_generate(GenerateConfig(model="x", raw=True))
