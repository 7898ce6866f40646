"""Encoding many documents: `DocumentEncoder`, on which `arriero shard` runs, against each library's own batch call.

The same documents (the standard library's source, and prose where given) through the same vocabulary, by turns in one
process, with equal ids checked. Three vocabularies: Llama 3's kind and Llama 1 and 2's, learned here from the other
half of the text, and SmolLM2's. Caches of words are cold in each round: tables are built anew, outside the timing. One
JSON line: megabytes of text a second (median, lowest and highest of the rounds), by the wall clock and by CPU time.

    python bench/tokenizer.py [--rounds 5] [--vocab-size 32000] [--prose FILE ...] [--threads 0]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import gigatoken.gigatoken_rs
import numpy as np
import sentencepiece
import tiktoken
import tokenizers

from arriero.checkpoint.source import resolve
from arriero.curate.sources import read_documents
from arriero.tokenizer import Tokenizer, load_tokenizer
from arriero.tokenizer.hf import HfTokenizer
from arriero.tokenizer.llama3 import SPLIT, TiktokenTokenizer
from arriero.tokenizer.parallel import DocumentEncoder
from arriero.tokenizer.sample import draw_sample
from arriero.tokenizer.train import Kind, TrainingConfig, learn

BUILT_IN = "smollm2-135m"
Encode = Callable[[list[str]], Sequence[Sequence[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--prose", nargs="*", default=[], help="more sources of documents")
    parser.add_argument("--threads", type=int, default=0, help="1: every way keeps to one thread")
    args = parser.parse_args()
    if args.threads == 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = [document.text for document in read_documents(["stdlib", *args.prose])]
    learned_from, measured_on = texts[::2], texts[1::2]
    megabytes = sum(len(text.encode()) for text in measured_on) / 1e6
    result: dict[str, Any] = {
        "bench": "tokenizer", "megabytes": round(megabytes, 2), "documents": len(measured_on), "rounds": args.rounds,
        "vocab_size": args.vocab_size, "cores": os.cpu_count(), "threads": args.threads,
        "versions": {"tokenizers": tokenizers.__version__, "tiktoken": tiktoken.__version__,
                     "sentencepiece": sentencepiece.__version__},
    }  # fmt: skip
    kinds: tuple[Kind, ...] = ("llama3", "llama2")
    for kind in kinds:
        sample = draw_sample(learned_from, 100_000_000)
        tokenizer = learn(sample, TrainingConfig(kind, args.vocab_size))
        result[kind] = race(tokenizer, measured_on, megabytes, args.rounds, args.threads)
    result[BUILT_IN] = race(load_tokenizer(resolve(BUILT_IN)), measured_on, megabytes, args.rounds, args.threads)
    print(json.dumps(result))


def race(tokenizer: Tokenizer, texts: list[str], megabytes: float, rounds: int, threads: int) -> dict[str, Any]:
    """Time every way on the texts, the ways by turns."""
    builders = ways(tokenizer, threads)
    expected = tokenizer.encode_batch(texts)
    wall: dict[str, list[float]] = {name: [] for name in builders}
    cpu: dict[str, list[float]] = {name: [] for name in builders}
    for _ in range(rounds):
        for name, build in builders.items():
            encode = build()
            cpu_began, began = time.process_time(), time.perf_counter()
            rows = encode(texts)
            wall[name].append(megabytes / (time.perf_counter() - began))
            cpu[name].append(megabytes / (time.process_time() - cpu_began))
            same = (np.array_equal(np.asarray(row), ids) for row, ids in zip(rows, expected, strict=True))
            assert all(same), name
    medians = {name: statistics.median(values) for name, values in wall.items()}
    fastest = max((name for name in builders if not name.startswith("arriero")), key=medians.__getitem__)
    return {
        "mb_per_s": {
            name: {"median": round(medians[name], 1), "min": round(min(v), 1), "max": round(max(v), 1)}
            for name, v in wall.items()
        },
        "mb_per_cpu_s": {name: round(statistics.median(values), 1) for name, values in cpu.items()},
        "fastest_library": fastest,
        "ratio_to_fastest": round(medians["arriero"] / medians[fastest], 2),
        "ratio": {n: round(medians["arriero"] / m, 2) for n, m in medians.items() if n != "arriero"},
    }


def ways(tokenizer: Tokenizer, threads: int) -> dict[str, Callable[[], Encode]]:
    """Return, by name, a function that makes ready to encode, with nothing cached, and returns the function that does.

    A library's way is its fastest call that takes all documents at once, with the lists or arrays it gives.
    """
    n_threads = threads or os.cpu_count() or 1
    backend = tokenizer.backend if isinstance(tokenizer, HfTokenizer) else tokenizer.to_backend()  # type: ignore
    state = {**json.loads(backend.to_str()), "added_tokens": [], "post_processor": None}

    def arriero(engine: str) -> Callable[[], Encode]:
        def build() -> Encode:
            encoder = DocumentEncoder(tokenizer, parallel=threads != 1, engine=engine)  # type: ignore[arg-type]
            return encoder.encode  # type: ignore[return-value]

        return build

    def giga() -> Encode:
        table = gigatoken.gigatoken_rs.load_hf_json(json.dumps(state))
        return lambda texts: table.encode_batch(texts, parallel=threads != 1)

    def huggingface() -> Encode:
        pipeline = tokenizers.Tokenizer.from_str(json.dumps(state))
        return lambda texts: [e.ids for e in pipeline.encode_batch_fast(texts, add_special_tokens=False)]

    found: dict[str, Callable[[], Encode]] = {
        "arriero": arriero("auto"),
        "arriero_exact": arriero("exact"),
        "tokenizers": huggingface,
    }
    if isinstance(tokenizer, HfTokenizer):
        return found  # gigatoken refuses this pipeline as it stands
    found["gigatoken"] = giga
    if isinstance(tokenizer, TiktokenTokenizer):
        ranks = tokenizer.ranks

        def openai() -> Encode:
            encoding = tiktoken.Encoding("bench", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
            return lambda texts: encoding.encode_ordinary_batch(texts, num_threads=n_threads)

        found["tiktoken"] = openai
    else:
        model = tokenizer.model  # type: ignore[attr-defined]

        def google() -> Encode:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            return lambda texts: processor.encode(texts, num_threads=n_threads)

        found["sentencepiece"] = google
    return found


if __name__ == "__main__":
    main()
