"""Needles: the texts by hand, the cached reading against a plain forward, and the real model, which finds them."""

import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from rich.console import Console

from arriero import cli
from arriero.checkpoint.hf import save_hf
from arriero.errors import ConfigError, DataError
from arriero.eval.config import NeedleConfig
from arriero.eval.needle import Haystack, Needle, Reader, bits_by_position, find_needles, hide, prose
from arriero.eval.needle_run import run_needle
from arriero.model.build import build_model
from arriero.model.config import LlamaConfig, Qwen3Config
from arriero.model.llama import Llama

SHAPES = {
    "llama": LlamaConfig(44, 2, 11, 11, 53, 131, 61),
    "qwen3": Qwen3Config(44, 2, 6, 2, 53, 131, 61, head_dim=22),
}
PROSE = "".join(f"Llama {i} walks over the hill. And it hums!\n\nNobody knows why {i} hums so.\n" for i in range(99))


class Letters:
    """The smallest tokenizer: an id a letter, and id 1 before a text."""

    bos_id, eos_id = 1, None
    vocab_size, unused_ids = 3 + 0x110000, []

    def encode_segments(self, texts, *, at_start):
        assert not any(at_start), "a needle continues a text"
        return [[3 + ord(letter) for letter in text] for text in texts]

    def decode(self, ids):
        return "".join(chr(i - 3) if i >= 3 else "?" for i in ids)

    def text_bytes(self, ids):
        return np.array([1.0 + i % 2 for i in ids])


LETTERS = Letters()
LIMA, OSLO = Needle("Lima", "12345"), Needle("Oslo", "67890")


def text_with(hidden, length, start=0.0):
    ids = hide(LETTERS, Haystack(LETTERS, PROSE, length), start, hidden, length)
    assert ids[0] == 1
    return LETTERS.decode(ids[1:])


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("start", [0.0, 0.37])
def test_a_text_is_exactly_as_long_as_said_with_the_needle_at_its_depth_between_sentences(depth, start):
    length = 601
    text = text_with([(depth, LIMA)], length, start)
    assert 1 + len(text + LIMA.question + " 12345.") == length
    before, found, after = text.partition(LIMA.fact)
    assert found and before + after in PROSE
    room = len(before) + len(after)
    assert depth * room <= len(before) <= depth * room + 40, "no further than a sentence"
    assert not before or after == "" or before.rstrip()[-1] in ".!"


def test_several_needles_stand_in_the_order_of_their_depths():
    text = text_with([(1.0, LIMA), (0.0, OSLO)], 499)
    assert text.startswith(OSLO.fact) and text.endswith(LIMA.fact)
    assert 1 + len(text + LIMA.question + " 12345.") == 499


def test_trials_read_other_prose():
    assert text_with([(0.5, LIMA)], 499, 0.0) != text_with([(0.5, LIMA)], 499, 0.5)


def test_prose_stops_when_there_is_enough():
    endless = (f"{i} llamas. " for i in itertools.count())
    assert prose(endless, 30) == "0 llamas. \n\n1 llamas. \n\n2 llamas. "


@pytest.fixture(params=SHAPES)
def model(request):
    """Llama decodes in C++, Qwen3 through torch."""
    return build_model(SHAPES[request.param]).init_weights(std=0.3, seed=3).requires_grad_(False).eval()


def bits_alone(model, ids, answer):
    """-log2 p of each token of `answer` after `ids`: one forward, whole logits."""
    logprobs = model(torch.tensor([[*ids, *answer]]))[0].log_softmax(-1)
    return [-logprobs[len(ids) + i - 1, token].item() / math.log(2) for i, token in enumerate(answer)]


def test_reading_what_two_texts_share_once_changes_nothing(model):
    generator = torch.Generator().manual_seed(1)
    first, rest, answer = (torch.randint(3, 131, (n,), generator=generator).tolist() for n in (701, 37, 7))
    reader = Reader(model, LETTERS, 800)
    for ids in (first, first[:233] + rest, first[:233], first):  # grows, branches off, shrinks, grows again
        expected = bits_alone(model, ids, answer)
        for _ in range(2):
            assert reader.bits(ids, [answer, answer[:2]]) == [
                pytest.approx(expected, rel=1e-4), pytest.approx(expected[:2], rel=1e-4)
            ]  # fmt: skip
        plain = list(ids)
        for _ in range(5):
            plain.append(int(model(torch.tensor([plain]))[0, -1].argmax()))
        assert reader.answer(ids, 5) == plain[len(ids) :]


def test_bits_by_position_equal_a_plain_loop(model):
    haystack = Haystack(LETTERS, PROSE, 900)
    found = bits_by_position(model, LETTERS, haystack, lengths=[61, 613], trials=1)
    ids = [i for sentence in haystack.cut(random.Random("0/0").random(), 613) for i in sentence]
    bits = bits_alone(model, ids[:1], ids[1:])
    sizes = [1 + i % 2 for i in ids[1:]]
    expected = [sum(bits[:60]) / sum(sizes[:60]), sum(bits[60:]) / sum(sizes[60:])]
    assert found == pytest.approx(expected, rel=1e-4)


def test_each_question_is_asked_as_often_as_said_alone_or_together(model):
    texts = []
    for together, n_texts in ((False, 3 * 2 * 2), (True, 2 * 2)):
        findings = find_needles(
            model, LETTERS, Haystack(LETTERS, PROSE, 700), lengths=[401, 701], depths=[0.0, 0.5, 1.0], trials=2,
            together=together, on_text=texts.append,
        )  # fmt: skip
        assert len(texts) == n_texts
        texts.clear()
        assert len(findings) == 3 * 2 * 2 and len({(f.length, f.depth) for f in findings}) == 6
        assert len({f.needle.key for f in findings}) == (6 if together else 2)  # trials keep theirs at every length
        assert all(f.bits > 0 for f in findings)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_neither_a_tie_nor_what_is_no_number_is_a_choice(value):
    """A head of one value throughout gives every key the same probability, or none."""
    broken = Llama(LlamaConfig(22, 1, 11, 11, 29, 131, 701)).init_weights(seed=3)
    torch.nn.init.constant_(broken.lm_head.weight, value)
    findings = find_needles(broken, LETTERS, Haystack(LETTERS, PROSE, 401), lengths=[401], depths=[0.0, 1.0], trials=3)
    assert not any(f.chosen or f.found for f in findings)


@pytest.fixture(scope="module")
def topics():
    from pydoc_data.topics import topics

    return prose((text for _, text in sorted(topics.items())), 50_000)


def test_the_real_model_finds_needles_and_does_not_where_none_is_hidden(smollm2, topics, monkeypatch):
    haystack = Haystack(smollm2[1], topics, 128)
    asked = dict(lengths=[128], depths=[0.0, 0.5, 1.0], trials=1)
    findings = find_needles(*smollm2, haystack, **asked)
    assert all(f.found and f.chosen and f.bits < 8 for f in findings)
    monkeypatch.setattr(Needle, "fact", " Nothing is said here.")
    findings = find_needles(*smollm2, haystack, **asked)
    assert not any(f.found for f in findings) and sum(f.bits for f in findings) / len(findings) > 10


@pytest.fixture(scope="module")
def toy_directory(smollm2, tmp_path_factory):
    tokenizer = smollm2[1]
    shape = LlamaConfig(22, 2, 11, 11, 29, tokenizer.vocab_size, 128, tied_embeddings=True)
    directory = tmp_path_factory.mktemp("toy") / "model"
    save_hf(build_model(shape).init_weights(seed=3), directory, tokenizer)
    return directory


def test_the_command_prints_and_writes_what_it_found(toy_directory, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    command = ["eval", "needle", str(toy_directory), "--lengths", "101", "211", "--depths", "2", "--trials", "2"]
    assert cli.main([*command, "--compare-with", str(toy_directory), "--out", str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "(context 128)" in said and "211*" in said and "* past the model's context" in said
    assert "prefers it to 9 others (chance 10%)" in said and "unclear" in said
    assert "1 of 10: chance is 10%, and a tie is no choice" in said
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"needle.png", "needle.json", "results.json", "samples.jsonl"}
    assert (tmp_path / "out" / "needle.png").read_bytes()[:4] == b"\x89PNG"
    (record,) = json.loads((tmp_path / "out" / "needle.json").read_text()).values()
    assert record["context"] == 128 and record["bits_per_byte_up_to"].keys() == {"101", "211"}
    cells = record["cells"]
    assert [(cell["length"], cell["depth"]) for cell in cells] == [(101, 0), (101, 1), (211, 0), (211, 1)]
    assert all(cell["questions"] == 2 and cell["key_bits"] > 5 for cell in cells)
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 8
    measures = json.loads((tmp_path / "out" / "results.json").read_text())["measures"]
    assert measures["found"]["difference"]["value"] == 0


def test_what_cannot_be_asked_is_refused(toy_directory, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A llama. Another llama.\n")
    quiet = Console(quiet=True)
    with pytest.raises(ConfigError, match="no model given; run: arriero eval needle MODEL"):
        run_needle(NeedleConfig(), quiet)
    with pytest.raises(DataError, match=r"the haystack has \d+ tokens, the longest text wants 512; give more prose"):
        run_needle(NeedleConfig(str(toy_directory), haystack=str(short), lengths=(512,)), quiet)
    with pytest.raises(DataError, match="64 tokens have no room for 5 needles; give longer --lengths"):
        run_needle(NeedleConfig(str(toy_directory), lengths=(64,), together=True), quiet)
    with pytest.raises(ConfigError, match="lengths has 16; a text needs at least 64 tokens"):
        NeedleConfig(lengths=(512, 16))
    with pytest.raises(ConfigError, match="depths is 11; it must be from 1 to 10"):
        NeedleConfig(depths=11)
