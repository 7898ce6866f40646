"""On the real SmolLM2-135M-Instruct, against transformers' forward on the same weights."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from arriero import cli
from arriero.checkpoint.hf import save_hf
from arriero.data.formats import Conversation
from arriero.errors import CheckpointError, ConfigError, DataError
from arriero.eval.config import EvalConfig, NeedleConfig
from arriero.eval.generative import answers
from arriero.eval.needle_run import run_needle
from arriero.eval.perplexity import perplexity
from arriero.eval.run import run_eval
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.tokenizer import load_tokenizer
from arriero.tokenizer.chat import encode_chat
from arriero.tokenizer.template import ChatTemplate

TEXT = """The llama is a domesticated South American camelid, widely used as a meat and pack animal by Andean cultures
since the pre-Columbian era. Llamas are social animals and live with others as a herd. Their wool is soft and contains
only a small amount of lanolin. Llamas can learn simple tasks after a few repetitions: def leads(herd): return herd[0]
"""
TURNS = [
    [("user", "What is 2 + 2? Answer with one number."), ("assistant", "4")],
    [("system", "You are terse."), ("user", "Name the capital of France."), ("assistant", "Paris.")],
    [("user", "Hi"), ("assistant", "Hello."), ("user", "Say bye."), ("assistant", "Good bye, and come again!")],
]


def conversations() -> list[Conversation]:
    messages = ([{"role": role, "content": content} for role, content in turns] for turns in TURNS)
    return [Conversation(m, None, "rows.jsonl", i) for i, m in enumerate(messages, start=1)]


def test_rolling_perplexity_equals_a_plain_transformers_loop(smollm2, smollm2_in_transformers):
    ids = [smollm2[1].bos_id, *smollm2[1].encode(TEXT)]
    window, context = 47, 19
    nats, start, first = 0.0, 0, 0
    with torch.inference_mode():
        while first < len(ids) - 1:
            end = min(start + window, len(ids) - 1)
            logprobs = smollm2_in_transformers(torch.tensor([ids[start:end]])).logits[0].log_softmax(-1)
            for i in range(first, end):
                nats -= logprobs[i - start, ids[i + 1]].item()
            first, start = end, end - context + 1
    found = perplexity(*smollm2, TEXT, window=window, context=context)
    n_tokens, n_bytes = len(ids) - 1, len(TEXT.encode())
    assert found.tokens.sum() == n_tokens
    assert found.perplexity.value == pytest.approx(math.exp(nats / n_tokens), rel=1e-4)
    assert found.bits_per_byte.value == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert 10 < found.perplexity.value < 60, "a language model that works; noise has 49,152"


def test_answers_cost_and_read_what_transformers_says(smollm2, smollm2_in_transformers):
    tokenizer = smollm2[1]
    found = answers(*smollm2, conversations(), max_new_tokens=13, batch=2)
    bits, tokens = [], []
    for row, sample in zip(conversations(), found.samples, strict=True):
        prompt = encode_chat(tokenizer, row.messages[:-1])
        answer = [*tokenizer.encode(row.messages[-1]["content"]), tokenizer.special_ids["<|im_end|>"]]
        ids = torch.tensor([prompt + answer])
        with torch.inference_mode():
            logprobs = smollm2_in_transformers(ids).logits[0].log_softmax(-1)
            written = smollm2_in_transformers.generate(
                ids[:, : len(prompt)], max_new_tokens=13, do_sample=False, eos_token_id=2, pad_token_id=2
            )[0, len(prompt) :].tolist()
        bits.append(-sum(logprobs[len(prompt) + k - 1, token].item() for k, token in enumerate(answer)) / math.log(2))
        tokens.append(len(answer))
        assert sample.answer == tokenizer.decode(written).strip()
        assert sample.scores["stopped"] == float(2 in written)
        assert sample.reference == row.messages[-1]["content"]
    assert found.ratios["bits_per_token"].over == pytest.approx(bits, rel=1e-4)
    assert found.ratios["bits_per_token"].under.tolist() == tokens
    assert found.samples[1].prompt == "system: You are terse.\n\nuser: Name the capital of France."
    assert found.samples[0].prompt == "What is 2 + 2? Answer with one number."


def test_bits_per_byte_of_an_answer_are_over_the_bytes_that_the_template_leaves_of_it(smollm2):
    tokenizer = copy.copy(smollm2[1])
    source = tokenizer.chat_template.source.replace("message['content']", "message['content'] | trim")
    assert source != tokenizer.chat_template.source
    tokenizer.chat_template = ChatTemplate(source, {})
    rows = [Conversation([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}], None, "f", 1)
            for text in ("Olá!", "  Olá!\n\n")]  # fmt: skip
    for t, sizes in ((smollm2[1], [5, 9]), (tokenizer, [5, 5])):
        found = answers(smollm2[0], t, rows, max_new_tokens=1)
        assert found.ratios["bits_per_byte"].under.tolist() == sizes


def test_the_batch_size_changes_no_answer(smollm2):
    rows = conversations()
    alone, together = (answers(*smollm2, rows, max_new_tokens=7, batch=batch) for batch in (1, 3))
    assert [sample.answer for sample in alone.samples] == [sample.answer for sample in together.samples]


def test_a_row_without_a_text_to_compare_with_is_refused(smollm2):
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    row = Conversation([{"role": "user", "content": "Go"}, call], None, "rows.jsonl", 7)
    with pytest.raises(DataError, match=r"row 7 of rows\.jsonl: its last message holds no text"):
        answers(*smollm2, [row])


def test_the_last_answer_is_measured_whatever_the_marks_for_training_say(smollm2):
    row = conversations()[2]
    marked = [{**row.messages[0], "train": 0}, {**row.messages[1], "weight": 1}, row.messages[2]]
    marked.append({**row.messages[3], "loss": False})
    found = [answers(*smollm2, [r], max_new_tokens=1) for r in (row, replace(row, messages=marked))]
    assert len({f.ratios["bits_per_token"].over.tolist()[0] for f in found}) == 1
    assert found[0].ratios["bits_per_token"].under == found[1].ratios["bits_per_token"].under


def test_a_row_that_the_template_refuses_is_named(smollm2):
    row = conversations()[0]
    row.messages[1]["reasoning"] = "2 and 2"
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    with pytest.raises(DataError, match=r"row 1 of rows\.jsonl: message 1 \(assistant\): .*reasoning"):
        answers(*smollm2, [row])
    with pytest.raises(DataError, match=r"row 1 of rows\.jsonl: its last message holds no text"):
        answers(*smollm2, [replace(row, messages=[row.messages[0], calls])])


def test_a_prompt_that_leaves_no_room_is_refused(smollm2):
    row = conversations()[0]
    with pytest.raises(DataError, match=r"row 1 of rows\.jsonl: its prompt of \d+ tokens leaves no room"):
        answers(*smollm2, [row], max_new_tokens=8180)


def test_eval_compares_a_model_with_itself_and_finds_no_difference(smollm2_gguf, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    rows = ({"messages": conversation.messages} for conversation in conversations())
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(smollm2_gguf)
    config = EvalConfig(
        model=model,
        data=str(data),
        compare_with=model,
        out=str(tmp_path / "out"),
        max_new_tokens=7,
        rows=2,
        resamples=100,
    )
    run_eval(config)
    shown = capsys.readouterr().out
    assert shown.count("unclear") == 7
    assert "Name the capital of France." in shown
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["rows"] == 2
    assert found["measures"]["rouge_l"]["difference"]["value"] == 0
    sample = json.loads((tmp_path / "out/samples.jsonl").read_text().splitlines()[0])
    assert sample["before"] == sample["after"]


@pytest.mark.parametrize(
    ("text", "mark"), [(TEXT[:97], b""), ("a\r\nb\rc\nd\u2028e\u2029f\x85g\x0bh\x0ci\x1cj\r\n", b"\xef\xbb\xbf")]
)
def test_eval_reads_texts_and_rows_with_texts_alike(smollm2_gguf, tmp_path, capsys, text, mark):
    (tmp_path / "a.txt").write_bytes(mark + text.encode())
    (tmp_path / "a.jsonl").write_bytes(mark + json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\n")
    found = [
        run_eval(EvalConfig(model=str(smollm2_gguf), data=str(tmp_path / name), precision="fp32", resamples=100))
        for name in ("a.txt", "a.jsonl")
    ]
    assert found[0].ratios["perplexity"].value == found[1].ratios["perplexity"].value
    assert found[0].ratios["bits_per_byte"].under.sum() == found[1].ratios["bits_per_byte"].under.sum()
    assert found[0].ratios["bits_per_byte"].under.sum() == len(text.encode())  # the file's own, without the mark
    assert "bits per byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.txt", None, r"no\.txt: no such file"),
        ("broken.jsonl", b"{", r"row 1 of .*broken\.jsonl: broken JSON"),
        ("latin.txt", b"\xe9", r"latin\.txt: not UTF-8 at byte 0"),
        ("mixed.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"row 2 of .*mixed\.jsonl: no text in a column 'text'"),
        ("other.jsonl", b'{"a": 1}\n', r"row 1 of .*other\.jsonl: no known layout"),
        ("null.jsonl", b'{"text": null, "a": 1}\n', r"row 1 of .*null\.jsonl: no known layout"),
        ("short.csv", b"text,id\na,1\nb\n", r"row 2 of .*short\.csv: it has fewer fields than the header's 2"),
    ],
)
def test_data_that_cannot_be_used_is_refused_before_a_model_is_loaded(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        run_eval(EvalConfig(model="no-such-model", data=str(tmp_path / name)))


@pytest.mark.parametrize("run", [run_eval, run_needle])
def test_a_place_that_results_cannot_be_written_to_is_refused_before_a_model_is_loaded(tmp_path, run):
    (tmp_path / "a.txt").write_text(TEXT)
    config = (
        NeedleConfig("no-such-model") if run is run_needle else EvalConfig("no-such-model", str(tmp_path / "a.txt"))
    )
    with pytest.raises(ConfigError, match=r"a\.txt: nothing can be written there .it is a file."):
        run(replace(config, out=str(tmp_path / "a.txt")))


def test_a_missing_adapter_is_refused_before_anything_is_measured(smollm2_gguf, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXT)
    monkeypatch.setattr("arriero.eval.run.load", lambda *args, **kwargs: pytest.fail("loaded a model first"))
    model = str(smollm2_gguf)
    config = EvalConfig(model=model, compare_with=model, adapter="nowhere/adapter", data=str(tmp_path / "a.txt"))
    with pytest.raises(CheckpointError, match="nowhere/adapter"):
        run_eval(config)


def test_a_missing_name_and_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="eval: no data given; run: arriero eval MODEL --data FILE"):
        run_eval(EvalConfig(model="smollm2-135m"))
    with pytest.raises(ConfigError, match="context 64 is not below window 64"):
        EvalConfig(window=64, context=64)
    with pytest.raises(ConfigError, match="resamples is 10; an interval needs at least 100"):
        EvalConfig(resamples=10)


def test_a_model_whose_outputs_are_no_numbers_ends_in_an_error_after_all_is_written(smollm2_gguf, tmp_path, capsys):
    tokenizer = load_tokenizer(smollm2_gguf)
    shape = LlamaConfig(22, 1, 11, 11, 29, tokenizer.vocab_size, 128, tied_embeddings=True)
    good = Llama(shape).init_weights(seed=3)
    save_hf(good, tmp_path / "good", tokenizer)
    torch.nn.init.constant_(good.model.norm.weight, 3e38)  # finite, but what comes of it is not
    save_hf(good, tmp_path / "overflows", tokenizer)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": TEXT[i : i + 31]}) + "\n" for i in range(7)))
    names = [str(tmp_path / name) for name in ("overflows", "good")]
    for name, other in (names, names[::-1]):
        command = ["eval", name, "--compare-with", other, "--data", str(tmp_path / "a.jsonl"), "--resamples", "100"]
        assert cli.main([*command, "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr()
        assert "overflows: bits per token, bits per byte, perplexity not finite (in 7 of 7 rows" in said.err
        assert said.out.count("unclear") == 3 and "better" not in said.out and "nan" not in said.out
        found = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
        assert found["measures"]["perplexity"]["difference"]["value"] is None
