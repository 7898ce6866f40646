"""Structured output: every text satisfies what was asked, judged by jsonschema and re; what is hostile is an error."""

from __future__ import annotations

import gc
import json
import random
import re
import time
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
import torch
from helpers.engines import SHAPE, engine_toy
from helpers.tokenizers import small_byte_level, small_sentencepiece
from helpers.toys import toy_config, toy_model
from llguidance import LLMatcher

from arriero.checkpoint.hf import save_hf
from arriero.cli.chat import run_generate
from arriero.errors import ConfigError, UserError
from arriero.infer import structured, structured_trial
from arriero.infer.config import GenerateConfig, SamplingConfig, SamplingFlags
from arriero.infer.engine import Engine
from arriero.infer.request import Request
from arriero.infer.sample import sample, token_words
from arriero.infer.sampler_row import SamplerRow
from arriero.infer.structured import Compiler
from arriero.tokenizer import load_tokenizer
from arriero.tokenizer.llama3 import TiktokenTokenizer, special_tokens

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 7},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "é", "\n"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def small_tiktoken() -> TiktokenTokenizer:
    ranks = {bytes([i]): i for i in range(256)} | {b'{"': 256, b"ab": 257, b" a": 258, b'":': 259, b"\xc3\xa9": 260}
    return TiktokenTokenizer(ranks, special_tokens(len(ranks)))


@pytest.fixture(scope="module", params=["bytes", "tiktoken", "sentencepiece", "gguf"])
def compiler(request):
    made = {"bytes": small_byte_level, "tiktoken": small_tiktoken, "sentencepiece": small_sentencepiece}
    made["gguf"] = lambda: load_tokenizer(request.getfixturevalue("smollm2_gguf"))
    tokenizer = made[request.param]()
    with_tokenizer = Compiler(tokenizer)
    yield with_tokenizer, tokenizer
    with_tokenizer.close()


@pytest.fixture(scope="module")
def of_bytes():
    compiler = Compiler(small_byte_level(), seconds=2.0)
    yield compiler
    compiler.close()


def write(grammar, tokenizer, seed: int, most: int = 300) -> tuple[str, bool]:
    """A random text, every token drawn evenly from those allowed; and whether it came to its end."""
    constraint, ids = grammar.begin(), []
    row = SamplerRow(SamplingConfig(temperature=1.0), seed=seed, words=token_words(tokenizer))
    while len(ids) < most:
        row.allowed = constraint.mask()
        token = int(sample(torch.zeros(1, tokenizer.vocab_size), [row]).ids[0])
        constraint.accept(token)
        row.push(token)
        if token in tokenizer.stop_ids:
            assert constraint.complete
            return tokenizer.decode(ids), True
        ids.append(token)
        if constraint.done:
            return tokenizer.decode(ids), True
    return tokenizer.decode(ids), constraint.complete


def test_random_texts_satisfy_the_schema(compiler):
    compiler, tokenizer = compiler
    grammar = compiler.compile("json_schema", json.dumps(PERSON))
    ended = 0
    for seed in range(12):
        text, end = write(grammar, tokenizer, seed)
        if end:
            jsonschema.validate(json.loads(text), PERSON)
            ended += 1
    assert ended > 5


@pytest.mark.parametrize("pattern", [r"[a-c]{2,5}(é|日本)?", r" lead [0-9]+", r"(yes|no)\.", r"[^x]{3}"])
def test_random_texts_match_the_regular_expression(compiler, pattern):
    compiler, tokenizer = compiler
    grammar = compiler.compile("regex", pattern)
    for seed in range(6):
        text, end = write(grammar, tokenizer, seed)
        assert end and re.fullmatch(pattern, text, re.DOTALL), text


def test_random_texts_are_among_the_choices(compiler):
    compiler, tokenizer = compiler
    choices = ["yes", "no", 'a "quote"\n', "日本", " lead", "\\d"]
    grammar = compiler.compile("choices", choices)
    assert {write(grammar, tokenizer, seed)[0] for seed in range(60)} == set(choices)


@pytest.mark.parametrize(
    "grammar",
    [
        'start: word (" " word)*\nword: /[a-z]{1,3}/',
        'root ::= word (" " word)*\nword ::= [a-z] [a-z]? [a-z]?',  # GBNF
    ],
)
def test_random_texts_follow_the_grammar(compiler, grammar):
    compiler, tokenizer = compiler
    compiled = compiler.compile("grammar", grammar)
    for seed in range(6):
        text, _ = write(compiled, tokenizer, seed, 40)
        assert re.fullmatch(r"[a-z]{1,3}( [a-z]{1,3})*( )?", text), text


def test_what_a_tokenizer_makes_of_a_right_text_is_allowed_and_of_a_wrong_one_is_not(compiler):
    compiler, tokenizer = compiler
    grammar = compiler.compile("json_schema", json.dumps(PERSON))
    constraint = grammar.begin()
    for token in tokenizer.encode('{"name": "Ana é", "age": 43, "tags": ["a", "\\n"]}'):
        mask = constraint.mask()
        assert mask[token // 32] >> (token % 32) & 1 and not constraint.complete
        constraint.accept(token)
    assert constraint.complete and constraint.done
    constraint = grammar.begin()
    right, wrong = tokenizer.encode('{"name": "A'), tokenizer.encode('{"name": 5')
    masks = constraint.ahead(right)
    assert len(masks) == len(right) + 1 and len(constraint.ahead(wrong)) <= len(wrong)
    for token, mask in zip(right, masks, strict=False):
        assert np.array_equal(constraint.mask(), mask)
        constraint.accept(token)
    constraint = grammar.begin()
    with pytest.raises(UserError, match="the JSON schema cannot be followed further"):
        for token in wrong:
            constraint.accept(token)


def test_special_tokens_are_no_text(compiler):
    """The text of a special token may be asked for; its characters come, not the token."""
    compiler, tokenizer = compiler
    end = next(iter(tokenizer.special_ids))
    constraint = compiler.compile("choices", [end]).begin()
    mask = constraint.mask()
    assert not any(mask[i // 32] >> (i % 32) & 1 for i in tokenizer.special_ids.values())


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json_schema", '{"type": "strin"}', "the JSON schema cannot be compiled: Invalid type: strin"),
        ("json_schema", '{"type": "string", "format": "x"}', "cannot be compiled: Unknown format: x"),
        ("json_schema", '{"not": {}}', r'cannot be compiled: Unimplemented keys: \["not"\]'),
        ("json_schema", '{"uniqueItems": true}', r'Unimplemented keys: \["uniqueItems"\]'),
        ("json_schema", '{"$ref": "http://h/x"}', "Resource 'http://h/x' is not present"),
        ("json_schema", "false", "cannot be compiled: Unsatisfiable schema: schema is false"),
        ("json_schema", "{", "the JSON schema cannot be compiled: EOF while parsing"),
        ("json_schema", "[1]", "schema must be an object or boolean"),
        ("regex", "(?=a)b", "the regular expression cannot be compiled: .*look-around"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", "(a", "unclosed group"),
        ("regex", r"a[^\s\S]", "the regular expression cannot be compiled: no text satisfies it"),
        ("regex", "", "the regular expression is empty; leave it out"),
        ("grammar", 'start: "a', r"the grammar cannot be compiled: 1\(\d+\): lexer error"),
        ("grammar", "start: nothing", "the grammar cannot be compiled: .*nothing"),
        ("grammar", "", "the grammar is empty; leave it out for text without a constraint"),
        ("choices", [], "the list of choices is empty; give at least one"),
        ("choices", ["\ud800"], "the list of choices has half of a surrogate pair"),
        ("regex", "a" * (1 << 20) + "b", "the regular expression has 1,048,577 characters, and may have 1,048,576"),
    ],
)
def test_what_cannot_be_compiled_is_named(of_bytes, kind, text, message):
    with pytest.raises(ConfigError, match=message):
        of_bytes.compile(kind, text)


def slow_schema(i: int = 0) -> str:
    return json.dumps({"allOf": [{"type": "string", "pattern": f"^(.*{i}a.{{{n}}}b.*)$"} for n in range(1, 30)]})


def test_what_takes_too_long_is_stopped_while_tokens_are_chosen(of_bytes):
    row = SamplerRow(SamplingConfig(temperature=1.0), seed=1)
    future, longest, began = of_bytes.submit("json_schema", slow_schema()), 0.0, time.perf_counter()
    while not future.done():
        before = time.perf_counter()
        sample(torch.zeros(1, 4999), [row])
        longest = max(longest, time.perf_counter() - before)
    assert time.perf_counter() - began < 30
    with pytest.raises(ConfigError, match="JSON schema cannot be compiled: it took longer than 2 s; make it smaller"):
        future.result()
    assert longest < 1
    assert write(of_bytes.compile("regex", "ab"), small_byte_level(), 1) == ("ab", True)


def test_compiled_grammars_are_kept(of_bytes, monkeypatch):
    first = of_bytes.compile("regex", "a|b")
    monkeypatch.setattr(structured.structured_trial, "begin", None)
    assert of_bytes.compile("regex", "a|b") is first


def test_a_vocabulary_that_leads_nowhere_ends_the_request_alone():
    """One that lacks z: what begins with it satisfies nothing, and what comes to it cannot go on."""
    vocabulary = structured_trial.Vocabulary([b"a", b"b", b"<end>"], [2], [2]).compiled
    with pytest.raises(ValueError, match="no text satisfies it"):
        structured_trial.begin(vocabulary, LLMatcher.grammar_from_regex("z"))
    matcher = structured_trial.begin(vocabulary, LLMatcher.grammar_from_regex("[ab]z|b"))
    constraint = structured.Constraint(matcher, 1, frozenset({2}), "the regular expression")
    assert constraint.mask().tolist() == [0b011]
    constraint.accept(0)
    with pytest.raises(UserError, match="cannot be followed further: no token of the vocabulary leads on"):
        constraint.mask()


# -- in the engine ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return engine_toy(replace(SHAPE, vocab_size=307))  # more rows than the tokenizer has ids


def test_an_engines_answers_satisfy_their_grammars_beside_free_ones(model, of_bytes):
    tokenizer = small_byte_level()
    schema = of_bytes.compile("json_schema", json.dumps(PERSON))
    digits = of_bytes.compile("regex", "[0-9]{5}")
    warm = SamplingConfig(temperature=1.0, seed=3)
    requests = [
        Request([7, 9], 200, warm, grammar=schema, n=3),
        Request([7, 9], 9, warm, stop_ids=()),
        Request([7, 9], 9, warm, grammar=digits, logprobs=2, top_of="sampled"),
        Request([7, 9], 3, SamplingConfig(), grammar=digits),
    ]
    people, [free], [five], [three] = Engine(model, tokenizer).generate(requests)
    for person in people:
        if person.finish == "stop":
            jsonschema.validate(json.loads(person.text), PERSON)
    assert any(person.finish == "stop" for person in people)
    assert re.fullmatch("[0-9]{5}", five.text) and five.finish == "stop"
    assert re.fullmatch("[0-9]{3}", three.text) and three.finish == "length"
    for logprob in five.logprobs:
        assert all(tokenizer.decode([token]).isdigit() for token, _ in logprob.top)
    [[alone]] = Engine(model, tokenizer).generate(requests[1:2])
    assert free.ids == alone.ids  # a neighbour's grammar changes nothing


def test_a_grammar_that_cannot_be_followed_ends_its_request_with_the_error(model, of_bytes, monkeypatch):
    request = Request([7, 9], 9, SamplingConfig(temperature=1.0, seed=3), grammar=of_bytes.compile("regex", "[0-9]{5}"))
    engine = Engine(model, small_byte_level())
    other = engine.submit(Request([7, 9], 5, SamplingConfig(), stop_ids=()))
    mask, calls = structured.Constraint.mask, []

    def failing(self):
        calls.append(self)
        if len(calls) > 2:
            raise UserError("the regular expression cannot be followed further: too complex")
        return mask(self)

    monkeypatch.setattr(structured.Constraint, "mask", failing)
    [[answer]] = engine.generate([request])
    assert (answer.finish, len(answer.ids)) == ("error", 2)
    assert answer.error == "the regular expression cannot be followed further: too complex"
    events = []
    while engine.busy:
        events += engine.step()
    assert {event.request for event in events} == {other} and events[-1].finish == "length"


def test_a_grammar_that_llguidance_gives_up_ends_its_request_with_the_error(model, of_bytes):
    endless = of_bytes.compile("grammar", 'start: "a"{1000000,2000000}')
    [[answer]] = Engine(model, small_byte_level()).generate([Request([7, 9], 9, SamplingConfig(), grammar=endless)])
    assert answer.finish == "error" and set(answer.text) <= {"a"}
    assert answer.error.startswith("the grammar cannot be followed further: parser error: Too many items")


# -- hostile ----------------------------------------------------------------------------------------------------------


def hostile(n: int) -> list[tuple[str, object]]:
    """Schemas, expressions and grammars by somebody who wants the engine to stop."""
    rng = random.Random(11)

    def nested(depth: int, inner: object, key: str) -> str:
        return f'{{"{key}": ' * depth + json.dumps(inner) + "}" * depth

    def schema(depth: int) -> object:
        kinds = [
            "string",
            "integer",
            "number",
            "array",
            "object",
            "null",
            "boolean",
            "strin",
            7,
            None,
            ["string", "null"],
        ]
        made: dict[str, object] = {"type": rng.choice(kinds)}
        for key in rng.sample(KEYS, rng.randrange(5)):
            value = rng.choice([-1, 0, 3, 1e300, "x", [], {}, True, None, "^(a+)+$", [1, "a", None], {"$ref": "#"}])
            made[key] = schema(depth - 1) if depth and rng.random() < 0.4 else value
        return made

    big = [
        ("json_schema", nested(100_000, {}, "items")),
        ("json_schema", nested(100, {}, "items")),
        ("json_schema", nested(40, True, "anyOf")),
        ("json_schema", '{"$ref": "#"}'),
        ("json_schema", '{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}'),
        ("json_schema", json.dumps({"enum": [f"value {i}" for i in range(40_000)]})),
        ("json_schema", json.dumps({"properties": {f"p{i}": {"type": "string"} for i in range(10_000)}})),
        ("json_schema", json.dumps({"type": "array", "minItems": 10**6, "maxItems": 10**9, "items": {"type": "null"}})),
        ("json_schema", json.dumps({"type": "string", "minLength": 10**6, "maxLength": 10**18})),
        ("json_schema", '{"const": 1' + "0" * 10_000 + "}"),
        ("json_schema", '{"minimum": 1e999}'),
        ("json_schema", '{"type": "integer", "multipleOf": 123456789, "minimum": 1, "maximum": 1000000000000000}'),
        ("json_schema", '{"type": "string", "pattern": "^(([a-z]{1,100}){1,100}){1,100}x$"}'),
        ("json_schema", '{"const": "\\ud800"}'),
        ("json_schema", "\x00"),
        ("json_schema", "nul"),
        ("json_schema", '{"a": 1, "a": 2}'),
        ("json_schema", '{"x-guidance": {"whitespace_pattern": "("}, "type": "object"}'),
        ("json_schema", slow_schema(1)),
        ("regex", "(a{1000}){1000}"),
        ("regex", "b|(a{1000}){1000}"),
        ("regex", "(.*a){1,2000}b"),
        ("regex", ".*a.{300}"),
        ("regex", "(.*a.{20}){20}"),
        ("regex", "(" * 50_000 + "a" + ")" * 50_000),
        ("regex", "|".join(f"x{i}.*y" for i in range(5_000))),
        ("regex", r"\p{L}{1,10000}"),
        ("regex", "(a|a)*" * 500),
        ("grammar", "start: start"),
        ("grammar", 'start: s\ns: s s | "a" | ""'),
        ("grammar", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
        ("grammar", 'start: "a"{1000000,2000000}'),
        ("grammar", "start: X\nX: " + " & ".join(f"/(.|\\n)*a.{{{i}}}b(.|\\n)*/" for i in range(1, 20))),
        ("grammar", "start: %json {"),
        ("grammar", "%import /etc/passwd\nstart: X"),
        ("grammar", "start: <|im_end|> <[99999999]>"),
        ("choices", ["x" * 200_000, "x" * 200_001]),
        ("choices", [str(i) for i in range(60_000)]),
        ("choices", [""]),
        ("choices", ["a"] * 10_000),
    ]  # fmt: skip
    rest = [("json_schema", json.dumps(schema(4))) for _ in range(n - len(big))]
    return (big + rest)[:n] if n >= len(big) else [*rng.sample(big[1:18], n)]


KEYS = ["items", "properties", "anyOf", "allOf", "oneOf", "not", "if", "pattern", "minimum", "maximum", "enum", "const",
        "required", "prefixItems", "additionalProperties", "minLength", "maxLength", "$ref", "format", "multipleOf",
        "dependentRequired", "$defs", "minItems", "maxItems", "patternProperties"]  # fmt: skip


@pytest.mark.parametrize("n", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_hostile_grammars_leave_the_engine_well(model, of_bytes, n):
    """Each compiles or is a UserError, in bounded time; beside what compiles, a usual request's answer is as ever."""
    tokenizer, warm = small_byte_level(), SamplingConfig(temperature=1.0, seed=3)
    engine = Engine(model, tokenizer)
    usual = Request([7, 9], 40, warm, grammar=of_bytes.compile("json_schema", json.dumps(PERSON)))
    [[expected]] = engine.generate([usual])
    refused = ended = 0
    for kind, text in hostile(n):
        began = time.perf_counter()
        try:
            grammar = of_bytes.compile(kind, text)
        except UserError as error:
            assert "cannot be compiled" in str(error) or "make it smaller" in str(error), error
            assert len(str(error)) < 600
            refused += 1
            continue
        finally:
            assert time.perf_counter() - began < 20
        [[answer], [beside]] = engine.generate([Request([7, 9], 12, warm, grammar=grammar), usual])
        assert answer.finish in ("stop", "length", "error") and (answer.finish == "error") == (answer.error is not None)
        ended += answer.finish == "error"
        assert beside.ids == expected.ids
        assert time.perf_counter() - began < 40
    assert refused and refused + ended < n
    assert not engine.busy


def test_masks_reach_the_sampler_whole():
    """As many words as ids need, of a vocabulary that fills no word."""
    tokenizer = small_byte_level()
    compiler = Compiler(tokenizer)
    mask = compiler.compile("regex", "[\\s\\S]*").begin().mask()
    assert mask.dtype == np.int32 and len(mask) == -(-tokenizer.vocab_size // 32)
    compiler.close()


# -- on the command line ----------------------------------------------------------------------------------------------


def test_generate_answers_by_a_schema_a_list_of_choices_or_not_at_all(tmp_path, capsys):
    save_hf(toy_model(replace(toy_config("smollm2-135m"), vocab_size=307)), tmp_path / "m")
    small_byte_level().save(tmp_path / "m")
    schema = {"type": "array", "items": {"enum": [1, "two"]}, "minItems": 1, "maxItems": 2}
    (tmp_path / "s.json").write_text(json.dumps(schema | {"x-guidance": {"whitespace_flexible": False}}))
    (tmp_path / "g.lark").write_text('start: /[0-9]{3}/ "!"')
    warm = SamplingFlags(temperature=1.0, seed=3)
    question = dict(model=str(tmp_path / "m"), prompt="Ana is 43.", raw=True, max_new_tokens=150, sampling=warm)
    run_generate(GenerateConfig(**question, json_schema=str(tmp_path / "s.json")))
    jsonschema.validate(json.loads(capsys.readouterr().out), schema)
    run_generate(GenerateConfig(**question, choices=("yes", "no")))
    assert capsys.readouterr().out in ("yes\n", "no\n")
    run_generate(GenerateConfig(**question, grammar=str(tmp_path / "g.lark")))
    assert re.fullmatch(r"\d{3}!\n", capsys.readouterr().out)
    with pytest.raises(ConfigError, match="the regular expression cannot be compiled"):
        run_generate(GenerateConfig(**question, regex="("))
    assert not capsys.readouterr().out.strip()


def test_one_constraint_at_a_time():
    with pytest.raises(ConfigError, match="json_schema and choices are given; an answer follows one of them"):
        GenerateConfig(model="m", json_schema="s.json", choices=("a",))


def test_a_garbage_collection_is_not_on_a_masks_time(of_bytes, monkeypatch):
    """One at every allocation, each as slow as in a large process: it is nobody's fault."""
    monkeypatch.setattr(structured_trial, "SLOWEST", 0.02)
    constraint, ran = of_bytes.compile("json_schema", json.dumps(PERSON)).begin(), []

    def burn(phase, _):
        ran.append(phase)
        until = time.thread_time() + 0.02
        while phase == "start" and time.thread_time() < until:
            pass

    before = gc.get_threshold()
    gc.callbacks.append(burn)
    gc.set_threshold(1, 1, 1)
    try:
        assert constraint.mask().any()
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(burn)
    assert ran
    assert gc.isenabled()
