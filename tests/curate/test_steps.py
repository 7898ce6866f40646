"""Each step alone, against texts that a person can judge and slow twins."""

import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest

from arriero.curate import classifier
from arriero.curate.analysis import analyse
from arriero.curate.batch import Batch, category
from arriero.curate.document import Document
from arriero.curate.minhash import MinHashConfig
from arriero.curate.steps import corpus as corpus_steps
from arriero.curate.steps.corpus import (
    AT_ONCE,
    ExactDedup,
    KeyFile,
    LineDedup,
    NearDedup,
    UrlDedup,
    canonical_url,
)
from arriero.curate.steps.decontaminate import Decontaminate
from arriero.curate.steps.language import CODES, Language, _detector
from arriero.curate.steps.licence import Licence, licences
from arriero.curate.steps.normalise import Normalise
from arriero.curate.steps.quality import Quality
from arriero.curate.steps.scrub import Scrub
from arriero.errors import ConfigError, DataError

from .conftest import dropped, kept, prose, run


def documents(*texts, **fields):
    return [Document(text, str(i), **fields) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("cafe\u0301", "café"),
        ("zero\u200bwidth\ufeff and soft\u00adhyphen", "zerowidth and softhyphen"),
        ("bell\x07 null\x00 tab\t kept", "bell null tab\t kept"),
        ("\n \n  first line keeps its indent\n\n\n\n\nnext\n \n", "  first line keeps its indent\n\n\nnext"),
        ("می\u200cخواهم 👩\u200d👧", "می\u200cخواهم 👩\u200d👧"),
        (" \n\u200b\n", ""),
    ],
)
def test_normalisation_gives_one_form_and_giving_it_again_changes_nothing(before, after):
    assert Normalise().text(before) == after
    assert Normalise().text(after) == after


def test_code_keeps_its_blank_lines():
    code = "def f():\n    pass\n\n\n\n\ndef g():\n    pass"
    [(document, _)] = Normalise().run(Batch(documents(code), is_code=True))
    assert document.text == code


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The llama is a domesticated camelid of South America, kept for its wool and as a pack animal.", "en"),
        ("Das Lama ist eine Art der Kamele. Es ist in den südamerikanischen Anden verbreitet.", "de"),
        ("La llama es un mamífero artiodáctilo doméstico de la familia Camelidae, abundante en la Puna.", "es"),
        ("リャマは、南アメリカ大陸のアンデス山脈に生息するラクダ科の家畜である。", "ja"),
    ],
)
def test_languages_are_told_apart(text, language):
    code, score = Language().detect(text)
    assert code == language and score > 0.65


@pytest.mark.parametrize(
    ("code", "meant"),
    [
        *(
            ("jp", "ja"),
            ("kr", "ko"),
            ("cn", "zh"),
            ("cz", "cs"),
            ("dk", "da"),
            ("gr", "el"),
            ("gb", "en"),
            ("us", "en"),
        ),
        *(("eng", "en"), ("jpn", "ja"), ("deu", "de"), ("ger", "de"), ("fre", "fr"), ("cmn", "zh"), ("iw", "he")),
        *(("EN", "en"), ("en-US", "en"), ("zh_CN", "zh"), ("pt-BR", "pt"), ("Japanese", "ja"), ("german", "de")),
    ],
)
def test_a_language_that_the_model_does_not_know_is_refused_with_the_nearest(code, meant):
    with pytest.raises(
        ConfigError, match=f"language.keep has {code!r}, which the model does not know; did you mean {meant!r}"
    ):
        Language(keep=("en", code))


def test_the_codes_are_those_of_the_model():
    detector = _detector()
    detector.detect("llama", model="lite")
    [model] = detector._models.values()
    labels = {label.removeprefix("__label__") for _, label in model.f.predict("llama\n", 1000, -1.0, "strict")}
    assert labels == CODES


def test_a_text_without_words_has_no_language():
    [(document, reason)] = Language().run(Batch(documents(" \n ")))
    assert reason == "language: " and document.meta == {"language": "", "language_score": 0.0}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("mail jane.doe+x@mail.example.org, or <bob@x.co>", "mail email@example.com, or <email@example.com>"),
        ("not one: user@localhost, @decorator, a@b, x @ y.com", None),
        ("hosts 8.8.8.8, 93.184.216.34:80", "hosts 192.0.2.1, 192.0.2.1:80"),
        ("stay: 10.0.0.1, 192.168.1.1, 127.0.0.1, 255.255.255.255, 999.1.1.1, v1.2.3.4, 1.2.3.4.5, 1.2.3", None),
    ],
)
def test_addresses_are_replaced_and_what_only_looks_like_one_is_not(before, after):
    assert Scrub().text(before) == (before if after is None else after)


@pytest.mark.parametrize(
    ("text", "meta", "expected"),
    [
        ("// SPDX-License-Identifier: Apache-2.0\nint x;", {}, ["apache-2.0"]),
        ("# Permission is hereby granted, free of\n# charge, to any person obtaining a copy\n", {}, ["mit"]),
        (" * Redistribution and use in source and\n * binary forms, with or without\n", {}, ["bsd"]),
        ("# under the terms of the GNU Lesser\n# General Public License\n", {}, ["lgpl"]),
        ("# it under the terms of the GNU General Public License as published\n", {}, ["gpl"]),
        ("x = 1\n", {"licenses": ["MIT", "GPL-3.0"]}, ["mit", "gpl-3.0"]),
        ("x = 1\n", {}, []),
    ],
)
def test_a_licence_is_found_in_the_row_or_in_the_header(text, meta, expected):
    assert licences(Document(text, "x", meta=meta)) == expected


def test_files_are_kept_by_their_licence_and_the_unknown_by_choice():
    batch = Batch([*documents("# the MIT License\n", "# GNU General Public License\n", "x = 1\n")], is_code=True)
    assert [reason for _, reason in Licence().run(batch)] == [None, "licence: gpl", None]
    assert [reason for _, reason in Licence(keep_unknown=False).run(batch)][2] == "licence: none found"


def decided(step, parts, tmp_path):
    """Run a corpus step over parts (lists of documents) by its three moves; returns [(id, reason)] and new texts."""
    files, before = [], 0
    for number, part in enumerate(parts):
        records = step.pack([step.collect(Batch(part), range(len(part)))])
        np.save(tmp_path / f"{number}.npy", records)
        files.append(KeyFile(tmp_path / f"{number}.npy", len(records), before))
        before += len(part)
    arrays = [step.reduce(files, piece) for piece in step.ranges(files)]
    results = []
    for number, part in enumerate(parts):
        decisions = corpus_steps.Decisions(arrays, number, files[number].documents_before, lambda p, r: parts[p][r])
        results += step.decide(Batch(part), range(len(part)), decisions)
    return results


def cut(members, rng):
    members = list(members)
    while members:
        n = rng.randint(1, 7)
        yield members[:n]
        members = members[n:]


@pytest.fixture
def many_ranges(monkeypatch):
    """A reduction holds 5 records at most, so that the keys fall into many ranges."""
    monkeypatch.setattr(corpus_steps, "AT_ONCE", 5)
    assert AT_ONCE > 1_000_000


def test_exact_duplicates_are_those_of_a_set(tmp_path, many_ranges):
    rng = random.Random(0)
    members = [Document(rng.choice("abcdefghijklm") * rng.randint(1, 3), str(i)) for i in range(97)]
    results = decided(ExactDedup(), list(cut(members, rng)), tmp_path)
    seen: set[str] = set()
    for document, reason in results:
        assert reason == ("same text" if document.text in seen else None)
        seen.add(document.text)


def test_of_equal_urls_the_newest_is_kept(tmp_path, many_ranges):
    rng = random.Random(1)
    dates = ["", "gibberish", "2020-01-01", "2021-05-05T10:00:00Z", "2021-05-05T13:00:00+02:00", "2019"]
    members = [
        Document(
            f"text {i}",
            str(i),
            url=rng.choice(["", *(f"https://x.org/{k}" for k in range(13))]),
            date=rng.choice(dates),
        )
        for i in range(97)
    ]
    results = decided(UrlDedup(), list(cut(members, rng)), tmp_path)
    age = {date: corpus_steps._seconds(date) for date in dates}
    assert age["2021-05-05T13:00:00+02:00"] > age["2021-05-05T10:00:00Z"] > age["2020-01-01"] > age["gibberish"]
    best = {}
    for document in members:
        if document.url and (document.url not in best or age[document.date] > age[best[document.url].date]):
            best[document.url] = document
    left = [document.id for document, reason in results if reason is None]
    assert left == [d.id for d in members if not d.url or best[d.url] is d]


def test_spellings_of_a_url_are_one():
    same = ["https://www.X.org/a/", "http://x.org/a", "https://x.org:443/a#part", " https://x.org/a "]
    assert {canonical_url(url) for url in same} == {"x.org/a"}
    assert canonical_url("https://x.org/a?b=1") != canonical_url("https://x.org/a?b=2")
    assert canonical_url("https://[broken") == "https://[broken"


def test_lines_of_more_than_so_many_documents_are_removed_within_their_bucket(tmp_path, many_ranges):
    rng = random.Random(2)
    lines = [f"line number {i}" for i in range(23)]
    members = [Document("\n".join(rng.choices(lines, k=rng.randint(1, 9))), str(i)) for i in range(97)]
    parts = list(cut(members, rng))
    step = LineDedup(more_than=6, bucket=31)
    results = decided(step, parts, tmp_path)
    starts = itertools.accumulate((len(part) for part in parts), initial=0)
    buckets = [start // 31 for start, part in zip(starts, parts, strict=False) for _ in part]
    for bucket in set(buckets):
        ours = [i for i, b in enumerate(buckets) if b == bucket]
        count = {line: sum(line in members[i].text.split("\n") for i in ours) for line in lines}
        for i in ours:
            left = [line for line in members[i].text.split("\n") if count[line] <= 6]
            document, reason = results[i]
            assert reason == (None if left else "only frequent lines")
            assert document.text == "\n".join(left)


def test_near_duplicates_across_parts_keep_the_first(tmp_path):
    texts = [prose(i) for i in range(11)]
    near = [text.replace(" llama ", " alpaca ", 1) + " And so on." for text in texts[2:5]]
    parts = [documents(*texts[:6]), documents(*near, "too short"), documents(*texts[6:], texts[0])]
    results = decided(NearDedup(MinHashConfig()), parts, tmp_path)
    assert [i for i, (_, reason) in enumerate(results) if reason] == [6, 7, 8, 15]
    twin = results[6][1]
    assert (twin.part, twin.row) == (0, 2)


def evaluation(tmp_path):
    rows = [
        {"question": "How many crias does the oldest llama of the village have in the third year?", "answer": "18"},
        {"question": "Name the river that carries stone to the bridge.", "answer": {"text": "The quiet river"}},
    ]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_documents_with_evaluation_texts_are_found_whatever_their_case_and_punctuation(tmp_path):
    step = Decontaminate(against=(str(evaluation(tmp_path)),))
    batch = Batch(
        documents(
            prose(1),
            "Quiz: HOW many crias does the oldest Llama, of the village, have in the third year? I ask.",
            "Did it name the river that carries stone to the bridge? It did.",
            "How many crias does the oldest llama of the village have?",
            "the quiet river, 18",
            "Name the river that carries",
            "stone to the bridge.",
        )
    )
    reasons = [reason for _, reason in step.run(batch)]
    assert [reason and str(reason) for reason in reasons] == [
        None, "in test.jsonl: row 1", "in test.jsonl: row 2", None, None, None, None,
    ]  # fmt: skip
    assert reasons[1].details["text"].startswith("HOW many crias does the oldest Llama, of the village")
    assert reasons[2].details == {
        "evaluation": "test.jsonl", "row": 2, "text": "name the river that carries stone to the bridge",
    }  # fmt: skip


def test_what_was_hit_is_listed_in_the_output(corpus, tmp_path):
    with open(corpus / "c.jsonl", "w") as file:
        leaked = prose(500) + "\nHow many crias does the oldest llama of the village have in the third year? 18"
        file.write(json.dumps({"text": leaked, "id": "leak"}) + "\n")
    step = Decontaminate(against=(str(evaluation(tmp_path)),))
    manifest = run(corpus, tmp_path / "out", steps=("normalise", "decontaminate"), decontaminate=step)
    assert manifest["contaminated"] == {"test.jsonl": 1}
    [hit] = map(json.loads, (tmp_path / "out" / "decontamination.jsonl").read_text().splitlines())
    assert (hit["document"], hit["evaluation"], hit["row"]) == ("leak", "test.jsonl", 1)
    assert "leak" not in {document.id for document in kept(tmp_path / "out")}
    evaluation(tmp_path).write_text('{"q": "another question that is eight words long"}\n')
    with pytest.raises(ConfigError, match=r"changed: the content of .*test\.jsonl"):
        run(corpus, tmp_path / "out", steps=("normalise", "decontaminate"), decontaminate=step)


def test_evaluation_files_without_texts_are_refused(tmp_path):
    (tmp_path / "short.txt").write_text("yes\nno\n")
    with pytest.raises(DataError, match="no text of 8 words or more to search for; lower decontaminate"):
        Decontaminate(against=(str(tmp_path / "short.txt"),)).run(Batch(documents("x")))


def noise(seed):
    rng = random.Random(seed)
    return " ".join(rng.choice(["click", "buy", "free", "now", "win", "the", "best", "deal"]) for _ in range(50))


def kinds(tmp_path, n=60):
    for name, make in (("good", prose), ("random", noise)):
        rows = [json.dumps({"text": make(i)}) + "\n" for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    return [tmp_path / "good.jsonl"], [tmp_path / "random.jsonl"]


def test_a_trained_classifier_tells_unseen_documents_apart(corpus, tmp_path):
    trained = classifier.train(*kinds(tmp_path), tmp_path / "q.safetensors")
    assert trained.report["accuracy"] > 0.95 and trained.report["auc"] > 0.95
    assert sum(trained.report["trained_on"].values()) + sum(trained.report["held_out"].values()) == 120
    scores = trained.score(analyse([prose(900), noise(900), ""]))
    assert scores[0] > 0.7 and scores[1] < 0.3
    loaded = classifier.load(str(tmp_path / "q.safetensors"))
    assert np.array_equal(loaded.weights, trained.weights)
    assert (loaded.bias, loaded.report) == (trained.bias, trained.report)
    (corpus / "c.jsonl").write_text(json.dumps({"text": noise(901), "id": "noise"}) + "\n")
    step = Quality(model=str(tmp_path / "q.safetensors"))
    manifest = run(corpus, tmp_path / "out", steps=("normalise", "quality"), quality=step)
    assert "quality … < 0.5" in dropped(manifest)["quality"]
    assert "noise" not in {d.id for d in kept(tmp_path / "out")}
    assert all(d.meta["quality"] >= 0.5 for d in kept(tmp_path / "out") if d.source != "code")


def test_accuracy_has_an_interval_that_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    good, random_ = 0.93, 0.71
    held = 0
    for _ in range(2000):
        low, high = classifier.balanced_interval([(rng.binomial(41, good), 41), (rng.binomial(67, random_), 67)])
        held += low <= (good + random_) / 2 <= high
    assert 0.93 < held / 2000 < 0.98
    low, high = classifier.balanced_interval([(11, 11), (13, 13)])  # no point where all are right
    assert low < 0.95 and high == 1


def test_a_classifier_of_damaged_weights_is_refused(tmp_path):
    trained = classifier.train(*kinds(tmp_path), tmp_path / "q.safetensors", epochs=1)
    weights = trained.weights.copy()
    weights[7] = np.nan
    classifier.save(replace(trained, weights=weights), tmp_path / "nan.safetensors")
    with pytest.raises(DataError, match=r"nan\.safetensors: its weights are not finite, so it judges nothing"):
        classifier.load(str(tmp_path / "nan.safetensors"))


def test_training_twice_gives_the_same_file(tmp_path):
    for name in "ab":
        classifier.train(*kinds(tmp_path), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_scores_and_the_area_under_the_curve_are_those_of_their_definitions(tmp_path):
    trained = classifier.train(*kinds(tmp_path), tmp_path / "q.safetensors")
    text = prose(77)
    words = analyse([text]).content[0].tolist()
    grams = {w >> 44 for w in words}
    grams |= {(a * 0x9E3779B97F4A7C15 % 2**64 ^ b) >> 44 for a, b in itertools.pairwise(words)}
    logit = trained.bias + sum(float(trained.weights[g]) for g in sorted(grams)) / len(grams) ** 0.5
    assert trained.score(analyse([noise(3), text]))[1] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)
    rng = np.random.default_rng(0)
    score, truth = rng.integers(0, 7, 53) / 7, rng.random(53) < 0.4
    pairs = [(g > b) + 0.5 * (g == b) for g in score[truth] for b in score[~truth]]
    assert classifier.area_under_curve(score, truth) == pytest.approx(np.mean(pairs))


def test_too_few_examples_and_files_that_are_no_classifier_are_refused(tmp_path):
    good, bad = kinds(tmp_path, 19)
    with pytest.raises(DataError, match=r"19 good documents in .*good\.jsonl; at least 20 are needed"):
        classifier.train(good, bad, tmp_path / "q")
    (tmp_path / "x").write_bytes(b"no")
    with pytest.raises(DataError, match=r"not a safetensors file .*; train the classifier again"):
        classifier.load(str(tmp_path / "x"))
    with pytest.raises(DataError, match="no such file; train a classifier with `arriero curate classifier`"):
        classifier.load(str(tmp_path / "y"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Language(keep=("english",)),
            r"language\.keep has .english., which the model does not know; did you mean .en.\?",
        ),
        (
            lambda: Licence(keep=("MIT",)),
            r"licence\.keep has .MIT.; give the beginning of a name in lower case.*: .mit.",
        ),
        (lambda: Language(min_score=2), r"language\.min_score is 2; it must be from 0 to 1"),
        (lambda: Quality(min_score=-1), r"quality\.min_score is -1; it must be from 0 to 1"),
        (lambda: LineDedup(more_than=0), r"line_dedup\.more_than is 0; it must be at least 1"),
        (lambda: Decontaminate(ngram=5), r"decontaminate\.min_words is 8 and ngram 5; both at least 1, in this order"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_reasons_are_counted_by_what_they_share():
    assert category("words 13 < 50") == category("words 7 < 50") == "words … < 50"
    assert category("dup_5gram_char_frac 0.153 > 0.15") == "dup_5gram_char_frac … > 0.15"
    assert category("language: de") == "language"


def test_other_numbers_are_other_words(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"answer": "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41"}))
    step = Decontaminate(against=(str(tmp_path / "test.jsonl"),))
    days = "Days of the months: 31 28 31 30 31 30 31 31 30 31 30 31 30 and so on, we learn them by heart."
    primes = "The first primes are 2 3 5 7 11 13 17 19 23 29 31 37 41 and so on."
    found = [reason and str(reason) for _, reason in step.run(Batch(documents(days, primes)))]
    assert found == [None, "in test.jsonl: row 1"]
