"""Text that satisfies a JSON schema, a regular expression, a grammar or a list of choices, by llguidance.

A `Compiler` makes a `Grammar` of what the user gave; a request begins a `Constraint` of it, which tells before each
token which ids may follow (a bit mask, `SamplerRow.allowed`), takes the chosen one, and knows when the text is
complete. What cannot be compiled is an error that names the construct: llguidance is strict (a keyword of JSON Schema
that it does not know to restrict text by is refused, annotations excepted), and nothing is ever decoded without its
mask.

Compiling belongs on a thread of its own (`Compiler.submit`). It is tried first in another process
(`structured_trial.py`), which is ended after `SECONDS` or at 3 GB; what compiled there compiles here in the same time.
At each token llguidance works within limits of its own, and ours; beyond them the request fails, the engine goes on.

Ids are those of any of our tokenizers. One that strips a leading space from what it decodes gets one to strip.
Price, SmolLM2's 49,152 ids: 0.2 s once for the vocabulary, 0.8 s for the process, then 2 ms a schema; 5 to 150 us a
token (docs/log.md, "Structured output").
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, Literal, cast

import numpy as np

from arriero.errors import ConfigError, UserError, require
from arriero.infer import structured_trial
from arriero.tokenizer.base import Tokenizer

Kind = Literal["json_schema", "regex", "grammar", "choices"]

SECONDS = 5.0
"""Time that a grammar may take to compile."""
LONGEST = 1 << 20
"""Bytes of a schema, regular expression or grammar; all choices together."""
KEPT = 64
"""Compiled grammars that a compiler keeps."""
FORCED = 256
"""Characters that a grammar leaves no choice for, encoded at once as the tokenizer does: what follows can be long."""
WHITESPACE = r"[ \n]{0,32}"
"""Between the parts of a JSON text: without a bound, small models go on with white space to the token limit."""

NAMES: dict[Kind, str] = {
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "grammar": "the grammar",
    "choices": "the list of choices",
}


class Grammar:
    """A compiled grammar, for any number of requests at once."""

    def __init__(self, matcher: Any, words: int, stops: frozenset[int], name: str) -> None:
        self._matcher, self._words, self._stops, self._name = matcher, words, stops, name

    def begin(self) -> Constraint:
        """A constraint at the start of a text."""
        return Constraint(self._matcher.deep_copy(), self._words, self._stops, self._name)


class Constraint:
    """The text of one request so far, and what may follow. Not for two threads at once."""

    def __init__(self, matcher: Any, words: int, stops: frozenset[int], name: str) -> None:
        self._matcher, self._stops, self._name = matcher, stops, name
        self._mask = np.zeros(words, np.int32)

    @property
    def complete(self) -> bool:
        """Whether the text satisfies the grammar as it stands."""
        return bool(self._matcher.is_accepting())

    @property
    def done(self) -> bool:
        """Whether it does and nothing may follow: generation ends here, with or without a stop token."""
        return self.complete and bool(self._matcher.is_stopped())

    def mask(self) -> np.ndarray:
        """int32 words, of which bit i % 32 of word i / 32 is set where token i may follow; a stop token where the text
        is complete. The array is this constraint's own and filled anew by each call.

        Raises `UserError` where llguidance gives up, or the vocabulary has no token that leads on.
        """
        place = self._mask.ctypes.data, self._mask.nbytes
        seconds = structured_trial.cpu_seconds(self._matcher.unsafe_compute_mask_ptr, *place)
        self._check()
        if seconds > structured_trial.SLOWEST:
            raise UserError(f"{self._name} cannot be followed further: {structured_trial.TOO_SLOW}")
        return self._mask

    def accept(self, token: int) -> bool:
        """Take the token that was chosen; returns `done`.

        Raises `UserError` where the mask did not allow it, and where llguidance gives up.
        """
        if not (self.done and token in self._stops):
            self._matcher.consume_token(token)
            self._check()
        return self.done

    def ahead(self, proposed: Sequence[int]) -> list[np.ndarray]:
        """The mask of the next token, and of the one behind each of the proposed tokens, as far as these may follow.

        Takes none of them. Raises what `mask` raises for the next token.
        """
        masks = [self.mask().copy()]
        copy = Constraint(self._matcher.deep_copy(), len(self._mask), self._stops, self._name)
        with contextlib.suppress(UserError):  # tokens that nobody said end no request
            for token in proposed:
                allowed = masks[-1].view(np.uint32)[token // 32] >> np.uint32(token % 32) & 1
                if not allowed or token in self._stops or copy.accept(token):
                    break
                masks.append(copy.mask().copy())
        return masks

    def _check(self) -> None:
        if self._matcher.is_error():
            error = self._matcher.get_error()
            if structured_trial.leads_nowhere(error):
                error = "no token of the vocabulary leads on; allow other characters"
            raise UserError(f"{self._name} cannot be followed further: {_first_line(error)}")


class Compiler:
    """Compiles grammars for one tokenizer; from any thread, one at a time."""

    def __init__(self, tokenizer: Tokenizer, seconds: float = SECONDS) -> None:
        """Raises `UserError` where llguidance is not installed."""
        require("llguidance", "structured")
        self._seconds, self._lock = seconds, threading.Lock()
        self._vocabulary = _Vocabulary(tokenizer)
        self._padded = tokenizer.strips_space
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._trial = _Trial(self._vocabulary)
        self._thread = ThreadPoolExecutor(1, "arriero-grammar")

    def submit(self, kind: Kind, text: str | list[str]) -> Future[Grammar]:
        """`compile` on the compiler's own thread."""
        return self._thread.submit(self.compile, kind, text)

    def compile(self, kind: Kind, text: str | list[str]) -> Grammar:
        """The grammar of a JSON schema (its text), a regular expression that the whole text matches (Rust's syntax), a
        grammar (Lark as llguidance extends it, or GBNF), or choices of which the text is one.

        Raises `ConfigError` for what cannot be compiled, is too long or takes longer than the limit.
        """
        name = NAMES[kind]
        source = _source(kind, text)
        if self._padded:
            source = _behind_space(source)
        with self._lock:
            if source in self._kept:
                self._kept.move_to_end(source)
                return self._kept[source]
            if error := self._trial.error_of(source, self._seconds):
                raise ConfigError(f"{name} cannot be compiled: {error}")
            try:
                matcher = structured_trial.begin(self._vocabulary.compiled, source)
            except ValueError as error:
                raise ConfigError(f"{name} cannot be compiled: {_first_line(str(error))}") from None
            words = -(-self._vocabulary.compiled.vocab_size // 32)
            grammar = self._kept[source] = Grammar(matcher, words, self._vocabulary.stops, name)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return grammar

    def close(self) -> None:
        """End its process and thread; grammars stay usable."""
        self._thread.shutdown(cancel_futures=True)
        self._trial.stop()


class _Vocabulary(structured_trial.Vocabulary):
    """Our tokenizer for llguidance, which encodes by it the text that a grammar forces."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.stops = frozenset(i for i in tokenizer.stop_ids if i < len(tokens))
        if not self.stops:  # llguidance needs one: an id behind the last, which no model samples
            tokens.append(b"")
        self._tokenizer = tokenizer
        super().__init__(tokens, sorted({*tokenizer.special_ids.values()}), sorted(self.stops) or [len(tokens) - 1])

    def __call__(self, text: str) -> list[int]:
        near, far = text[:FORCED], text[FORCED:]  # far tokens are encoded again when they are near
        [ids] = self._tokenizer.encode_segments([near], at_start=[False])
        if b"".join(self.tokens[i] for i in ids) != near.encode():  # a tokenizer that changes text
            ids = super().__call__(near)
        return ids + super().__call__(far) if far else ids


class _Trial:
    """The process in which grammars are tried, started when it is first needed and anew after each death."""

    def __init__(self, vocabulary: _Vocabulary) -> None:
        told = {
            "tokens": [token.hex() for token in vocabulary.tokens],
            "special": list(vocabulary.special_token_ids),
            "stops": list(vocabulary.compiled.eos_tokens),
        }
        self._told = json.dumps(told)
        self._process: subprocess.Popen[str] | None = None
        self._end: weakref.finalize[..., Any] | None = None

    def error_of(self, source: str, seconds: float) -> str | None:
        """Why the grammar does not compile within `seconds`, or None."""
        process = self._running()
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            answer = _ask(process, source)
        finally:
            timer.cancel()
        if answer:
            error = json.loads(answer)
            return None if error is None else _first_line(error)
        self.stop()
        if late.is_set():
            return f"it took longer than {seconds:g} s; make it smaller, with fewer alternatives and lower bounds"
        return "it took too much memory; make it smaller, with fewer alternatives and lower bounds"

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.stop()
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", structured_trial.__name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                env=environment,
            )
            self._end = weakref.finalize(self, _kill, process)
            _write(process, self._told)
            if _ask(process, 'start: "a"') != "null\n":  # so that starting is not on the first grammar's time
                raise UserError("the process that tries grammars did not start; check the installation of llguidance")
        return self._process

    def stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None


def _ask(process: subprocess.Popen[str], source: str) -> str:
    _write(process, json.dumps(source))
    return cast(IO[str], process.stdout).readline()


def _write(process: subprocess.Popen[str], line: str) -> None:
    stdin = cast(IO[str], process.stdin)
    with contextlib.suppress(BrokenPipeError):  # it ended: readline tells
        stdin.write(line + "\n")
        stdin.flush()


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            cast(IO[str], pipe).close()
    process.wait()


def _source(kind: Kind, text: str | list[str]) -> str:
    """What llguidance compiles. Raises `ConfigError` for what is no text of its kind."""
    import llguidance

    name, parts = NAMES[kind], [text] if isinstance(text, str) else text
    size = sum(len(part) for part in parts)
    if size > LONGEST:
        raise ConfigError(f"{name} has {size:,} characters, and may have {LONGEST:,}; make it smaller")
    for part in parts:
        if any("\ud800" <= c <= "\udfff" for c in part):
            raise ConfigError(f"{name} has half of a surrogate pair, which is no character; take it out")
    if kind == "choices":
        if isinstance(text, str) or not text:
            raise ConfigError("the list of choices is empty; give at least one")
        return cast(str, llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, text))))
    assert isinstance(text, str)
    if not text or (kind != "regex" and not text.strip()):
        raise ConfigError(f"{name} is empty; leave it out for text without a constraint")
    try:
        if kind == "json_schema":
            text = "{}" if text.strip() == "true" else text
            options: Any = {"whitespace_pattern": WHITESPACE} if text.lstrip().startswith("{") else None
            return cast(str, llguidance.LLMatcher.grammar_from_json_schema(text, defaults=options))
        if kind == "regex":
            return cast(str, llguidance.LLMatcher.grammar_from_regex(text))
        return llguidance.grammar_from("grammar", text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} cannot be compiled: {_first_line(str(error))}") from None


def _behind_space(source: str) -> str:
    """The same texts behind a space."""
    grammars = json.loads(source)["grammars"] if source.lstrip().startswith("{") else [{"lark_grammar": source}]
    grammars[0]["name"] = "text"
    return json.dumps({"grammars": [{"lark_grammar": 'start: " " @text\n'}, *grammars]})


def _first_line(text: str, longest: int = 300) -> str:
    """What a message says, in one line: llguidance prints the grammar below it."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[:longest] + " ..."
