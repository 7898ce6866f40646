"""Chat templates: the Jinja program that renders a conversation as the text that a model was tuned on.

A template comes with the model and is untrusted code: it runs in a sandbox (sandbox.py), with the helper functions that
transformers provides, on copies of the messages that consist of JSON's types only.

A model may have several by name. As in transformers, "tool_use" applies where tools are given, else "default".

Price: compiling takes some milliseconds, once per process and template; a rendering some ten microseconds a message.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
import jinja2.ext

from arriero.errors import CheckpointError, DataError
from arriero.io.records import parse_json
from arriero.tokenizer.contents import MARKS, REASONING
from arriero.tokenizer.sandbox import BoundedEnvironment, RunawayTemplate, begin

if TYPE_CHECKING:
    pass

Message = Mapping[str, Any]  # OpenAI's: role, content, tool_calls, tool_call_id, name
Tool = Mapping[str, Any]

# Templates that ship with Arriero, as files in templates/: the formats that the models were tuned on.
BUILTIN_TEMPLATES = ("chatml", "llama2", "llama3", "llama3.1")
DEFAULT, TOOL_USE = "default", "tool_use"
REMEDY = f"--chat-template with one of {', '.join(BUILTIN_TEMPLATES)}, or with a .jinja file"

_PROBE = "\ufdd0"  # a noncharacter: JSON leaves it as it is, and Python prints it otherwise


@dataclass(frozen=True)
class ChatTemplate:
    """A model's templates: the default one's source (None for none), those that have other names, and the special
    tokens that they may name ({"bos_token": "<s>"})."""

    source: str | None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, source in self.sources.items():
            if name in (DEFAULT, TOOL_USE):
                _compile(source)

    @property
    def sources(self) -> dict[str, str]:
        """Every template by its name."""
        return {**({} if self.source is None else {DEFAULT: self.source}), **self.others}

    @property
    def identity(self) -> list[str | None]:
        """The identity of the templates: the default, the one for tools, then names and sources of the rest."""
        rest = {name: source for name, source in sorted(self.others.items()) if name != TOOL_USE}
        return [self.source, self.others.get(TOOL_USE), *(part for item in rest.items() for part in item)]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all templates."""
        return hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()

    def source_for(self, tools: Any) -> str:
        """Return the template that applies to a conversation with these tools, or without (None or empty).

        Raises CheckpointError where none is the default.
        """
        if tools and TOOL_USE in self.others:
            return self.others[TOOL_USE]
        if self.source is None:
            raise CheckpointError(
                f"none of the model's chat templates ({', '.join(self.others)}) is named {DEFAULT!r}; "
                f"choose one: --chat-template {next(iter(self.others))}"
            )
        return self.source

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """Return the conversation as text, equal to transformers' `apply_chat_template(tokenize=False)`.

        `variables` reach the template by name (date_string, enable_thinking).
        Raises DataError where the template refuses the conversation, CheckpointError where it runs away with it.
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
        template = _compile(self.source_for(tools))
        names: dict[str, Any] = {
            **self.special_tokens,
            **variables,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        begin((messages, tools))
        try:
            return template.render(names)
        except RunawayTemplate as error:
            raise CheckpointError(f"the chat template is not used: {error}; give another: {REMEDY}") from error
        except Exception as error:  # a program may raise anything where it meets data that it was not written for
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(
                f"the chat template refuses this conversation: {error} (roles: {roles}); change the messages, or give "
                f"another chat template: {REMEDY}"
            ) from error


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
    if len(form) > 200:  # the C library may write each of its letters many times
        raise jinja2.TemplateError(f"strftime_now is given a format of {len(form):,} characters")
    return datetime.datetime.now().strftime(form)


@lru_cache(maxsize=1)
def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment([_GenerationTag, jinja2.ext.loopcontrols])
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    try:
        return _environment().load(source)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"the chat template has a syntax error in line {error.lineno}: {error.message}"
        ) from error
    except jinja2.TemplateError as error:
        raise CheckpointError(f"the chat template is not used: {error}; give another: {REMEDY}") from error
