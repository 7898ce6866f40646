"""Responses, embeddings, Anthropic's and Ollama's APIs, by the official clients; and our own routes."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
ollama = pytest.importorskip("ollama")

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
HELLO = [{"role": "user", "content": "Say hello."}]
AGE = {
    "type": "object",
    "properties": {"age": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(server):
    return server.server.models._loaded["base"]


@pytest.fixture(scope="module")
def expected(server):
    """The answer to HELLO, by the API that is tested elsewhere."""
    asked = {"model": "base", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    told = server.call("/v1/chat/completions", asked)[1]
    return told["choices"][0]["message"]["content"], told["usage"]


# OpenAI's responses and embeddings


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


RESPONSES = {
    "text": {},
    "instructed": {"instructions": "Answer with one word."},
    "json": {"text": {"format": {"type": "json_schema", "name": "a", "schema": AGE}}},
    "call": {
        "tools": [{"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_output_tokens": 80,
    },
    "named call": {
        "tools": [{"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}],
        "tool_choice": {"type": "function", "name": "get_weather"},
        "max_output_tokens": 80,
    },
}


@pytest.mark.parametrize("name", RESPONSES)
def test_a_streamed_response_put_together_is_the_unstreamed_one(client, name):
    asked = {"model": "base", "input": "Say hello.", "max_output_tokens": 12, "temperature": 0, **RESPONSES[name]}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:  # OpenAI's own accumulator
        events = list(stream)
    last = events[-1].response
    assert last.output_text == whole.output_text
    assert [(i.type, i.status, getattr(i, "arguments", None)) for i in last.output] == [
        (i.type, i.status, getattr(i, "arguments", None)) for i in whole.output
    ]
    assert (last.status, last.usage.output_tokens) == (whole.status, whole.usage.output_tokens)
    deltas = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert deltas == whole.output_text
    numbers = [event.sequence_number for event in events if hasattr(event, "sequence_number")]
    assert numbers == sorted(numbers)


def test_a_response_says_what_the_chat_says(client, expected):
    response = client.responses.create(model="base", input=HELLO, max_output_tokens=12, temperature=0)
    assert response.output_text == expected[0]
    assert response.usage.input_tokens == expected[1]["prompt_tokens"]
    assert response.status == ("incomplete" if expected[1]["completion_tokens"] == 12 else "completed")


def test_a_response_goes_on_behind_calls_and_their_outputs(client):
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": '{"city": "Lima"}'},
        {"type": "function_call_output", "call_id": "c", "output": "sunny"},
    ]
    told = client.responses.create(model="base", input=items, max_output_tokens=5, temperature=0)
    alone = client.responses.create(model="base", input=items[:1], max_output_tokens=5, temperature=0)
    assert told.usage.input_tokens > alone.usage.input_tokens + 20


def test_what_needs_a_memory_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="previous_response_id: this server keeps no answers"):
        client.responses.create(model="base", input="x", previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError, match="store: Input should be False"):
        client.responses.create(model="base", input="x", store=True)


def test_embeddings_are_means_of_hidden_states_of_length_1(client, model):
    import torch

    texts = ["The cat sat on the mat.", "A cat was sitting on a rug.", "Interest rates rose in March."]
    told = client.embeddings.create(model="base", input=texts)
    vectors = np.array([item.embedding for item in told.data])
    for text, vector in zip(texts, vectors, strict=True):
        with torch.inference_mode():
            hidden = model.model.model(torch.tensor([model.tokenizer.encode(text)]))[0]
        mean = hidden.numpy().mean(0)
        assert np.allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    plain = client.embeddings.create(model="base", input=texts[0], encoding_format="float").data[0].embedding
    assert np.allclose(plain, vectors[0], atol=1e-6)  # the client asks for base64 otherwise
    with pytest.raises(openai.BadRequestError, match="dimensions is 3; this model's embeddings have 576"):
        client.embeddings.create(model="base", input="x", dimensions=3)
    with pytest.raises(openai.BadRequestError, match="input 1 is empty"):
        client.embeddings.create(model="base", input=["x", ""])


# Anthropic's


@pytest.fixture(scope="module")
def claude(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


MESSAGES = {
    "text": {},
    "system": {"system": "Answer with one word."},
    "stopped": {"stop_sequences": ["!", "?", "."]},
    "call": {
        "tools": [{"name": "get_weather", "input_schema": PARAMETERS}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "max_tokens": 80,
    },
    "named call": {
        "tools": [{"name": "get_weather", "description": "Weather", "input_schema": PARAMETERS}],
        "tool_choice": {"type": "tool", "name": "get_weather"},
        "max_tokens": 80,
    },
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_streamed_message_put_together_is_the_unstreamed_one(claude, name):
    asked = {"model": "base", "messages": HELLO, "max_tokens": 12, "extra_body": {"temperature": 0}, **MESSAGES[name]}
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:  # Anthropic's own accumulator
        last = stream.get_final_message()
    ids = {"id"}
    assert [b.model_dump(exclude=ids, exclude_none=True) for b in last.content] == [
        b.model_dump(exclude=ids, exclude_none=True) for b in whole.content
    ]
    assert (last.stop_reason, last.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert (last.usage.input_tokens, last.usage.output_tokens) == (whole.usage.input_tokens, whole.usage.output_tokens)
    assert whole.stop_reason == {"stopped": "stop_sequence", "call": "tool_use", "named call": "tool_use"}.get(
        name, whole.stop_reason
    )


def test_a_message_says_what_the_chat_says(claude, expected):
    told = claude.messages.create(model="base", messages=HELLO, max_tokens=12, extra_body={"temperature": 0})
    assert told.content[0].text == expected[0]
    assert claude.messages.count_tokens(model="base", messages=HELLO).input_tokens == expected[1]["prompt_tokens"]


def test_an_answer_goes_on_behind_its_beginning(claude, expected):
    words = expected[0].split(" ")
    begun = " ".join(words[:2])
    told = claude.messages.create(
        model="base",
        messages=[*HELLO, {"role": "assistant", "content": begun}],
        max_tokens=12,
        extra_body={"temperature": 0},
    )
    assert (begun + told.content[0].text).startswith(expected[0])


def test_a_conversation_with_tools_goes_on(claude):
    used = {"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "Lima"}}
    told = claude.messages.count_tokens(
        model="base",
        tools=[{"name": "get_weather", "input_schema": PARAMETERS}],
        messages=[
            *HELLO,
            {"role": "assistant", "content": [used]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "sunny"}]},
        ],
    )  # fmt: skip
    assert told.input_tokens > 100


def test_anthropics_errors_have_its_shape(claude, server):
    with pytest.raises(anthropic.NotFoundError, match="no model 'other' is served here"):
        claude.messages.create(model="other", messages=HELLO, max_tokens=5)
    status, body, _ = server.call("/v1/messages", {"model": "base", "messages": HELLO})
    assert status == 400
    assert body["type"] == "error"
    assert body["error"] == {"type": "invalid_request_error", "message": "max_tokens: Field required"}


def test_asynchronous_streams_of_anthropics_client_work(server, expected):
    async def ask():
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none") as client:
            asked = {"model": "base", "messages": HELLO, "max_tokens": 12, "extra_body": {"temperature": 0}}
            async with client.messages.stream(**asked) as stream:
                return "".join([text async for text in stream.text_stream])

    assert asyncio.run(ask()) == expected[0]


# Ollama's

GREEDY = {"temperature": 0, "num_predict": 12}


@pytest.fixture(scope="module")
def llama(server):
    client = ollama.Client(server.url)
    yield client
    client._client.close()


OLLAMA = {
    "text": {},
    "json": {"format": AGE},
    "stopped": {"options": {**GREEDY, "stop": ["!", "."]}},
    "tools": {"tools": [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]},
}


@pytest.mark.parametrize("name", OLLAMA)
def test_a_streamed_ollama_chat_put_together_is_the_unstreamed_one(llama, name):
    asked = {"model": "base", "messages": HELLO, "options": GREEDY, **OLLAMA[name]}
    whole = llama.chat(**asked)
    parts = list(llama.chat(**asked, stream=True))
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert (parts[-1].done_reason, parts[-1].eval_count) == (whole.done_reason, whole.eval_count)
    if name == "json":
        assert set(json.loads(whole.message.content)) == {"age"}


def test_ollamas_chat_and_raw_generate_say_what_others_say(llama, server, expected, model):
    assert llama.chat(model="base:latest", messages=HELLO, options=GREEDY).message.content == expected[0]
    assert llama.generate(model="base", prompt=HELLO[0]["content"], options=GREEDY).response == expected[0]
    told = llama.generate(model="base", prompt="One, two", raw=True, options=GREEDY, stream=True)
    raw = "".join(part.response for part in told)
    asked = {"model": "base", "prompt": "One, two", "max_tokens": 12, "temperature": 0}
    assert raw == server.call("/v1/completions", asked)[1]["choices"][0]["text"]


def test_ollama_lists_shows_and_embeds(llama, client):
    assert [model.model for model in llama.list().models] == ["base"]
    shown = llama.show("base")
    assert shown.modelinfo["llama.embedding_length"] == 576
    assert "im_start" in shown.template
    [vector] = llama.embed(model="base", input="A cat.").embeddings
    same = client.embeddings.create(model="base", input="A cat.", encoding_format="float").data[0].embedding
    assert np.allclose(vector, same)


def test_ollamas_errors_have_its_shape(llama):
    with pytest.raises(ollama.ResponseError, match="no model 'other' is served here") as caught:
        llama.chat(model="other", messages=HELLO)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match=r"options.mirostat: no such option is known here"):
        llama.chat(model="base", messages=HELLO, options={"mirostat": 1})


# Our own


def test_tokens_go_there_and_back(server, model):
    text = "Llamas hum. <|im_end|> ñandú 🦙"
    told = server.call("/tokenize", {"model": "base", "prompt": text})[1]
    assert told["tokens"] == model.tokenizer.encode(text)
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert server.call("/detokenize", {"model": "base", "tokens": told["tokens"]})[1] == {"prompt": text}
    assert server.call("/detokenize", {"model": "base", "tokens": [10**6]})[0] == 400


def test_a_rendered_conversation_is_what_training_sees(server, model):
    from arriero.tokenizer.chat import encode_training

    messages = [*HELLO, {"role": "assistant", "content": "Hello."}]
    told = server.call("/render", {"model": "base", "messages": messages})[1]
    seen = encode_training(model.tokenizer, messages)
    assert (told["tokens"], told["trained"]) == (seen.ids, seen.trained)
    assert any(told["trained"])
    open_ended = server.call("/render", {"model": "base", "messages": HELLO})[1]
    asked = server.call("/tokenize", {"model": "base", "messages": HELLO})[1]
    assert open_ended["tokens"] == asked["tokens"]


def test_every_route_that_streams_documents_the_type_of_its_stream(server):
    asks = {
        "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
        "/v1/chat/completions": {"messages": HELLO, "max_tokens": 1},
        "/v1/responses": {"input": "Hi", "max_output_tokens": 16},
        "/v1/messages": {"messages": HELLO, "max_tokens": 1},
        "/api/chat": {"messages": HELLO, "options": {"num_predict": 1}},
        "/api/generate": {"prompt": "Hi", "options": {"num_predict": 1}},
    }
    document = server.server.config.app.openapi()
    bodies = {
        path: methods["post"].get("requestBody") for path, methods in document["paths"].items() if "post" in methods
    }
    schemas = document["components"]["schemas"]
    named = {
        path: body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for path, body in bodies.items()
        if body
    }
    assert {path for path, name in named.items() if "stream" in schemas[name]["properties"]} == set(asks)
    for path, body in asks.items():
        documented = document["paths"][path]["post"]["responses"]["200"]["content"]
        types = set()
        for stream in (False, True):
            status, _, headers = server.call(path, {"model": "base", "stream": stream, **body})
            assert status == 200, path
            types.add(headers["content-type"].partition(";")[0])
        assert types == set(documented), path
