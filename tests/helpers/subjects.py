"""Every reader of Arriero with a small valid input, for the mutation test (`hostile.py`).

A vocabulary of some hundred tokens, a model of two layers, a dozen rows: a try takes milliseconds, and yet what was
read is used: a tokenizer encodes, decodes and renders, a model computes logits, rows become documents.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
import zstandard
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from arriero import presets, settings
from arriero.checkpoint import native
from arriero.checkpoint.adapter import load_adapter, save_adapter
from arriero.checkpoint.gguf import Kind, write_gguf
from arriero.checkpoint.hf import save_hf, write_hf
from arriero.checkpoint.load import load_model, load_tokenizer_at, open_weights
from arriero.checkpoint.meta import write_meta
from arriero.checkpoint.peft_config import read_peft_config
from arriero.checkpoint.quantize import quantize
from arriero.checkpoint.sharded import Checkpoints
from arriero.checkpoint.weights import from_model
from arriero.curate import classifier
from arriero.curate.config import CurateConfig
from arriero.curate.sources import read_documents
from arriero.data.formats import parse_record
from arriero.data.preferences import encode_preferences
from arriero.data.shards import Shards, find_sets, open_sources, verify_tokenizer
from arriero.errors import CheckpointError, DataError
from arriero.export.lora_gguf import write_lora
from arriero.infer.engine import Engine
from arriero.infer.request import Request
from arriero.io.records import read_records, source_files
from arriero.model.build import build_model
from arriero.model.config import LlamaConfig, Qwen3Config
from arriero.model.llama import Llama
from arriero.model.lora import add_lora, lora_state
from arriero.model.lora_config import LoraConfig
from arriero.model.scaling import Llama3Scaling
from arriero.tokenizer import Tokenizer, load_tokenizer
from arriero.tokenizer.base import SpecialTokens
from arriero.tokenizer.chat import encode_chat, encode_training
from arriero.tokenizer.gguf import tokenizer_to_gguf
from arriero.tokenizer.hf import HfTokenizer, byte_level_alphabet
from arriero.tokenizer.template import ChatTemplate
from arriero.train.episodes import Group, Past, Sampled
from arriero.train.journal import read_round
from arriero.train.metrics import surviving_records
from arriero.train.scaling.budget import open_law
from arriero.train.scaling.config import SweepConfig
from helpers import gptq
from helpers.hostile import Subject
from helpers.requests import read_requests, write_requests
from helpers.shards import write_shards
from helpers.tokenizers import small_sentencepiece

TEXT = "Hello, naïve 日本 world!\n  Hi 12345 <|im_end|></s>"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# -- tokenizers --------------------------------------------------------------------------------------------------


def byte_level() -> HfTokenizer:
    """256 bytes, nine merges, two special tokens and a plain added one, with ChatML."""
    letters = list(byte_level_alphabet().values())
    merges = [
        ("H", "e"),
        ("l", "l"),
        ("He", "ll"),
        ("Hell", "o"),
        ("Ġ", "w"),
        ("o", "r"),
        ("Ġw", "or"),
        ("1", "2"),
        ("H", "i"),
    ]
    vocabulary = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges)])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    backend.add_tokens([AddedToken("naïve", special=False, rstrip=True)])
    ids = {t: i for t in ("<|im_start|>", "<|im_end|>") if (i := backend.token_to_id(t)) is not None}
    special = SpecialTokens(ids, bos="<|im_start|>", eos="<|im_end|>", pad="<|im_end|>")
    return HfTokenizer(backend, special, ChatTemplate(CHATML, {"eos_token": "<|im_end|>"}))


def write_byte_level(folder: Path) -> None:
    tokenizer = byte_level()
    tokenizer.save(folder)
    stops = [tokenizer.eos_id, tokenizer.bos_id]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops, "temperature": 0.7}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": tokenizer.bos_id}))


def write_named_templates(folder: Path) -> None:
    small_sentencepiece().save(folder)
    (folder / "tokenizer.model").unlink()
    file = folder / "tokenizer_config.json"
    named = [{"name": "default", "template": LLAMA}, {"name": "tool_use", "template": LLAMA + "{{ tools | length }}"}]
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": named}))


def write_vocabulary(folder: Path) -> None:
    """As GPT-2's were: vocab.json and merges.txt."""
    model = json.loads(byte_level().backend.to_str())["model"]
    vocabulary = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(merge) + "\n" for merge in model["merges"]))
    described = {"tokenizer_class": "GPT2Tokenizer", "chat_template": CHATML, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": len(vocabulary)}))


LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)


def write_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(small_sentencepiece().model)
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": LLAMA, "add_bos_token": True,
    }))  # fmt: skip


def write_tiktoken(folder: Path) -> None:
    words = [bytes([b]) for b in range(256)] + [b"He", b"ll", b"Hell", b"Hello", b" H", b"<|", b"\n\n"]
    lines = (f"{base64.b64encode(w).decode()} {rank}\n" for rank, w in enumerate(words))
    (folder / "tokenizer.model").write_text("".join(lines))
    (folder / "params.json").write_text(json.dumps({"use_scaled_rope": True, "vocab_size": len(words) + 11}))


def use_tokenizer(tokenizer: Tokenizer) -> object:
    """Ask a tokenizer for all that commands ask of one."""
    ids = tokenizer.encode(TEXT)
    text = tokenizer.decode(ids, skip_special=False)
    stream = tokenizer.stream()
    streamed = "".join(map(stream.push, ids)) + stream.flush()
    tokenizer.encode_batch([TEXT, "", " Hi"])
    tokenizer.encode_rendered(TEXT)
    facts = tokenizer.vocab_size, sorted(tokenizer.stop_ids), tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    tokenizer.token_bytes(tokenizer.vocab_size - 1)
    if tokenizer.chat_template is not None:
        for use in (
            lambda: encode_chat(tokenizer, MESSAGES[:2]),
            lambda: encode_chat(tokenizer, MESSAGES, TOOLS),
            lambda: encode_training(tokenizer, MESSAGES),
        ):
            _may_refuse(use)
    _may_refuse(lambda: tokenizer_to_gguf(tokenizer))
    return text, streamed, facts, tokenizer.fingerprint


def _may_refuse(use: Callable[[], object]) -> None:
    """A refusal of one use is no refusal of the next."""
    from arriero.errors import UserError

    try:
        use()
    except UserError as error:
        assert str(error).strip()


def read_tokenizer(folder: Path) -> object:
    return use_tokenizer(load_tokenizer(folder))


# -- models ------------------------------------------------------------------------------------------------------

SHAPE = LlamaConfig(32, 2, 4, 2, 32, 268, 64, rope_scaling=Llama3Scaling(8.0), rope_theta=5e5)
QWEN = Qwen3Config(32, 2, 4, 2, 32, 268, 64, tied_embeddings=True, head_dim=8)


@cache
def model(shape: LlamaConfig = SHAPE) -> Llama:
    built = build_model(shape).init_weights(std=0.15, seed=5)
    built.tie_weights()
    return built.eval()


def write_hugging_face(folder: Path) -> None:
    save_hf(model(), folder, byte_level(), dtype=torch.bfloat16)


def write_in_shards(folder: Path) -> None:
    write_hf(from_model(model(QWEN)), folder, max_shard_bytes=20_000)


def write_quantized(kind: str, folder: Path) -> None:
    save_hf(model(LlamaConfig(64, 1, 2, 1, 64, 512, 64)), folder / "whole", byte_level())
    quantize(folder / "whole", folder / "q", type=kind)  # type: ignore[arg-type]
    shutil.rmtree(folder / "whole")
    for file in (folder / "q").iterdir():
        file.rename(folder / file.name)
    (folder / "q").rmdir()


def write_awq(folder: Path) -> None:
    gptq.quantized("awq", folder)


def write_gptq(folder: Path) -> None:
    gptq.quantized("gptq", folder)


def write_metas(folder: Path) -> None:
    weights = from_model(model())
    write_meta(weights, folder)


def write_gguf_bytes(folder: Path) -> None:
    tokenizer = byte_level()
    write_gguf(from_model(model()), folder / "m.gguf", kind=Kind.Q8_0, tokenizer=tokenizer_to_gguf(tokenizer))


def write_gguf_four_bits(folder: Path) -> None:
    tokenizer = byte_level()
    write_gguf(from_model(model()), folder / "m.gguf", kind=Kind.Q4_0, tokenizer=tokenizer_to_gguf(tokenizer))


def write_gguf_pieces(folder: Path) -> None:
    tokenizer = small_sentencepiece()
    shape = LlamaConfig(32, 2, 4, 4, 32, tokenizer.vocab_size, 64)
    write_gguf(from_model(model(shape)), folder / "m.gguf", kind=Kind.F16, tokenizer=tokenizer_to_gguf(tokenizer))


def write_gguf_qwen(folder: Path) -> None:
    write_gguf(from_model(model(QWEN)), folder / "m.gguf", kind=Kind.BF16, tokenizer=tokenizer_to_gguf(byte_level()))


def use_model(path: Path) -> object:
    loaded = load_model(path, dtype=torch.float32)
    with torch.no_grad():
        return loaded(torch.tensor([[1, 5, 7]])).sum().item()


def read_model(folder: Path) -> object:
    return use_model(folder)


def read_gguf(folder: Path) -> object:
    path = folder / "m.gguf"
    return use_model(path), use_tokenizer(load_tokenizer_at(path))


def read_checkpoint(folder: Path) -> object:
    weights = open_weights(folder)
    return [weights.read(name).float().sum().item() for name in weights.entries], use_tokenizer(
        load_tokenizer_at(folder)
    )


def write_adapter(folder: Path) -> None:
    adapted = build_model(SHAPE).init_weights(std=0.15, seed=5)
    lora = LoraConfig(rank=2, alpha=4.0, rank_pattern={"model.layers.1.mlp.up_proj": 3})
    add_lora(adapted, lora)
    save_adapter(lora_state(adapted), folder, lora, "some/base")


def read_adapter(folder: Path) -> object:
    adapted = build_model(SHAPE).init_weights(std=0.15, seed=5)
    return read_peft_config(folder).base, load_adapter(adapted, folder)


STEP = 3


def write_native(folder: Path) -> None:
    Checkpoints(folder).save(STEP, groups_of_a_run(), {"step": STEP, "loss": 1.5, "texts": ["ä"]})


def write_native_parts(folder: Path) -> None:
    """As two processes write it: weights whole, each in one file, moments in pieces."""
    groups, files = groups_of_a_run(), {}
    temporary = native.begin(folder, STEP)
    for part, (name, weight) in enumerate(groups["weights"].items()):
        files |= native.write(temporary, "weights", {name: weight}, {name: [0] * weight.ndim}, part, 2)
        moment = groups["optimizer"]["a/m"][part * 4 : part * 4 + 4 - part]
        files |= native.write(temporary, "optimizer", {"a/m": moment}, {"a/m": [part * 4, 0]}, part, 2)
    native.finish(folder, STEP, files, {"step": STEP})


def groups_of_a_run() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(STEP)
    return {
        "weights": {"a": torch.randn(7, 11, generator=generator), "b": torch.randn(13, generator=generator)},
        "optimizer": {"a/step": torch.tensor(5.0), "a/m": torch.randn(7, 11, generator=generator)},
    }


def read_native(folder: Path) -> object:
    saved = Checkpoints(folder).latest()
    if saved is None:
        return None
    groups = {group: saved.tensors(group) for group in ("weights", "optimizer")}
    sums = [
        (group, name, tuple(tensor.shape), tensor.double().sum().item())
        for group, tensors in groups.items()
        for name, tensor in sorted(tensors.items())
    ]
    return saved.step, saved.state, sums


def read_native_sealed_anew(folder: Path) -> object:
    """As whoever forges a checkpoint leaves it: the manifest agrees with every file."""
    path = native.path_of(folder, STEP)
    files = {
        file.relative_to(path).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in path.rglob("*")
        if file.is_file() and file.name != "manifest.json"
    }
    manifest = path / "manifest.json"
    manifest.unlink()  # a link to the valid one
    manifest.write_text(json.dumps({"format": native.FORMAT, "step": STEP, "files": files}))
    return read_native(folder)


# -- rows --------------------------------------------------------------------------------------------------------

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
PARTS = {"role": "user", "content": [{"type": "text", "text": "And?"}]}
CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": MESSAGES, "tools": TOOLS},
    {"messages": [*MESSAGES, PARTS, {"role": "assistant", "content": "ä", "weight": 0}]},
    {
        "messages": [
            MESSAGES[1],
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "3"},
            {"role": "assistant", "content": "3", "reasoning_content": "so"},
        ]
    },
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "s"},
    {"instruction": "Add", "input": "1 2", "output": "3"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"question": "Who?", "answer": "Me"},
]
DOCUMENTS = [
    {
        "text": f"Document {i}: the llama — 日本 — walks.\nAnd on.",
        "id": f"d{i}",
        "url": "http://a/b",
        "meta": {"n": i, "x": [1.5]},
    }
    for i in range(7)
]
FLAT = [{"prompt": f"What is {i}?", "completion": f"It is {i}, “so”\nit is.", "text": f"text {i}"} for i in range(7)]


def json_lines(rows: Iterable[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def rows(name: str, content: Callable[[], bytes]) -> Subject:
    return Subject(f"rows {name}", partial(_write, name, content), read_rows)


def _write(name: str, content: Callable[[], bytes], folder: Path) -> None:
    (folder / name).write_bytes(content())


def read_rows(folder: Path) -> object:
    """As conversations by which a model is tuned, and as documents."""
    good = 0
    for path in source_files(folder):
        try:
            for record in read_records(path):
                try:
                    conversation = parse_record(record)
                    encode_training(_chat(), conversation.messages, conversation.tools)
                    good += 1
                except DataError as error:
                    assert str(error).strip()
        except DataError as error:
            assert str(error).strip()
    return good, read_texts(folder)


PREFERENCES = [
    {"prompt": "Hi", "chosen": "Hello", "rejected": "No", "rating": "better", "chosen_safe": True},
    {"prompt": "Hi", "edited": "Hello!", "chosen": "Hello", "rejected": "No", "margin": 0.5},
    {"chosen": MESSAGES, "rejected": [*MESSAGES[:2], {"role": "assistant", "content": "No"}]},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
    {"messages": MESSAGES[:2], "completions": ["a", "b", "c"], "scores": [1, 0.5, -1], "safe": [True, None, False]},
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
    {"prompt": "Hi", "completion": "Hello", "label": False, "safe": True},
]


def read_preferences(folder: Path) -> object:
    """As answers that are compared."""
    good = 0
    for path in source_files(folder):
        for record in read_records(path):
            try:
                encode_preferences(_chat(), [record])
                good += 1
            except DataError as error:
                assert str(error).strip()
    return good


@cache
def _chat() -> Tokenizer:
    return byte_level()


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def csv(delimiter: str) -> bytes:
    quoted = [delimiter.join('"' + value.replace('"', '""') + '"' for value in row.values()) for row in FLAT]
    return "\n".join([delimiter.join(FLAT[0]), *quoted, ""]).encode()


def parquet() -> bytes:
    table = pa.table({
        **{key: [row[key] for row in FLAT] for key in FLAT[0]},
        "when": pa.array([10**18] * 7, pa.timestamp("ns")), "n": list(range(7)), "nested": [{"a": [1, None]}] * 7,
    })  # fmt: skip
    out = io.BytesIO()
    pa.parquet.write_table(table, out, row_group_size=3)
    return out.getvalue()


def arrow(new: Callable[..., Any]) -> bytes:
    table = pa.Table.from_pylist([{**row, "messages": MESSAGES} for row in FLAT])
    out = io.BytesIO()
    with new(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return out.getvalue()


# -- documents ---------------------------------------------------------------------------------------------------

PAGE = (
    "<!DOCTYPE html><html lang=en><head><meta charset=utf-8><title>Llamas</title><script>var a = 1;</script></head>"
    "<body><nav><a href=/>Home</a></nav><article><h1>Llamas</h1><p>A llama walks over the Andes — naïve, 日本, &amp; "
    "carries wool to the market, which is a long way off.</p><ul><li>one</li><li>two</li></ul><table><tr><td>3</table>"
    "<pre>x = 1\ny = 2</pre></article><footer>2024</footer></body></html>"
)


def warc() -> bytes:
    bodies = [(PAGE.encode(), "text/html; charset=utf-8", ""), (b"plain text", "text/plain", "")]
    bodies += [(gzip.compress(PAGE.encode(), mtime=0), "text/html", "Content-Encoding: gzip\r\n")]
    out = []
    for k, (body, kind, more) in enumerate(bodies):
        http = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body
        out.append(
            f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:{k}>\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
            f"WARC-Target-URI: http://a.b/{k}\r\nContent-Type: application/http; msgtype=response\r\n"
            f"Content-Length: {len(http)}\r\n\r\n".encode()
            + http
            + b"\r\n\r\n"
        )
    return b"".join(out)


def documents(name: str, content: Callable[[], bytes], **how: Any) -> Subject:
    read = partial(read_texts, **how)
    label = name + "".join(f" by {value}" for value in how.values())
    return Subject(f"documents {label}", partial(_write, name, content), read)


def read_texts(folder: Path, **how: Any) -> object:
    return [
        (document.id, document.text.encode(), json.dumps(document.meta, allow_nan=True))
        for document in read_documents(sorted(folder.iterdir()), on_error=_complains, **how)
    ]


def _complains(error: DataError) -> None:
    assert str(error).strip()


def write_curated(folder: Path) -> None:
    shard = folder / "shard-00000.jsonl.zst"
    shard.write_bytes(zstd(json_lines(DOCUMENTS)))
    shards = [{"file": shard.name, "documents": 7, "sha256": hashlib.sha256(shard.read_bytes()).hexdigest()}]
    (folder / "manifest.json").write_text(json.dumps({"format": "arriero curated corpus 1", "shards": shards}))


def read_curated(folder: Path) -> object:
    return [d.text for d in read_documents([folder], on_error=_complains)]


# -- token shards ------------------------------------------------------------------------------------------------


def write_set(folder: Path) -> None:
    byte_level().save(folder / "tokenizer")
    write_shards(folder / "train", [5, 3, 8, 1, 7], source="prose")
    manifest = json.loads((folder / "train/manifest.json").read_text())
    manifest["tokenizer"] = load_tokenizer(folder / "tokenizer").fingerprint
    (folder / "train/manifest.json").write_text(json.dumps(manifest))
    (folder / "progress.json").write_text(json.dumps({"request": {}, "parts": [{"train/prose": {}}]}))


def contents(sets: Iterable[Shards]) -> object:
    return [[s.tokens(i).tolist() for i in range(len(s))] + s.text_bytes.tolist() for s in sets]


def read_verified(folder: Path) -> object:
    """As `arriero data verify` does: every byte, and the tokenizer."""
    sets = find_sets(folder)
    for shards in sets:
        shards.verify()
    verify_tokenizer(sets)
    return contents(sets)


def read_set(folder: Path) -> object:
    """As training does, which trusts the sizes."""
    return contents(open_sources(folder / "train").values())


# -- settings and records ----------------------------------------------------------------------------------------


def write_settings(folder: Path) -> None:
    for name in ("sft-docstrings-demo", *list(presets.PRESETS)[:2]):
        recipe, values = presets.get(name)
        (folder / f"{name}.toml").write_text(settings.to_toml(values, recipe), encoding="utf-8")


def read_settings(folder: Path) -> object:
    return [presets.load(str(path)) for path in sorted(folder.iterdir())]


def write_other_settings(folder: Path) -> None:
    (folder / "sweep.toml").write_text(
        settings.to_toml(SweepConfig(data="data", budgets=(1e15, 1e16))), encoding="utf-8"
    )
    (folder / "curate.json").write_text(json.dumps(settings.to_dict(CurateConfig(sources=("a.txt",))), default=str))


def read_other_settings(folder: Path) -> object:
    return settings.load(SweepConfig, folder / "sweep.toml"), settings.load(CurateConfig, folder / "curate.json")


def write_classifier(folder: Path) -> None:
    weights = np.ones(2**classifier.BITS, dtype=np.float32)
    classifier.save(classifier.Classifier(weights, 0.5, {"auc": 0.9}), folder / "quality.safetensors")


def read_classifier(folder: Path) -> object:
    found = classifier.load(str(folder / "quality.safetensors"))
    return found.bias, found.weights.sum()


def write_law(folder: Path) -> None:
    law = {"exponent": {"value": 0.5}, "coefficient": {"value": 0.3}}
    (folder / "fit.json").write_text(json.dumps({"power_law": law, "resamples": {"power_law": [[0.5, 0.3]]}}))


def read_law(folder: Path) -> object:
    return open_law(str(folder))


def write_metrics(folder: Path) -> None:
    records = [{"step": k, "loss": 3.0 / k, "lr": 1e-4, "tokens": 100 * k} for k in range(1, 9)]
    (folder / "metrics.jsonl").write_bytes(json_lines(records))


def read_metrics(folder: Path) -> object:
    return surviving_records(folder / "metrics.jsonl")


def write_bodies(folder: Path) -> None:
    write_requests(byte_level(), folder)


def write_journal(folder: Path) -> None:
    """Two rounds of a run that learns from its own answers: one scored, one not yet."""
    for round_, value in enumerate((1.0, None)):
        past = [Past(1, 1, "a", "b", 0.5)]
        answers = [Sampled([5, 7, k], [-0.5, -1.25, -2.0], True, f"é {k}", value, "ok", "", past) for k in range(3)]
        rows = [
            {"step": 3, "weights": {"step": 2, "checksum": "ab12"}, "reward": "exact",
             "asked": {"file": "p.jsonl", "row": 1, "text": "Hi"}, **asdict(Group(prompt, 2**61, answers))}
            for prompt in (4, 2)
        ]  # fmt: skip
        (folder / f"step-00000003-{round_}.jsonl").write_bytes(json_lines(rows))


def read_journal(folder: Path) -> object:
    found = [read_round(path) for path in sorted(folder.iterdir())]
    for _, groups in found:
        for group in groups:
            torch.tensor([float(answer.value or 0.0) for answer in group.answers])
            [(torch.tensor(a.ids), torch.tensor(a.logprobs), a.targets, a.rewards_with(1.0)) for a in group.answers]
    return found


def write_adapter_gguf(folder: Path) -> None:
    lora = LoraConfig(rank=2, alpha=4.0)
    adapted = add_lora(build_model(SHAPE).init_weights(std=0.15, seed=5), lora)
    tensors = {name: tensor.detach() for name, tensor in lora_state(adapted).items()}
    write_lora(folder / "adapter.gguf", SHAPE, lora, tensors)


def read_adapter_gguf(folder: Path) -> object:
    """It is no model, whatever becomes of it."""
    try:
        return use_model(folder / "adapter.gguf")
    except CheckpointError as error:
        return str(error)


def read_served(folder: Path) -> object:
    """As the engine opens it: matrices stay in the file, and in few bits."""
    path = folder / "m.gguf" if (folder / "m.gguf").exists() else folder
    held = load_model(path, dtype=torch.bfloat16, packed=True, filed=True)
    engine = Engine(held, cache_tokens=32, max_running=1)
    return engine.generate([Request([1, 5, 7], 2, stop_ids=(), text=False)])[0][0].ids


# -- all of them -------------------------------------------------------------------------------------------------

TOKENIZERS = [
    Subject("tokenizer.json", write_byte_level, read_tokenizer),
    Subject("tokenizer.json with named templates", write_named_templates, read_tokenizer),
    Subject("tokenizer of vocab.json and merges.txt", write_vocabulary, read_tokenizer),
    Subject("tokenizer.model of SentencePiece", write_sentencepiece, read_tokenizer),
    Subject("tokenizer.model of tiktoken", write_tiktoken, read_tokenizer),
]
WEIGHTS_AND_CONFIG = ("model.safetensors", "config.json")
MODELS = [
    Subject("hugging face, whole", write_hugging_face, read_checkpoint),
    Subject("hugging face, settings", write_hugging_face, read_model, ("config.json", "generation_config.json")),
    Subject("hugging face, weights", write_hugging_face, read_model, ("model.safetensors",)),
    Subject("hugging face in shards", write_in_shards, read_model),
    Subject("compressed-tensors, int4", partial(write_quantized, "int4"), read_model, WEIGHTS_AND_CONFIG),
    Subject("gptq", write_gptq, read_model, WEIGHTS_AND_CONFIG),
    Subject("awq", write_awq, read_model, WEIGHTS_AND_CONFIG),
    Subject("compressed-tensors, nf4", partial(write_quantized, "nf4"), read_model, WEIGHTS_AND_CONFIG),
    Subject("compressed-tensors, int8", partial(write_quantized, "int8"), read_model, WEIGHTS_AND_CONFIG),
    Subject("meta", write_metas, read_model),
    Subject("gguf, byte-level, Q8_0", write_gguf_bytes, read_gguf),
    Subject("gguf, pieces, F16", write_gguf_pieces, read_gguf),
    Subject("gguf, qwen3, BF16", write_gguf_qwen, read_gguf),
    Subject("adapter", write_adapter, read_adapter),
    Subject("adapter in gguf", write_adapter_gguf, read_adapter_gguf),
    Subject("served, compressed-tensors, int4", partial(write_quantized, "int4"), read_served, WEIGHTS_AND_CONFIG),
    Subject("served, gptq", write_gptq, read_served, WEIGHTS_AND_CONFIG),
    Subject("served, gguf, Q4_0", write_gguf_four_bits, read_served),
    Subject("checkpoint of a run", write_native, read_native, sealed=True),
    Subject("checkpoint of a run in parts", write_native_parts, read_native, sealed=True),
    Subject("checkpoint sealed anew", write_native, read_native_sealed_anew),
    Subject("checkpoint in parts sealed anew", write_native_parts, read_native_sealed_anew),
]
_JSONL = partial(json_lines, CONVERSATIONS)
ROWS = [
    Subject("rows p.jsonl", partial(_write, "p.jsonl", partial(json_lines, PREFERENCES)), read_preferences),
    rows("rows.jsonl", _JSONL),
    rows("rows.jsonl.gz", partial(gzip.compress, _JSONL(), mtime=0)),
    rows("rows.jsonl.zst", partial(zstd, _JSONL())),
    rows("rows.json", json.dumps(CONVERSATIONS).encode),
    rows("rows.csv", partial(csv, ",")),
    rows("rows.tsv", partial(csv, "\t")),
    rows("rows.parquet", parquet),
    rows("rows.arrow", partial(arrow, pa.ipc.new_stream)),
    rows("file.arrow", partial(arrow, pa.ipc.new_file)),
]
DOCUMENT_FILES = [
    documents("documents.jsonl", partial(json_lines, DOCUMENTS)),
    documents("page.html", PAGE.encode),
    documents("page.html", PAGE.encode, html="trafilatura"),
    documents("pages.warc", warc),
    documents("pages.warc.gz", partial(gzip.compress, warc(), mtime=0)),
    documents("text.txt", (TEXT * 5).encode),
    documents("code.py", "# coding: latin-1\n\ndef f(x):\n    'Says hé.'\n    return x\n".encode),
    Subject("curated corpus", write_curated, read_curated),
]
RECORDS = [
    Subject("token shards, verified", write_set, read_verified, sealed=True),
    Subject("token shards", write_set, read_set, ("train/*",)),
    Subject("settings", write_settings, read_settings),
    Subject("settings of sweeps and curations", write_other_settings, read_other_settings),
    Subject("quality classifier", write_classifier, read_classifier),
    Subject("fitted law", write_law, read_law),
    Subject("metrics", write_metrics, read_metrics),
    Subject("journal of rollouts", write_journal, read_journal),
]
REQUESTS = [Subject("requests", write_bodies, read_requests, ("*.json",))]
GROUPS = {
    "tokenizers": TOKENIZERS, "models": MODELS, "rows": ROWS, "documents": DOCUMENT_FILES, "records": RECORDS,
    "requests": REQUESTS,
}  # fmt: skip
SUBJECTS = [subject for group in GROUPS.values() for subject in group]
