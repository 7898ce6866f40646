"""Batched generation and sessions: against transformers' generate, and against themselves done the slow way."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig as ReferenceConfig
from transformers import LlamaForCausalLM

from arriero.checkpoint.load import load_model
from arriero.errors import ConfigError
from arriero.infer import native_step
from arriero.infer.config import SamplingConfig
from arriero.infer.generate import Session, generate, stream
from arriero.model.lora import LoraLinear, add_lora, merged_copy
from arriero.model.lora_config import LoraConfig
from arriero.tokenizer.chat import encode_chat

GREEDY = SamplingConfig()


@pytest.fixture(params=["native", "torch"])
def either_step(request, monkeypatch, native):
    """The same behaviour is asked of the C++ step and of its twin."""
    if request.param == "torch":
        monkeypatch.setattr(native_step, "fits", lambda model, capacity: False)


def transformers_greedy(model, prompts, n, stops=()):
    config = ReferenceConfig(**model.config.to_hf("float32"))
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    reference = LlamaForCausalLM(config).eval()
    reference.load_state_dict(model.state_dict())
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False,
            eos_token_id=list(stops) or None, pad_token_id=0,
        )  # fmt: skip
        answers.append([i for i in out[0, len(prompt) :].tolist() if i not in stops])
    return answers


def new_ids(completions):
    return [completion.ids for completion in completions]


def test_greedy_ragged_batches_are_transformers_greedy(either_step, model, tokenizer, ids):
    expected = transformers_greedy(model, ids, 23)
    assert new_ids(generate(model, tokenizer, ids, GREEDY, 23, stop_ids=(), batch=3)) == expected
    assert [new_ids(generate(model, tokenizer, [p], GREEDY, 23, stop_ids=()))[0] for p in ids] == expected


def test_stop_tokens_end_a_row_and_are_left_out(either_step, gqa, tokenizer, ids):
    free = generate(gqa, tokenizer, ids, GREEDY, 17, stop_ids=())
    stop = free[1].ids[6]
    done = []
    stopped = generate(gqa, tokenizer, ids, GREEDY, 17, stop_ids={stop}, on_done=lambda: done.append(1))
    for whole, cut in zip(free, stopped, strict=True):
        assert cut.stopped == (stop in whole.ids)
        assert cut.ids == (whole.ids[: whole.ids.index(stop)] if cut.stopped else whole.ids)
    assert stopped[1].stopped
    assert len(done) == len(ids)
    assert new_ids(stopped) == transformers_greedy(gqa, ids, 17, [stop])


def test_an_answer_ends_where_the_context_does(either_step, gqa, tokenizer):
    room = gqa.config.max_context - 200
    (answer,) = generate(gqa, tokenizer, [[5] * 200], GREEDY, 100, stop_ids=())
    assert (len(answer.ids), answer.stopped) == (room, False)


@pytest.mark.parametrize(
    ("length", "message"),
    [(0, "prompt 1: the prompt is empty"), (211, "prompt 1: the prompt has 211 tokens, .* of 211")],
)
def test_prompts_without_room_are_refused(gqa, tokenizer, length, message):
    with pytest.raises(ConfigError, match=message):
        generate(gqa, tokenizer, [[3], [5] * length])


def test_a_seed_gives_the_same_text_in_any_batch(native, gqa, tokenizer, ids):
    warm = SamplingConfig(temperature=1.0, top_p=0.95, repetition_penalty=1.1, seed=11)
    first = new_ids(generate(gqa, tokenizer, ids, warm, 13, stop_ids=(), batch=2))
    assert new_ids(generate(gqa, tokenizer, ids, warm, 13, stop_ids=(), batch=16)) == first
    other = SamplingConfig(temperature=1.0, top_p=0.95, repetition_penalty=1.1, seed=12)
    assert new_ids(generate(gqa, tokenizer, ids, other, 13, stop_ids=())) != first


def test_an_adapted_model_speaks_as_its_merged_copy_and_stays_adapted(native, gqa, tokenizer, ids):
    before = new_ids(generate(gqa, tokenizer, ids, GREEDY, 13, stop_ids=()))
    adapted = add_lora(gqa, LoraConfig(rank=3))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    after = new_ids(generate(adapted, tokenizer, ids, GREEDY, 13, stop_ids=()))
    assert after == transformers_greedy(merged_copy(adapted), ids, 13)
    assert after != before
    assert any(isinstance(m, LoraLinear) for m in adapted.modules())


def said(session, prompt, n):
    events = list(session.answer(prompt, GREEDY, n, stop_ids=()))
    return [event.token for event in events], events[0].cached


def test_a_session_reuses_the_common_prefix_and_says_what_a_fresh_one_says(either_step, gqa, tokenizer):
    session = Session(gqa, tokenizer)
    first = [7, 11, 13, 17, 19] * 9
    answer, cached = said(session, first, 5)
    assert cached == 0
    for second in ([*first, *answer, 23, 29], [*first, 31], first, [2, *first]):
        fresh, _ = said(Session(gqa, tokenizer), second, 7)
        found, cached = said(session, second, 7)
        assert found == fresh
    assert cached == 0  # the last one shares nothing
    assert said(session, [2, *first], 7) == (fresh, 45)  # all but the token whose logits are wanted


def test_a_session_that_was_left_in_mid_answer_goes_on_right(either_step, gqa, tokenizer):
    session, prompt = Session(gqa, tokenizer), [7, 11, 13] * 12
    events = session.answer(prompt, GREEDY, 20, stop_ids=())
    begun = [next(events).token for _ in range(4)]
    events.close()
    follow = [*prompt, *begun, 5]
    fresh, _ = said(Session(gqa, tokenizer), follow, 7)
    assert said(session, follow, 7) == (fresh, len(prompt) + 3)  # the last token said was never read


def test_a_session_says_why_an_answer_ended_and_its_text(either_step, gqa, tokenizer):
    session, prompt = Session(gqa, tokenizer, 64), [7, 11, 13]
    events = list(session.answer(prompt, GREEDY, 100, stop_ids=()))
    tokens = [event.token for event in events]
    assert [event.finish for event in events] == [None] * 60 + ["length"]
    assert "".join(event.text for event in events) == tokenizer.decode(tokens)
    *_, last = session.answer(prompt, GREEDY, 100, stop_ids={tokens[9]})
    assert (last.token, last.finish, last.stopped_by) == (tokens[9], "stop", tokens[9])
    with pytest.raises(ConfigError, match=r"the prompt has 64 tokens, .* of 64"):
        next(session.answer([5] * 64, GREEDY, 3))


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    return load_model(smollm2_gguf, dtype=torch.float32)


def test_the_real_model_says_what_it_says_in_transformers(native, smollm2, tokenizer):
    questions = ("Why is the sky blue?", "What is 7 times 8?")
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": q}]) for q in questions]
    stops = sorted(tokenizer.stop_ids)
    assert new_ids(generate(smollm2, tokenizer, prompts, GREEDY, 12)) == transformers_greedy(
        smollm2, prompts, 12, stops
    )


def test_streamed_text_is_whole_characters_and_joins_to_the_decoded_text(native, smollm2, tokenizer):
    prompt = tokenizer.encode("🦙🌵🦙🌵🦙🌵🦙🌵🦙🌵🦙🌵")
    (whole,) = generate(smollm2, tokenizer, [prompt], GREEDY, 20)
    pieces = list(stream(smollm2, tokenizer, prompt, GREEDY, 20))
    assert "".join(pieces) == whole.text
    assert any("🌵" in piece for piece in pieces)  # one character of several tokens
    assert not any("\ufffd" in piece for piece in pieces[:-1])
