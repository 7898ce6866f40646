"""A chat template: the Jinja program that turns a conversation into the text that a model was tuned on.

It ships with the model, so it is somebody else's code: it runs in Jinja's immutable sandbox, with the helpers that
transformers gives it, on copies of the messages that are made of JSON's types only.

Price: compiling takes some milliseconds, once a process and template; a rendering some ten microseconds a message.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from arriero.errors import CheckpointError, DataError, did_you_mean
from arriero.paths import as_path, hint, lies_here
from arriero.records import parse_json
from arriero.tokenizer.contents import MARKS, REASONING

if TYPE_CHECKING:
    from arriero.tokenizer.base import Tokenizer

Message = Mapping[str, Any]  # OpenAI's: role, content, tool_calls, tool_call_id, name
Tool = Mapping[str, Any]

# Templates that ship with Arriero, as files in templates/: the formats that the models were tuned on.
BUILTIN_TEMPLATES = ("chatml", "llama2", "llama3", "llama3.1")

_PROBE = "\ufdd0"  # a noncharacter: JSON leaves it as it is, and Python prints it otherwise
# What a program may raise that meets data it was not written for.
_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


@dataclass(frozen=True)
class ChatTemplate:
    """A template's source, the special tokens it may name ({"bos_token": "<s>"}), and its variant for tools, if any."""

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    tool_source: str | None = None

    def __post_init__(self) -> None:
        for source in (self.source, self.tool_source):
            if source is not None:
                _compile(source)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """Return the conversation as text, equal to transformers' `apply_chat_template(tokenize=False)`.

        `variables` reach the template by name (date_string, enable_thinking).
        Raises DataError where the template refuses the conversation.
        """
        plain_tools = None if tools is None else plain(tools)
        readable = self.readable([for_template(m) for m in messages], plain_tools, variables)
        return self.render_plain(readable, plain_tools, add_generation_prompt, variables)

    def readable(
        self, messages: list[dict[str, Any]], tools: Any, variables: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Messages whose contents are as this template reads them: lists of text parts joined, unless it knows lists.

        They are joined with nothing between them, as templates that know lists write them. Whether it does is tried:
        one that writes a list of one part as it writes that part's text, or writes nothing of a text, knows lists;
        any other would print a list with its brackets. Two renderings, for conversations with lists alone.
        """
        listed = {i: f"{_PROBE}{i}{_PROBE}" for i, m in enumerate(messages) if _is_parts(m.get("content"))}
        if not listed:
            return messages

        def rendered(contents: Mapping[int, Any]) -> str | None:
            """The conversation with other contents; None where one of the probes is not written."""
            probing = [{**m, "content": contents[i]} if i in contents else m for i, m in enumerate(messages)]
            try:
                text = self.render_plain(probing, tools, False, variables)
            except DataError:
                return None
            return text if all(probe in text for probe in listed.values()) else None

        by_list = rendered({i: [{"type": "text", "text": probe}] for i, probe in listed.items()})
        by_text = rendered(listed)
        if by_list is not None and by_text in (by_list, None):
            return messages
        joined = {i: "".join(part["text"] for part in messages[i]["content"]) for i in listed}
        return [{**m, "content": joined[i]} if i in joined else m for i, m in enumerate(messages)]

    def render_plain(
        self, messages: Sequence[dict[str, Any]], tools: Any, add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        """As `render`, for messages that `for_template` made and tools that `plain` made."""
        source = self.tool_source if tools and self.tool_source is not None else self.source
        names: dict[str, Any] = {
            **self.special_tokens,
            **variables,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return _compile(source).render(names)
        except _FAILURES as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(
                f"the chat template refuses this conversation: {error} (roles: {roles}); "
                "change the messages, or give another chat template"
            ) from error


def named_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """Return a built-in template by name, or the template in a file, for the special tokens of a tokenizer.

    Raises CheckpointError for an unknown name, and where the template writes a special token the tokenizer lacks.
    """
    from arriero.tokenizer.files import role_texts

    if name in BUILTIN_TEMPLATES and not (as_path(name).is_file() and lies_here(name, "the built-in chat template")):
        file = Path(__file__).parent / "templates" / f"{name}.jinja"
    elif (file := as_path(name)).is_file() is False:
        raise CheckpointError(
            f"no chat template {name!r}: neither a file nor one of {', '.join(BUILTIN_TEMPLATES)}"
            f"{did_you_mean(name, BUILTIN_TEMPLATES) or hint(name)}"
        )
    source = file.read_text(encoding="utf-8")
    lacking = sorted(set(re.findall(r"<\|\w+\|>", source)) - set(tokenizer.special_ids))
    if lacking and name in BUILTIN_TEMPLATES:
        raise CheckpointError(
            f"the chat template {name!r} writes {', '.join(lacking)}, which this tokenizer does not have as special "
            "tokens, so answers would never end; choose the template that the model was tuned on"
        )
    return ChatTemplate(source, role_texts(tokenizer.special))


def for_template(message: Message) -> dict[str, Any]:
    """Return a message as templates expect it: no None, no marks, reasoning under the names they know.

    An empty list of calls is as none: templates ask whether the member is there, and would write a call.
    """
    value = {k: plain(v) for k, v in message.items() if v is not None and k not in MARKS}
    if not value.get("tool_calls", True):
        del value["tool_calls"]
    for call in value.get("tool_calls") or ():
        _parse_arguments(call)
    reasoning = next((value[key] for key in REASONING if key in value), None)
    return value if reasoning is None else {"thinking": reasoning, **value, "reasoning_content": reasoning}


def _parse_arguments(call: Any) -> None:
    """Turn the arguments of a tool call, which OpenAI sends as JSON text, into the object that templates expect."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = parse_json(function["arguments"]) if function["arguments"].strip() else {}
        except (ValueError, RecursionError):
            return  # a template may still take it as text
        if isinstance(arguments, dict):
            function["arguments"] = arguments


def _is_parts(content: Any) -> bool:
    """Whether a content is a list of text parts alone."""
    return isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") in (None, "text") and isinstance(part.get("text"), str)
        for part in content
    )


def plain(value: Any) -> Any:
    """Return a copy made of JSON's types only, so that a template meets no object with methods of its own."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    raise DataError(f"a message holds a {type(value).__name__}; only text, numbers, lists and objects can be rendered")


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: transformers' mark around answers; rendered as its content."""

    tags: set[str] = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML's characters; models are trained on JSON as it is.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"the chat template has a syntax error in line {error.lineno}: {error.message}"
        ) from error
