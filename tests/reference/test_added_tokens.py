"""Added tokens with every flag, wherever they are declared: ids of plain and rendered text equal transformers'."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path

import pytest
from helpers.tokenizers import learned_byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, LlamaTokenizer

from arriero.errors import CheckpointError
from arriero.tokenizer import load_tokenizer
from arriero.tokenizer.chat import encode_chat, encode_training

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["<|im_end|>", "<|im_start|>", "<x>", "<xy>", "tok", "to", "<x> b", "\n", "é"]
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
tokens = st.lists(
    st.builds(
        lambda text, flags: (text, dict(zip(FLAGS, flags, strict=True))),
        st.sampled_from(TEXTS),
        st.tuples(*[st.booleans()] * len(FLAGS)),
    ),
    max_size=6,
    unique_by=lambda token: token[0],
)
words = st.sampled_from([*TEXTS, " ", "  ", "\n ", "a", "llama", "A", "_", ".", "e\u0301", "tokto", "<|im_", "<"])
texts = st.lists(words, max_size=9).map("".join)


def byte_level() -> Backend:
    return learned_byte_level(258)


def composed() -> Backend:
    backend = byte_level()
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return backend


def pieces(backend: Backend) -> Backend:
    vocabulary = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}}
    for piece in "▁almtok<>|_ims_endrx":
        vocabulary.setdefault(piece, len(vocabulary))
    vocabulary |= {"▁a": len(vocabulary), "▁▁": len(vocabulary) + 1}
    merges = [("▁", "a"), ("▁", "▁")]
    backend.model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return backend


def prepended() -> Backend:
    backend = pieces(Backend(models.BPE()))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def prefixed_at_first() -> Backend:
    backend = pieces(Backend(models.BPE()))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return backend


PIPELINES = [byte_level, composed, prepended, prefixed_at_first]


def add(backend: Backend, declared: list) -> None:
    for text, flags in declared:
        token = AddedToken(text, **flags)
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def directory_of(folder: Path, backend: Backend, **config) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def same_ids(folder: Path, text: str) -> None:
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    try:
        theirs(text), theirs(text, split_special_tokens=True)
    except BaseException as error:  # a fault of the library: a panic in Rust, which is no Exception
        assert "bad split" in str(error)
        with pytest.raises(CheckpointError, match="the tokenizers library fails on this text"):
            ours.encode(text), ours.encode_rendered(text)
        return
    assert ours.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ours.encode_rendered(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ours.vocab_size == len(theirs)
    if not ours.control_pattern.search(text):  # which transformers would take for tokens
        talk = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": ""},
        ]
        assert encode_chat(ours, talk) == theirs.apply_chat_template(
            talk, add_generation_prompt=True, return_dict=False
        )


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda f: f.__name__)
@settings(max_examples=60, deadline=None)
@given(declared=tokens, text=texts)
def test_ids_are_transformers_with_any_flags_in_tokenizer_json(pipeline, declared, text):
    with tempfile.TemporaryDirectory() as folder:
        backend = pipeline()
        add(backend, declared)
        same_ids(directory_of(Path(folder), backend), text)


@settings(max_examples=60, deadline=None)
@given(first=tokens, second=tokens, text=texts)
def test_ids_are_transformers_where_tokenizer_config_declares_other_flags_and_further_tokens(first, second, text):
    with tempfile.TemporaryDirectory() as folder:
        backend = byte_level()
        add(backend, first)
        size = backend.get_vocab_size()
        decoder = {}
        for token, flags in second:
            token_id = backend.token_to_id(token)
            decoder[str(size if token_id is None else token_id)] = {"content": token, **flags}
            size += token_id is None
        same_ids(directory_of(Path(folder), backend, added_tokens_decoder=decoder), text)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(TEXTS[:6]), unique=True), st.lists(st.sampled_from(TEXTS[:6]), unique=True), texts)
def test_ids_are_transformers_where_added_tokens_json_and_the_map_declare_them(added, special, text):
    with tempfile.TemporaryDirectory() as name:
        backend, folder = byte_level(), Path(name)
        directory_of(folder, backend)
        new = {token: backend.get_vocab_size() + i for i, token in enumerate(added)}
        (folder / "added_tokens.json").write_text(json.dumps(new))
        listed = {"extra_special_tokens": [token for token in special if token in new]}
        (folder / "special_tokens_map.json").write_text(json.dumps(listed))
        same_ids(folder, text)


def llama_files(folder: Path, **config) -> Path:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a llama is an animal"] * 9), model_prefix=str(folder / "tokenizer"), vocab_size=290,
        model_type="bpe", byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, **config}))
    return folder


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> Path:
    return llama_files(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("legacy", [None, False, True])
def test_tokenizer_model_with_added_tokens_json_gives_the_ids_of_llama_tokenizer(llama_folder, legacy):
    size = LlamaTokenizer.from_pretrained(llama_folder).vocab_size
    (llama_folder / "added_tokens.json").write_text(
        json.dumps({"<|im_start|>": size, "<|im_end|>": size + 1, "<x>": size + 2})
    )
    config = json.loads((llama_folder / "tokenizer_config.json").read_text())
    config |= {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "legacy": legacy, "add_bos_token": True}
    (llama_folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    ours, theirs = load_tokenizer(llama_folder), AutoTokenizer.from_pretrained(llama_folder)
    some = [
        "a llama",
        " a",
        "  a<x>b",
        "a<x>  a",
        "<x> b",
        "<s>a</s> a",
        "<|im_end|>\na",
        "",
        " ",
        "x<|im_end|> <x>",
    ]
    for text in some:
        assert ours.encode_rendered(text) == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], text
        assert [*ours.begin_ids, *ours.encode(text)] == theirs(text, split_special_tokens=True)["input_ids"]
    talk = [{"role": "user", "content": "a llama"}, {"role": "assistant", "content": "an animal"}]
    assert encode_chat(ours, talk[:1]) == theirs.apply_chat_template(
        talk[:1], add_generation_prompt=True, return_dict=False
    )
    assert ours.stop_ids == {ours.eos_id, size + 1}
    ours.save(llama_folder / "again")
    again, theirs_again = load_tokenizer(llama_folder / "again"), AutoTokenizer.from_pretrained(llama_folder / "again")
    for text in some:
        ids = ours.encode_rendered(text)
        assert again.encode_rendered(text) == ids == theirs_again(text, add_special_tokens=False)["input_ids"]


def test_a_normalising_tokenizer_model_stays_sentencepieces_and_takes_no_tokens(tmp_path):
    import sentencepiece

    prefix = str(tmp_path / "tokenizer")
    settings = dict(vocab_size=290, model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a llama"] * 9), model_prefix=prefix, **settings)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    reference = sentencepiece.SentencePieceProcessor(f"{prefix}.model")
    assert load_tokenizer(tmp_path).encode("a  llama ") == reference.encode("a  llama ")
    (tmp_path / "added_tokens.json").write_text('{"<x>": 290}')
    with pytest.raises(CheckpointError, match=r"declare '<x>', which tokenizer.model lacks; tokens are added for the"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer"])
def test_vocab_json_and_merges_txt_are_read_as_the_class_builds_them(tmp_path, name):
    state = json.loads(byte_level().to_str())
    vocabulary = {**state["model"]["vocab"], "<|endoftext|>": 258}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in state["model"]["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n")
    decoder = {"259": {"content": "<|im_end|>", "special": True, "rstrip": True}}
    config = {"tokenizer_class": name, "eos_token": "<|im_end|>", "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ["a llama", "12 345", "e\u0301 é", "a<|im_end|>  \n b<|endoftext|> c", "I'LL  x\n\n y"]:
        assert ours.encode_rendered(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert [*ours.begin_ids, *ours.encode(text)] == theirs(text, split_special_tokens=True)["input_ids"]
    assert (ours.eos_id, ours.stop_ids) == (theirs.eos_token_id, {258, 259})
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(
        CheckpointError, match=r"no tokenizer\.json is there.*'PreTrainedTokenizerFast' does not say how"
    ):
        load_tokenizer(tmp_path)


def test_a_conversation_is_trained_with_the_ids_that_it_has_whole(tmp_path):
    backend = byte_level()
    flags = dict.fromkeys(FLAGS, False) | {"special": True}
    add(backend, [("<|im_start|>", flags), ("<|im_end|>", flags | {"rstrip": True})])
    directory_of(tmp_path, backend, eos_token="<|im_end|>")
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    talk = [
        {"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ]
    found = encode_training(ours, talk)
    assert found.ids == theirs.apply_chat_template(talk, return_dict=False)
    trained = [i for i, on in zip(found.ids, found.trained, strict=True) if on]
    end = ours.eos_id
    assert trained == [*ours.encode("b"), end, *ours.encode("d"), end]


def test_a_role_of_special_tokens_map_that_is_no_token_is_named_with_that_file(tmp_path):
    directory_of(tmp_path, byte_level())
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": [1]}')
    with pytest.raises(CheckpointError, match=r"special_tokens_map\.json: eos_token is \[1\]; a token is a text"):
        load_tokenizer(tmp_path)


def test_special_tokens_map_has_the_last_word_on_roles_as_in_transformers(tmp_path, caplog):
    backend = byte_level()
    flags = dict.fromkeys(FLAGS, False) | {"special": True}
    add(backend, [("<x>", flags), ("<xy>", flags)])
    directory_of(tmp_path, backend, eos_token="<x>")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<xy>"}}')
    with caplog.at_level(logging.WARNING, "arriero"):
        ours = load_tokenizer(tmp_path)
    assert ours.eos_id == AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 259
    assert "says that eos_token is '<x>', special_tokens_map.json says '<xy>'" in caplog.text


def test_a_token_that_would_get_another_id_than_declared_is_refused(tmp_path):
    directory_of(tmp_path, byte_level())
    (tmp_path / "added_tokens.json").write_text('{"<x>": 260}')
    with pytest.raises(CheckpointError, match=r"'<x>' is declared as token 260, but .* make it token 258; mend"):
        load_tokenizer(tmp_path)


def test_a_pad_token_without_a_row_is_left_out_and_named(tmp_path, caplog):
    directory_of(tmp_path, byte_level(), pad_token="[PAD]")
    (tmp_path / "config.json").write_text('{"vocab_size": 258}')
    with caplog.at_level(logging.WARNING, "arriero"):
        tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (None, 258)
    assert "'[PAD]' that the vocabulary lacks; it would be token 258, and the model has 258 rows" in caplog.text
    (tmp_path / "config.json").write_text('{"vocab_size": 259}')
    assert load_tokenizer(tmp_path).pad_id == AutoTokenizer.from_pretrained(tmp_path).pad_token_id == 258


@pytest.mark.parametrize("declared", [True, False, None])
@pytest.mark.parametrize("processed", [True, False])
def test_a_text_begins_as_the_post_processor_begins_it(tmp_path, declared, processed):
    from tokenizers import processors

    backend = byte_level()
    add(backend, [("<x>", dict.fromkeys(FLAGS, False) | {"special": True})])
    if processed:
        backend.post_processor = processors.TemplateProcessing(single="<x> $A", special_tokens=[("<x>", 258)])
    more = {} if declared is None else {"add_bos_token": declared}
    directory_of(tmp_path, backend, bos_token="<x>", **more)
    ours = load_tokenizer(tmp_path)
    assert [*ours.begin_ids, *ours.encode("a b")] == AutoTokenizer.from_pretrained(tmp_path)("a b")["input_ids"]
    assert ours.special.adds_bos is processed
