"""OpenAI's API, by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import math

import numpy as np
import pytest

openai = pytest.importorskip("openai")

HELLO = [{"role": "user", "content": "Say hello."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}

AGE = {
    "type": "object",
    "properties": {"age": {"type": "integer"}},
    "required": ["age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(server):
    return server.server.models._loaded["base"]


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["base"]
    assert client.models.retrieve("base").owned_by == "arriero"


def test_a_completion_is_what_the_engine_says(client, model, server):
    answer = client.completions.create(model="base", prompt="The capital of France is", max_tokens=12, temperature=0)
    from arriero.infer.generate import stream

    ids = model.tokenizer.encode("The capital of France is")
    assert answer.choices[0].text == "".join(stream(model.model, model.tokenizer, ids, max_new_tokens=12))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
    assert answer.choices[0].finish_reason == "length"


def test_the_seed_decides_and_another_gives_another(client):
    texts = [
        client.completions.create(model="base", prompt="Once", max_tokens=12, temperature=1, seed=seed).choices[0].text
        for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_n_answers_of_several_prompts_are_numbered_prompt_by_prompt(client):
    prompts = ["One two", "Red green"]
    answer = client.completions.create(model="base", prompt=prompts, n=2, max_tokens=5, temperature=0)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(client):
    free = client.completions.create(model="base", prompt="1, 2, 3,", max_tokens=20, temperature=0).choices[0]
    cut = client.completions.create(model="base", prompt="1, 2, 3,", max_tokens=20, temperature=0, stop=[", 6"])
    assert ", 6" in free.text
    assert cut.choices[0].text == free.text[: free.text.index(", 6")]
    assert cut.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("settings", [{}, {"n": 2, "seed": 3, "temperature": 0.9}, {"logprobs": 3, "echo": True}])
def test_a_streamed_completion_put_together_is_the_unstreamed_one(client, settings):
    asked = {"model": "base", "prompt": "Llamas are", "max_tokens": 9, "temperature": 0, "stop": ["."], **settings}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
        if choice.logprobs:
            together = [p for part in parts if part.logprobs for p in part.logprobs.token_logprobs]
            assert together == choice.logprobs.token_logprobs
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_token_ids_come_when_asked_for_and_ids_may_end_an_answer(client, model):
    """As vLLM's clients ask: the id that ended an answer is among them, and its text is not."""
    asked = {"model": "base", "prompt": "1, 2, 3,", "max_tokens": 20, "temperature": 0, "logprobs": 0}
    free = client.completions.create(**asked, extra_body={"return_token_ids": True}).choices[0]
    assert model.tokenizer.decode(free.token_ids) == free.text and len(free.token_ids) == 20
    assert len(free.logprobs.token_logprobs) == 20
    end = free.token_ids[4]
    first = free.token_ids.index(end)
    extra = {"return_token_ids": True, "stop_token_ids": [end]}
    cut = client.completions.create(**asked, extra_body=extra).choices[0]
    assert (cut.token_ids, cut.finish_reason) == (free.token_ids[: first + 1], "stop")
    assert cut.text == model.tokenizer.decode(free.token_ids[:first])
    chunks = client.completions.create(**asked, extra_body=extra, stream=True)
    assert [i for chunk in chunks for i in chunk.choices[0].token_ids] == cut.token_ids


def test_echoed_log_probabilities_are_those_of_arriero_eval(client, model):
    """As lm-eval's local-completions asks: ids of context and answer, echo, logprobs 1, max_tokens 1."""
    from arriero.eval.packed import scored
    from arriero.eval.perplexity import Window

    context, answer = "The opposite of hot is", " cold and the opposite of up is down"
    ids = [model.tokenizer.encode(context), model.tokenizer.encode(answer)]
    whole = [*ids[0], *ids[1]]
    [(_, bits)] = scored(
        model.model, [Window(whole[:-1], [-100] * (len(ids[0]) - 1) + ids[1], len(ids[1]), 1.0, 0)], 512
    )
    told = client.completions.create(
        model="base", prompt=[whole, whole[:5]], max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
    ).choices[0]
    logprobs = told.logprobs.token_logprobs[len(ids[0]) : -1]
    assert len(logprobs) == len(ids[1])
    assert sum(logprobs) == pytest.approx(-bits * math.log(2), abs=1e-3)
    greedy = [
        p == max(top.values()) for p, top in zip(logprobs, told.logprobs.top_logprobs[len(ids[0]) : -1], strict=True)
    ]
    assert any(greedy)
    assert not all(greedy)
    assert told.text.startswith(context + answer)
    assert told.logprobs.text_offset[3] == len("".join(told.logprobs.tokens[:3]))


def test_the_terminator_is_among_the_log_probabilities_so_that_the_last_is_always_the_answers(client, model):
    """lm-eval takes off the last of the probabilities, that of the one token it let be drawn: here an end."""
    context = "Two plus two equals four."
    ids = model.tokenizer.encode(context)
    told = client.completions.create(model="base", prompt=context, max_tokens=1, logprobs=1, echo=True, temperature=0)
    assert (told.choices[0].text, told.choices[0].finish_reason) == (context, "stop")
    logprobs = told.choices[0].logprobs
    assert logprobs.tokens[-1] in ("<|im_end|>", "<|endoftext|>")
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset) == len(ids) + 1
    alone = client.completions.create(model="base", prompt=context, max_tokens=0, logprobs=1, echo=True)
    assert alone.choices[0].logprobs.token_logprobs == logprobs.token_logprobs[:-1]


def test_max_tokens_0_scores_a_prompt_and_answers_nothing(client):
    told = client.completions.create(model="base", prompt="Hot and cold", max_tokens=0, logprobs=1, echo=True)
    assert told.choices[0].text == "Hot and cold"
    assert len(told.choices[0].logprobs.token_logprobs) == told.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="nothing is asked"):
        client.completions.create(model="base", prompt="Hot", max_tokens=0)


def test_a_chat_is_rendered_by_the_models_template(client, model):
    from arriero.tokenizer.chat import encode_chat

    answer = client.chat.completions.create(model="base", messages=HELLO, max_tokens=8, temperature=0)
    ids = encode_chat(model.tokenizer, HELLO)
    text = client.completions.create(model="base", prompt=ids, max_tokens=8, temperature=0).choices[0].text
    assert answer.choices[0].message.content == text
    assert answer.usage.prompt_tokens == len(ids)


CHATS = {
    "plain": {},
    "several, sampled": {"n": 3, "temperature": 1.2, "seed": 5},
    "stopped": {"stop": ["!", "?"]},
    "scored": {"logprobs": True, "top_logprobs": 2},
    "schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": AGE},
        }
    },
    "any object": {"response_format": {"type": "json_object"}},
    "tools, free": {"tools": [WEATHER, TIME]},
    "tools, none": {"tools": [WEATHER, TIME], "tool_choice": "none"},
    "tools, required": {"tools": [WEATHER, TIME], "tool_choice": "required", "parallel_tool_calls": False},
    "tools, several": {"tools": [WEATHER, TIME], "tool_choice": "required", "temperature": 1, "seed": 2},
    "tool, named": {"tools": [WEATHER, TIME], "tool_choice": {"type": "function", "function": {"name": "get_time"}}},
    "tools, allowed": {
        "tools": [WEATHER, TIME],
        "tool_choice": {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_weather"}}]},
        },
    },
}  # fmt: skip


def together(chunks, index):
    """The message, finish and log-probabilities of one streamed choice."""
    message, calls, finish, logprobs = "", [], None, []
    for part in (part for chunk in chunks for part in chunk.choices if part.index == index):
        message += part.delta.content or ""
        for call in part.delta.tool_calls or ():
            if call.function.name is not None:
                assert call.index == len(calls)
                assert call.id
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments
        finish = part.finish_reason or finish
        logprobs += [token.logprob for token in part.logprobs.content] if part.logprobs else []
    return message, calls, finish, logprobs


@pytest.mark.parametrize("name", CHATS)
def test_a_streamed_chat_put_together_is_the_unstreamed_one(client, name):
    asked = {"model": "base", "messages": HELLO, "max_tokens": 40, "temperature": 0, **CHATS[name]}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        message, calls, finish, logprobs = together(chunks, choice.index)
        assert message == (choice.message.content or "")
        assert calls == [[call.function.name, call.function.arguments] for call in choice.message.tool_calls or ()]
        assert finish == choice.finish_reason
        assert logprobs == ([token.logprob for token in choice.logprobs.content] if choice.logprobs else [])
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_a_demanded_call_is_one_that_its_schema_allows(client):
    answer = client.chat.completions.create(
        model="base", messages=HELLO, tools=[TIME, WEATHER], max_tokens=200, temperature=1, seed=1,
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
    )  # fmt: skip
    [call] = answer.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather"
    assert set(arguments) == {"city", "days"}
    assert arguments["days"] in (1, 2, 3)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert not answer.choices[0].message.content


def test_a_conversation_with_calls_and_results_goes_on(client):
    call = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "12:34"},
    ]
    answer = client.chat.completions.create(model="base", messages=messages, tools=[TIME], max_tokens=5, temperature=0)
    assert answer.usage.prompt_tokens > 100  # the tools, the call and its result are all shown


def test_an_answer_by_a_schema_is_json(client):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}},
        "required": ["name"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="base", messages=HELLO, max_tokens=100, temperature=1, seed=4,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )  # fmt: skip
    assert isinstance(json.loads(answer.choices[0].message.content)["name"], str)


def test_log_probabilities_of_a_chat_are_the_models_own(client, model):
    import torch

    from arriero.tokenizer.chat import encode_chat

    answer = client.chat.completions.create(
        model="base", messages=HELLO, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    ids = encode_chat(model.tokenizer, HELLO)
    with torch.inference_mode():
        logits = model.model(torch.tensor([ids]))[0, -1].float().log_softmax(-1)
    top = logits.topk(3)
    assert np.allclose([p.logprob for p in content[0].top_logprobs], top.values.tolist(), atol=1e-3)
    assert bytes(content[0].bytes) == model.tokenizer.token_bytes(int(top.indices[0]))
    assert "".join(token.token for token in content) == answer.choices[0].message.content


def test_many_asynchronous_clients_get_what_one_gets(server, client):
    prompts = [f"Number {i} is" for i in range(12)]

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as many:
            asked = (many.completions.create(model="base", prompt=p, max_tokens=6, temperature=0) for p in prompts)
            return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

    alone = [
        client.completions.create(model="base", prompt=p, max_tokens=6, temperature=0).choices[0].text for p in prompts
    ]
    assert asyncio.run(ask_all()) == alone


REFUSED = {
    "a prompt that does not fit": ({"prompt": "a b c d " * 5000}, "the prompt has 2.*tokens, and the context 8,192"),
    "too long an answer": ({"max_tokens": 301}, "max_tokens is 301; at most 300 here"),
    "too many answers": ({"n": 33}, "n is 33; at most 32 here"),
    "too many alternatives": ({"logprobs": 21}, "asks for the 21 most probable tokens; at most 20 here"),
    "a member that nobody knows": ({"extra_body": {"temprature": 1}}, "temprature: no such member is known here"),
    "a text for a number": ({"extra_body": {"max_tokens": "5"}}, "max_tokens: Input should be a valid integer"),
    "an unknown id": ({"prompt": [1, 99999]}, "the prompt has the id 99999, and the model's are 0 to"),
    "no prompt": ({"prompt": []}, "the prompt is empty"),
    "a bias of no token": ({"logit_bias": {"x": 1}}, "logit_bias: invalid literal"),
    "an empty stop string": ({"stop": [""]}, "a stop string is empty"),
    "a suffix": ({"suffix": "x"}, "suffix: this server only continues texts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(client, name):
    settings, text = REFUSED[name]
    with pytest.raises(openai.BadRequestError, match=text) as caught:
        client.completions.create(**{"model": "base", "prompt": "x", **settings})
    assert caught.value.body["type"] == "invalid_request_error"


PICTURE = {"type": "image_url", "image_url": {"url": "x"}}
CHAT_REFUSED = {
    "no messages": ({"messages": []}, "messages: List should have at least 1 item"),
    "a picture": ({"messages": [{"role": "user", "content": [PICTURE]}]}, "is 'image_url'"),
    "an unknown role": ({"messages": [{"role": "wizard", "content": "x"}]}, "role"),
    "a call of nothing": ({"tool_choice": "required"}, "demands a call, and there are no tools"),
    "a call of a stranger": (
        {"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        "'other', which is none of the tools",
    ),
    "a schema that cannot be": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
        "the JSON schema cannot be compiled",
    ),
    "a schema too large": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["x" * 70000]}}}},
        "at most 65,536 here",
    ),
    "a call and a form": (
        {"tools": [TIME], "tool_choice": "required", "response_format": {"type": "json_object"}},
        "give one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAT_REFUSED)
def test_refusals_of_chats_say_why(client, name):
    settings, text = CHAT_REFUSED[name]
    with pytest.raises(openai.BadRequestError, match=text):
        client.chat.completions.create(**{"model": "base", "messages": HELLO, **settings})
    with pytest.raises(openai.BadRequestError, match=text):  # before the first event, it is no event
        client.chat.completions.create(**{"model": "base", "messages": HELLO, "stream": True, **settings})


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(
        openai.NotFoundError, match="no model 'bass' is served here; there are: base; did you mean 'base'"
    ):
        client.completions.create(model="bass", prompt="x")


def test_special_tokens_in_a_message_stay_text(client, model):
    ids = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "<|im_end|>"}], max_tokens=1
    ).usage.prompt_tokens
    plain = client.chat.completions.create(model="base", messages=[{"role": "user", "content": ""}], max_tokens=1)
    assert ids - plain.usage.prompt_tokens > 3
