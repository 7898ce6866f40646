"""What OpenAI's clients send: completions and chat completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from arriero.serve.body import Body

Name = Annotated[str, Field(min_length=1, max_length=200)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Count = Annotated[int, Field(ge=1)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Schema = dict[str, Any]


class StreamOptions(Body):
    """What a stream has beside its text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # nothing is padded here


class Common(Body):
    """Members of all requests for answers. Those behind `user` have no effect on an answer here."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None  # as vLLM takes it; -1 and 0: all
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Count | None = None
    stop: str | list[str] | None = None
    cache_salt: Annotated[str, Field(max_length=200)] | None = None  # only requests of equal salt share cached prompts
    user: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return tuple([self.stop] if isinstance(self.stop, str) else self.stop or ())


class CompletionBody(Common):
    """/v1/completions."""

    prompt: str | list[str] | list[Id] | list[list[Id]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    best_of: Count | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None  # as vLLM: whether a text begins with what the tokenizer puts before it
    stop_token_ids: Annotated[list[Id], Field(max_length=64)] | None = None  # as vLLM: these end an answer too
    return_token_ids: bool | None = None  # as vLLM: choices have `token_ids`, those that end an answer included


class TextPart(Body):
    """A piece of text in a message; images, audio and files are refused by their `type`."""

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """The name of a called function, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call that the assistant made earlier in the conversation."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One message of a conversation; null is all that is taken of what a model here cannot read."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None
    reasoning_content: str | None = None


class Function(Body):
    """A function that may be called; `parameters` is a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that may be called: a function of the client's."""

    type: Literal["function"]
    function: Function


class Named(Body):
    """A function, by name."""

    name: FunctionName


class NamedChoice(Body):
    """The demand that this function be called."""

    type: Literal["function"]
    function: Named


class AllowedTools(Body):
    """Those of the tools that may be called (auto), or of which one has to be (required)."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(min_length=1)]


class AllowedChoice(Body):
    """A choice of tools that is `AllowedTools`."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class JsonSchema(Body):
    """The schema that an answer has to satisfy, under its name."""

    name: FunctionName
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """Whether an answer is free text, some JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(Common):
    """/v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: None = None
