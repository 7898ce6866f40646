"""Ollama's Modelfile: the files, a template in Go's language, stop texts and sampling settings.

Ollama does not run chat templates of others but has a language of its own. What a model's template writes around the
messages of each role is found by rendering probes, and written in that language; then both are compared on
conversations. A template that does more than that (numbers turns, writes tools, drops messages) is refused by name,
not approximated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arriero.errors import CheckpointError, UserError
from arriero.show.terminal import warn_once
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.template import ChatTemplate

_ROLES = ("system", "user", "assistant")
_MARK = "\ufdd0"
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Around:
    """What stands before and behind the text of each role, at the beginning without a system message, and before an
    answer."""

    roles: Mapping[str, tuple[str, str]]
    begin: str
    opening: str
    prompt: str

    def render(self, messages: Messages) -> str:
        """A conversation up to the answer, as the template in Go's language writes it."""
        has_system = any(message["role"] == "system" for message in messages)
        parts = [self.begin if has_system else self.opening]
        for message in messages:
            before, behind = self.roles[message["role"]]
            parts += [before, message["content"], behind]
        return "".join([*parts, self.prompt])

    def in_go(self) -> str:
        """The template for Ollama."""
        cases = "{{ else ".join(
            f'if eq .Role "{role}" }}}}{_go(before)}{{{{ .Content }}}}{_go(behind)}'
            for role, (before, behind) in self.roles.items()
        )
        first = f"{{{{ if .System }}}}{_go(self.begin)}{{{{ else }}}}{_go(self.opening)}{{{{ end }}}}"
        if self.begin == self.opening:
            first = _go(self.begin)
        return f"{first}{{{{ range .Messages }}}}{{{{ {cases}{{{{ end }}}}{{{{ end }}}}{_go(self.prompt)}"


def _go(text: str) -> str:
    """Text as Go's templates keep it: within an action where it has braces."""
    return (
        '{{ "' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '" }}' if "{{" in text else text
    )


def around(tokenizer: Tokenizer, tried: Sequence[Messages]) -> Around:
    """What a tokenizer's template writes around messages; `tried` are conversations on which that is verified.

    Raises `CheckpointError` where it does more than that.
    """
    template = tokenizer.chat_template
    if template is None:
        raise CheckpointError("the model has no chat template, and Ollama needs one; give --chat-template")

    def text(roles: Sequence[str], prompt: bool = False) -> str:
        assert template is not None
        said = [{"role": role, "content": f"{_MARK}{i}{_MARK}"} for i, role in enumerate(roles)]
        return template.render(said, add_generation_prompt=prompt)

    try:
        whole, asked = (
            text(["system", "user", "assistant", "user"]),
            text(["system", "user", "assistant", "user"], True),
        )
        alone = text(["user"])
        pieces = [whole.partition(f"{_MARK}{i}{_MARK}") for i in range(4)]
        between = [
            pieces[i][2][: pieces[i][2].index(f"{_MARK}{i + 1}{_MARK}")] for i in range(3)
        ]  # behind message i, before the next
        user_end = pieces[3][2]
        ends_alike = bool(user_end) and between[2].startswith(user_end)  # most templates end all messages alike
        user_begin = between[2][len(user_end) :] if ends_alike else _suffix_of(between[2], between[0])
        if not between[0].endswith(user_begin):
            raise ValueError("it begins a message of the user otherwise behind a system prompt")
        system_end, assistant_end = between[0].removesuffix(user_begin), between[2].removesuffix(user_begin)
        if not between[1].startswith(user_end):
            raise ValueError("it ends a message of the user otherwise in the middle")
        assistant_begin = between[1][len(user_end) :]
        first = pieces[0][0]
        begin = _first_token(tokenizer, first)
        roles = {
            "system": (first[len(begin) :], system_end),
            "user": (user_begin, user_end),
            "assistant": (assistant_begin, assistant_end),
        }
        opening = alone.partition(f"{_MARK}0{_MARK}")[0].removesuffix(user_begin)
        found = Around(roles, begin, opening, asked[len(whole) :])
        for messages in tried:
            _check_alike(found, template, messages)
    except (UserError, ValueError) as error:
        raise CheckpointError(
            "the chat template does more than write something around each message, which Ollama's language cannot say: "
            f"{error}; give another --chat-template, or use --to llamacpp, which runs the template itself"
        ) from None
    return found


def _check_alike(found: Around, template: ChatTemplate, messages: Messages) -> None:
    """Refuse a template that writes a conversation otherwise; one that only takes white space off it is said."""
    said = template.render(messages, add_generation_prompt=True)
    if found.render(messages) == said:
        return
    if found.render([{**message, "content": message["content"].strip()} for message in messages]) != said:
        raise ValueError(f"it writes {messages[0]['content'][:40]!r} otherwise")
    warn_once("the chat template takes white space off both ends of messages, and Ollama will not")


def _first_token(tokenizer: Tokenizer, text: str) -> str:
    """The beginning-of-text token that a rendering begins with, if it does."""
    bos = tokenizer.special.bos if tokenizer.special.adds_bos else None
    return bos if bos and text.startswith(bos) else ""


def _suffix_of(a: str, b: str) -> str:
    """What two texts end with."""
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return a[len(a) - n :]


def modelfile(found: Around, tokenizer: Tokenizer, sampling: Mapping[str, Any], adapter: str | None) -> str:
    """The text of the file."""
    lines = ["FROM ./model.gguf"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")
    begin = tokenizer.special.bos or ""
    go = found.in_go()
    if tokenizer.special.adds_bos and begin:
        go = go.replace(begin, "", 1)  # Ollama's runner writes it
    lines.append(f'TEMPLATE """{go}"""')
    stops = sorted(text for text, i in tokenizer.control_ids.items() if i in tokenizer.control_stops)
    lines += [f'PARAMETER stop "{text}"' for text in stops]
    names = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
             "repetition_penalty": "repeat_penalty"}  # fmt: skip
    lines += [f"PARAMETER {names[name]} {value:g}" for name, value in sampling.items() if name in names]
    return "\n".join(lines) + "\n"
