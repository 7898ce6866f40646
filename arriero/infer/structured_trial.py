"""The process that tries a grammar before the engine compiles it: `python -m arriero.infer.structured_trial`.

Some grammars take llguidance minutes or gigabytes, and a thread cannot be stopped; a process can. Its input is lines of
JSON: first the vocabulary (`tokens` in hex, `special`, `stops`), then grammars, each of which it compiles, asks for its
first mask, and answers with null or the error. It ends with its input. Imports neither torch nor the rest of Arriero.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any, cast

MEMORY = 3 << 30  # bytes of address space
SLOWEST = 0.25
"""CPU seconds that one mask may take: all other requests wait for it. Usual ones take 0.0001."""
TOO_SLOW = f"what may follow takes over {SLOWEST} s to compute; make it smaller, with lower bounds on repetitions"


class Vocabulary:
    """What llguidance asks of a tokenizer: bytes of each id, which are special, which end a text, and an encoder."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], stops: list[int]) -> None:
        import llguidance

        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, stops[0]
        self.compiled: Any = llguidance.LLTokenizer(cast(Any, self), eos_token=stops)

    def __call__(self, text: str) -> list[int]:
        return [] if not hasattr(self, "compiled") else self.compiled.greedy_tokenize(text)


def limits() -> Any:
    """What a matcher may take, in llguidance's own units: about 15 ms a mask, 100 MB of lexer states."""
    import llguidance

    return llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


def begin(vocabulary: Any, grammar: str) -> Any:
    """A matcher at the start of a text. Raises ValueError where it does not compile, or no text satisfies it."""
    import llguidance

    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits())
    _check(matcher)
    if warnings := matcher.get_grammar_warnings():
        raise ValueError("; ".join(warnings))
    seconds = cpu_seconds(matcher.compute_bitmask)
    _check(matcher)
    if seconds > SLOWEST:
        raise ValueError(TOO_SLOW)
    return matcher


def cpu_seconds(function: Callable[..., object], *arguments: object) -> float:
    """CPU seconds that a call takes this thread, without a garbage collection that is due: in a large process one takes
    longer than a mask may."""
    collects = gc.isenabled()
    gc.disable()
    try:
        began = time.thread_time()
        function(*arguments)
        return time.thread_time() - began
    finally:
        if collects:
            gc.enable()


def _check(matcher: Any) -> None:
    if matcher.is_error():
        error = matcher.get_error()
        raise ValueError("no text satisfies it" if leads_nowhere(error) else error)


def leads_nowhere(error: str) -> bool:
    """Whether the error is that no token may follow. The mask then allows the stop token: look for errors first."""
    return error.startswith("NoExtension")


def main() -> None:
    """Reads a vocabulary, then a grammar a line, on standard input; answers each with its error, or null."""
    with contextlib.suppress(ImportError, ValueError):  # not on Windows, and not above a lower limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    told = json.loads(sys.stdin.readline())
    vocabulary = Vocabulary([bytes.fromhex(token) for token in told["tokens"]], told["special"], told["stops"])
    for line in sys.stdin:
        error = None
        try:
            begin(vocabulary.compiled, json.loads(line))
        except ValueError as found:
            error = str(found)
        sys.stdout.write(json.dumps(error) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
