"""Models with more rows than their tokenizer has ids, and with fewer."""

import json
import shutil

import gguf
import pytest
import torch
import transformers
from helpers.tokenizers import learned_byte_level
from helpers.toys import toy_model
from tokenizers import AddedToken

from arriero.checkpoint.adapter import save_adapter
from arriero.checkpoint.convert import convert
from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load, load_model, load_tokenizer_at
from arriero.checkpoint.merge import merge
from arriero.cli.chat import Chat
from arriero.errors import CheckpointError
from arriero.eval.needle import Reader
from arriero.infer.config import ChatConfig, SamplingConfig
from arriero.infer.generate import Session, generate, stream
from arriero.infer.sample import sample, token_words
from arriero.infer.sampler_row import SamplerRow
from arriero.model.config import LlamaConfig, Qwen3Config
from arriero.model.lora import add_lora, lora_state
from arriero.model.lora_config import LoraConfig

CHATML = "{% for m in messages %}{{'<|im_start|>'+m['role']+'\\n'+m['content']+'<|im_end|>\\n'}}{% endfor %}"
CHATML += "{% if add_generation_prompt %}{{'<|im_start|>assistant\\n'}}{% endif %}"
SHAPE = LlamaConfig(64, 2, 4, 2, 97, 320, 256)
N_IDS = 260


def save_tokenizer(directory, hole=False):
    """Bytes, one merge, three special tokens: ids 0 to 259, or with a hole at 257 to 260."""
    backend = learned_byte_level(257)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    state = json.loads(backend.to_str())
    if hole:
        for token in state["added_tokens"]:
            token["id"] += 1
            state["model"]["vocab"][token["content"]] = token["id"]
    (directory / "tokenizer.json").write_text(json.dumps(state))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(params=["llama", "qwen3"])
def padded(request, tmp_path):
    """A model of 320 rows that would always say the last of them: by the C++ step a llama, by torch a qwen3."""
    shape = SHAPE if request.param == "llama" else Qwen3Config(**vars(SHAPE))
    model = toy_model(shape)
    with torch.no_grad():
        model.lm_head.weight[N_IDS:] = 0
        model.lm_head.weight[319] = 3 * model.lm_head.weight[:N_IDS].abs().sum(0)
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.abs_()
        model.lm_head.weight[319].abs_()
    save_hf(model, tmp_path / "m")
    save_tokenizer(tmp_path / "m")
    return tmp_path / "m"


class Silent:
    def note(self, text): ...
    def answer(self, text): ...
    def line(self, text=""): ...


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_padded_ids_are_never_drawn(padded, temperature, dtype):
    model, tokenizer = load(padded, dtype=dtype)
    ids = tokenizer.encode("a llama")
    with torch.no_grad():
        assert int(model(torch.tensor([ids]))[0, -1].argmax()) == 319
    for penalty in (1.0, 1.3):
        sampling = SamplingConfig(temperature=temperature, repetition_penalty=penalty, seed=3)
        answers = generate(model, tokenizer, [ids, ids[:2]], sampling, 9, stop_ids=())
        assert all(len(answer.ids) == 9 and max(answer.ids) < N_IDS for answer in answers)
        assert "".join(stream(model, tokenizer, ids, sampling, 9, stop_ids=())) == tokenizer.decode(answers[0].ids)
    assert max(Reader(model, tokenizer, 64).answer(ids, 9)) < N_IDS


def test_chat_draws_no_padded_ids(padded, monkeypatch):
    model, tokenizer = load(padded)
    drawn = []
    kept = Session.answer
    monkeypatch.setattr(Session, "answer", lambda *args: (drawn.append(e.token) or e for e in kept(*args)))
    talk = Chat(model, tokenizer, ChatConfig(max_new_tokens=5), Silent(), SamplingConfig())
    talk.take("a")
    talk.take("/params temperature=2")
    talk.take("b")
    assert len(drawn) > 2
    assert max(drawn) < N_IDS


def test_a_diverged_models_samples_are_tokens_still(padded):
    """Training that diverged writes its samples; NaN logits used to give the last row, which no text has."""
    model, tokenizer = load(padded)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    for temperature in (0.0, 1.0):
        [answer] = generate(model, tokenizer, [[1, 2]], SamplingConfig(temperature=temperature, seed=1), 3, stop_ids=())
        assert len(answer.ids) == 3 and max(answer.ids) < N_IDS


def test_ids_without_a_token_are_not_drawn(tmp_path):
    model = toy_model(SHAPE)
    save_hf(model, tmp_path / "m")
    save_tokenizer(tmp_path / "m", hole=True)
    tokenizer = load_tokenizer_at(tmp_path / "m")
    assert (tokenizer.vocab_size, tokenizer.unused_ids) == (261, [257])
    logits = torch.zeros(1, 320)
    logits[0, 257], logits[0, 319], logits[0, 4] = 9, 9, 1
    words = token_words(tokenizer)
    assert sample(logits, [SamplerRow(SamplingConfig(), words=words)]).ids.tolist() == [4]
    rows = [SamplerRow(SamplingConfig(temperature=1.0, seed=i), words=words) for i in range(99)]
    drawn = sample(logits.expand(99, -1), rows).ids.tolist()
    assert 257 not in drawn and max(drawn) < 261 and len(set(drawn)) > 20
    convert(tmp_path / "m", tmp_path / "m.gguf", to="gguf")
    back = load_tokenizer_at(tmp_path / "m.gguf")
    assert (back.vocab_size, back.unused_ids) == (261, [257])
    assert back.encode("a [PAD257] llama") == tokenizer.encode("a [PAD257] llama")


def test_padded_rows_are_unused_tokens_of_a_gguf_file_and_come_back_as_rows(padded, tmp_path):
    convert(padded, tmp_path / "m.gguf", to="gguf")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 320
    assert tokens[N_IDS:] == [f"[PAD{i}]" for i in range(N_IDS, 320)]  # as llama.cpp's converter has them
    assert set(types[N_IDS:]) == {gguf.TokenType.UNUSED}
    assert gguf.TokenType.UNUSED not in types[:N_IDS]
    model, tokenizer = load(tmp_path / "m.gguf")
    assert (model.config.vocab_size, tokenizer.vocab_size) == (320, N_IDS)
    assert tokenizer.encode("a [PAD300] llama") == load_tokenizer_at(padded).encode("a [PAD300] llama")
    convert(tmp_path / "m.gguf", tmp_path / "back", to="hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert len(theirs) == N_IDS
    assert load_model(tmp_path / "back").config.vocab_size == 320


def test_padded_rows_of_a_sentencepiece_vocabulary_get_the_lowest_score(tmp_path):
    import sentencepiece

    save_hf(toy_model(SHAPE), tmp_path / "m")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a llama is an animal"] * 9), model_prefix=str(tmp_path / "m" / "tokenizer"),
        vocab_size=290, model_type="bpe", byte_fallback=True, character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    n = load_tokenizer_at(tmp_path / "m").vocab_size
    convert(tmp_path / "m", tmp_path / "m.gguf", to="gguf")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert {len(fields[f"tokenizer.ggml.{key}"]) for key in ("tokens", "token_type", "scores")} == {320}
    assert set(fields["tokenizer.ggml.scores"][n:]) == {-10_000.0}
    assert load_tokenizer_at(tmp_path / "m.gguf").vocab_size == n
    assert load_tokenizer_at(tmp_path / "m.gguf").encode("a llama") == load_tokenizer_at(tmp_path / "m").encode(
        "a llama"
    )


@pytest.fixture
def short(tmp_path):
    save_hf(toy_model(LlamaConfig(64, 2, 4, 2, 97, 258, 256)), tmp_path / "m")
    save_tokenizer(tmp_path / "m")
    return tmp_path / "m"


def test_fewer_rows_than_ids_are_refused_with_both_sizes_wherever_the_two_are_used_together(short, tmp_path):
    from rich.console import Console

    from arriero.train.config import DataConfig, LoopConfig, SftConfig
    from arriero.train.sft import build

    lora = LoraConfig(rank=2)
    model = load_model(short)
    add_lora(model, lora)
    save_adapter(lora_state(model), tmp_path / "adapter", lora, str(short))
    (tmp_path / "rows.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    said = r"embeddings have 258 rows, and its tokenizer has 260 ids; for those from 258 on .*: use the tokenizer that"
    data = DataConfig(train=str(tmp_path / "rows.jsonl"))
    for use in (
        lambda: load(short),
        lambda: convert(short, tmp_path / "m.gguf", to="gguf"),
        lambda: convert(short, tmp_path / "hf", to="hf"),
        lambda: convert(short, tmp_path / "meta", to="meta"),
        lambda: merge(short, tmp_path / "adapter", tmp_path / "merged"),
        lambda: build(SftConfig(model=str(short), data=data, out=str(tmp_path / "run"), loop=LoopConfig()), Console()),
    ):
        with pytest.raises(CheckpointError, match=said) as error:
            use()
        assert str(error.value).startswith(str(short))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "m", "rows.jsonl"]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (short / file).unlink()
    convert(short, tmp_path / "hf", to="hf")  # without a tokenizer there is nothing to compare
    shutil.rmtree(tmp_path / "hf")
