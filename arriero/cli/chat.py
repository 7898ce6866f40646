"""`arriero chat` and `arriero generate`: a conversation in the terminal, and one answer in a pipe.

On a terminal the chat is coloured and edited with readline; piped, each line of standard input is a message,
standard output carries the answers only, and everything else goes to standard error. Ctrl-C stops an answer and
keeps what was said; end of input leaves.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from random import Random

import torch
from rich.text import Text

from arriero.checkpoint.beside import read_beside, sampling_of, unused_settings
from arriero.checkpoint.load import best_device, load
from arriero.checkpoint.source import resolve
from arriero.errors import ConfigError, DataError, UserError, did_you_mean
from arriero.infer.config import ChatConfig, GenerateConfig, SamplingConfig
from arriero.infer.engine import Engine
from arriero.infer.generate import Session, stream
from arriero.infer.request import Request
from arriero.infer.structured import Compiler, Grammar, Kind
from arriero.io.files import decoded, json_line, read_text
from arriero.io.paths import as_path
from arriero.model.llama import Llama
from arriero.settings import from_dict
from arriero.show.terminal import check_input, notes, say, warn_once
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.chat import encode_chat

BLOCK = '"""'  # begins and ends a message of several lines
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GREEDY, SAMPLED = SamplingConfig(), SamplingConfig(temperature=0.6, top_p=0.9)  # models that do not say how


def load_chosen(config: GenerateConfig | ChatConfig) -> tuple[Llama, Tokenizer]:
    """The model that `config` names under its adapter, and its tokenizer; on the GPU if there is one (not measured)."""
    return load(
        config.model,
        dtype=DTYPES[config.precision],
        device=best_device(),
        adapter=config.adapter or None,
        chat_template=config.chat_template,
        quantize=config.quantize,
        filed=best_device() == "cpu",
    )


def sampling_for(config: GenerateConfig | ChatConfig, otherwise: SamplingConfig) -> SamplingConfig:
    """How to sample: by the flags, else by the model's own generation settings, else by `otherwise`."""
    source = resolve(config.model)
    own = read_beside(source, warn=False).generation
    if unused := unused_settings(own):
        warn_once(f"{source}: generation settings that are not used here: {', '.join(unused)}")
    return config.sampling.over(sampling_of(own), otherwise, config.model)


def run_generate(config: GenerateConfig) -> None:
    """Answer one prompt on standard output, as it is made."""
    prompt = config.prompt or decoded(sys.stdin.buffer.read(), "standard input")
    if not prompt.strip():
        raise ConfigError("the prompt is empty; give it after the model's name, or pipe text to standard input")
    sampling = sampling_for(config, GREEDY)
    model, tokenizer = load_chosen(config)
    if config.raw:
        ids = [*tokenizer.begin_ids, *tokenizer.encode(prompt)]
    else:
        ids = encode_chat(tokenizer, [*_opening(config.system), {"role": "user", "content": prompt}])
    grammar = _grammar(config, tokenizer)
    if grammar is None:
        pieces = stream(model, tokenizer, ids, sampling, config.max_new_tokens)
    else:
        pieces = _constrained(model, tokenizer, Request(ids, config.max_new_tokens, sampling, grammar=grammar))
    try:
        for piece in pieces:
            say(piece, end="")
    finally:
        say()


def _grammar(config: GenerateConfig, tokenizer: Tokenizer) -> Grammar | None:
    """What the answer has to satisfy."""
    given: tuple[Kind, str | list[str]] | None = None
    if config.json_schema:
        given = "json_schema", read_text(as_path(config.json_schema))
    elif config.regex:
        given = "regex", config.regex
    elif config.grammar:
        given = "grammar", read_text(as_path(config.grammar))
    elif config.choices:
        given = "choices", list(config.choices)
    if given is None:
        return None
    compiler = Compiler(tokenizer)
    try:
        return compiler.compile(*given)
    finally:
        compiler.close()


def _constrained(model: Llama, tokenizer: Tokenizer, request: Request) -> Iterator[str]:
    """The text of one answer as it grows. Raises `UserError` where its grammar cannot be followed to the end."""
    context = min(len(request.prompt) + request.max_new_tokens, model.config.max_context)
    for event in Engine(model, tokenizer, max_running=1, context=context).stream(request):
        yield event.text
        if event.error is not None:
            raise UserError(event.error)
        if event.finish == "length":
            warn_once(f"the answer was cut at {request.max_new_tokens:,} tokens and is not complete")


def run_chat(config: ChatConfig) -> None:
    """Load the model, then talk until /quit or the end of the input."""
    screen = Screen()
    screen.note(f"loading {config.model} ...")
    sampling = sampling_for(config, SAMPLED)
    model, tokenizer = load_chosen(config)
    chat = Chat(model, tokenizer, config, screen, sampling)
    screen.note(f"{config.model}, {chat.session.context:,} tokens of context; /help lists the commands")
    for message in screen.messages():
        try:
            if not chat.take(message):
                return
        except UserError as error:
            screen.note(str(error), "red")


class Screen:
    """Where messages come from and answers go; plain when standard output is no terminal."""

    def __init__(self) -> None:
        self.typed = sys.stdin.isatty()
        self.notes = notes()

    def note(self, text: str, style: str = "dim") -> None:
        """One line that is not part of any answer."""
        self.notes.print(Text(text, style), soft_wrap=True, highlight=False)

    def answer(self, piece: str) -> None:
        """Part of an answer, as it comes; a terminal gets no control characters, which could rewrite its screen."""
        say(piece, end="")

    def messages(self) -> Iterator[str]:
        """The user's messages, until the input ends."""
        if self.typed:
            import readline  # noqa: F401  gives `input` editing, history and pasting of several lines
        while True:
            try:
                message = _joined(self._line)
            except EOFError:
                return
            except KeyboardInterrupt:
                self.note("\n(Ctrl-D or /quit leaves)")
                continue
            if message.strip():
                yield message.strip()

    def _line(self, prompt: str) -> str:
        if self.typed:
            return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


def _joined(read_line: Callable[[str], str]) -> str:
    """One message: a line, lines that end in a backslash and the next, or what stands between two \"\"\"."""
    line = read_line("> ")
    if line.lstrip().startswith(BLOCK):
        lines, line = [], line.lstrip().removeprefix(BLOCK)
        while not line.rstrip().endswith(BLOCK):
            lines.append(line)
            line = read_line(". ")
        return "\n".join([*lines, line.rstrip().removesuffix(BLOCK)])
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        line = read_line(". ")
    return "\n".join([*lines, line])


class Chat:
    """A conversation: its messages, the model's session, and the commands on them."""

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, config: ChatConfig, screen: Screen, sampling: SamplingConfig
    ) -> None:
        self.tokenizer, self.config, self.screen = tokenizer, config, screen
        self.session = Session(model, tokenizer, config.context)
        self.sampling, self._seeds = sampling, Random(sampling.seed)  # each answer draws with a seed of its own
        self.system = config.system
        self.turns: list[dict[str, str]] = []  # user and assistant, by turns
        encode_chat(tokenizer, [{"role": "user", "content": "x"}])  # refuse a model without a template now

    @property
    def messages(self) -> list[dict[str, str]]:
        """The whole conversation, system prompt first."""
        return _opening(self.system) + self.turns

    def take(self, message: str) -> bool:
        """Answer a message or obey a command; returns whether to go on. "//..." is a message beginning with a slash."""
        check_input(message)
        if not message.startswith("/") or message.startswith("//"):
            self.say(message.removeprefix("/") if message.startswith("//") else message)
            return True
        name, _, argument = message[1:].partition(" ")
        if name == "quit":
            return False
        if name not in COMMANDS:
            raise ConfigError(f"/{name} is no command{did_you_mean(name, [*COMMANDS, 'quit'])} (/help lists them)")
        COMMANDS[name](self, argument.strip())
        return True

    def say(self, message: str) -> None:
        """Add a message and answer it."""
        self.turns.append({"role": "user", "content": message})
        try:
            ids = self._prompt()
        except UserError:
            self.turns.pop()
            raise
        self.turns.append({"role": "assistant", "content": self._answer(ids)})

    def _prompt(self) -> list[int]:
        """The conversation's ids, its oldest turns dropped until an answer fits behind them."""
        room = self.session.context - min(self.config.max_new_tokens, self.session.context // 2)
        kept = self.turns
        while len(ids := encode_chat(self.tokenizer, _opening(self.system) + kept)) > room:
            if len(kept) < 3:
                raise DataError(f"the message makes {len(ids):,} tokens, and {room:,} fit; shorten it")
            kept = kept[2:]
        if len(kept) < len(self.turns):
            self.screen.note(f"(dropped {len(self.turns) - len(kept)} old messages that no longer fit the context)")
            self.turns = kept
        return ids

    def _answer(self, ids: list[int]) -> str:
        """Stream an answer to the screen and return it; Ctrl-C ends it early."""
        pieces, end, n_tokens, cached = [], "at the token limit", 0, 0
        sampling = dataclasses.replace(self.sampling, seed=self._seeds.getrandbits(63))
        asked = first = time.perf_counter()
        try:
            with closing(self.session.answer(ids, sampling, self.config.max_new_tokens)) as events:
                for event in events:
                    if not n_tokens:  # what came before is the reading of the prompt
                        first, cached = time.perf_counter(), event.cached
                    n_tokens += 1
                    pieces.append(event.text)
                    self.screen.answer(event.text)
                    if event.finish == "stop":
                        end = ""
        except KeyboardInterrupt:
            end = "stopped by Ctrl-C"
        self.screen.answer("\n")
        seconds = time.perf_counter() - first
        speed = f", {(n_tokens - 1) / seconds:.1f} tokens/s" if n_tokens > 1 else ""
        read = f"{len(ids) - cached:,} of {len(ids):,} prompt tokens read in {first - asked:.2f} s"
        self.screen.note(f"({n_tokens} tokens{speed}; {read}{'; ' + end if end else ''})")
        return "".join(pieces)

    def help(self, _: str) -> None:
        """list the commands"""
        for name, command in COMMANDS.items():
            self.screen.note(f"/{name:<8} {command.__doc__}")
        self.screen.note("/quit     leave (so does Ctrl-D)")
        self.screen.note('a line ending in \\ goes on in the next; """ begins and ends a message of several lines')

    def reset(self, _: str) -> None:
        """forget the conversation, keep the system prompt"""
        self.turns = []

    def set_system(self, text: str) -> None:
        """TEXT: set the system prompt and forget the conversation; without TEXT, show it"""
        if text:
            self.system, self.turns = text, []
        self.screen.note(self.system or "(no system prompt; the chat template's own applies)")

    def save(self, file: str) -> None:
        """FILE: append the conversation to a JSONL file, as a row that `arriero sft` can train on"""
        if not file:
            raise ConfigError("/save needs a file: /save talk.jsonl")
        try:
            with as_path(file).open("ab") as out:
                out.write(json_line({"messages": self.messages}))
        except OSError as error:
            raise ConfigError(f"/save: cannot write {file}: {error.strerror}; choose another file") from error
        self.screen.note(f"{len(self.messages)} messages added to {file}")

    def undo(self, _: str) -> None:
        """take back the last message and its answer"""
        self._last_message("/undo")
        del self.turns[-2:]

    def retry(self, _: str) -> None:
        """answer the last message anew"""
        message = self._last_message("/retry")
        del self.turns[-2:]
        self.say(message)

    def params(self, text: str) -> None:
        """[NAME=VALUE ...]: change sampling, as in /params temperature=0.8 top_p=0.95; without, show it"""
        changes: dict[str, object] = {}
        for part in shlex.split(text):
            name, _, value = part.partition("=")
            changes[name] = _number(name, value)
        old = {name: value for name, value in vars(self.sampling).items() if value is not None}
        self.sampling = new = from_dict(SamplingConfig, old | changes, "/params")
        if "seed" in changes:
            self._seeds = Random(new.seed)
        self.screen.note(" ".join(f"{f.name}={getattr(new, f.name)}" for f in dataclasses.fields(new)))

    def _last_message(self, command: str) -> str:
        if not self.turns:
            raise ConfigError(f"{command}: nothing has been said yet")
        return self.turns[-2]["content"]


COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "help": Chat.help,
    "reset": Chat.reset,
    "system": Chat.set_system,
    "save": Chat.save,
    "undo": Chat.undo,
    "retry": Chat.retry,
    "params": Chat.params,
}


def _number(name: str, value: str) -> int | float:
    try:
        return int(value) if value.lstrip("-").isdigit() else float(value)
    except ValueError:
        raise ConfigError(f"/params: {name}={value!r} is no number; write for example temperature=0.8") from None


def _opening(system: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []
