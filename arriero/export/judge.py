"""Another program's view of what was exported: `python -m arriero.export.judge transformers|llamacpp`.

A process of its own, since transformers and llama.cpp are no dependencies of Arriero and bring threads and memory of
their own. It reads a job (JSON) from standard input, loads the exported files as that program's users do, and writes
what it found to files in the job's folder. No code of Arriero's takes part in it.

Job: path, adapter (or null), messages (a list of conversations), texts (ids to score), tail (of how many last positions
the whole distribution is wanted), n_new, out (a folder). Result: result.json with the ids of each conversation, the
greedy ids behind it, ln p of each token of each text, bos, eos, and the ids that end an answer; tail.npy, fp32
[positions, V].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Judge by the program that the command line names."""
    job = json.load(sys.stdin)
    result, tail = {"transformers": _transformers, "llamacpp": _llamacpp}[sys.argv[1]](job)
    out = Path(job["out"])
    np.save(out / "tail.npy", np.concatenate(tail))
    (out / "result.json").write_text(json.dumps(result), "utf-8")


def _transformers(job: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["path"])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(job["path"], dtype=torch.float32)
    if job["adapter"]:
        import peft

        model = peft.PeftModel.from_pretrained(model, job["adapter"])
    model.eval()
    stops = model.generation_config.eos_token_id
    result: dict[str, Any] = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "stops": stops if isinstance(stops, list) else [] if stops is None else [stops],
        "prompts": [], "answers": [], "logprobs": [],
    }  # fmt: skip
    tail = []
    with torch.inference_mode():
        for messages in job["messages"]:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            prompt = torch.tensor([ids])
            said = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=job["n_new"],
                temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
            )  # fmt: skip
            result["prompts"].append(ids)
            result["answers"].append(said[0, len(ids) :].tolist())
        for ids in job["texts"]:
            logits = model(input_ids=torch.tensor([ids])).logits[0].float()
            logprobs, last = _scored(logits.numpy(), ids, job["tail"])
            result["logprobs"].append(logprobs)
            tail.append(last)
    return result, tail


def _llamacpp(job: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    import llama_cpp
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    model = llama_cpp.Llama(
        job["path"], lora_path=job["adapter"], n_ctx=1024, logits_all=True, verbose=False, type_k=0, type_v=0,
        n_threads=2,
    )  # fmt: skip
    vocabulary = model._model.vocab
    n = model.n_vocab()
    metadata = model.metadata
    bos, eos = model.token_bos(), model.token_eos()

    def text_of(token: int) -> str:
        return "" if token < 0 else llama_cpp.llama_vocab_get_text(vocabulary, token).decode()

    formatter = Jinja2ChatFormatter(metadata["tokenizer.chat_template"], eos_token=text_of(eos), bos_token=text_of(bos))
    result: dict[str, Any] = {
        "bos": bos if bos >= 0 else None,
        "eos": eos,
        "stops": [i for i in range(n) if llama_cpp.llama_vocab_is_eog(vocabulary, i)],
        "prompts": [], "answers": [], "logprobs": [],
    }  # fmt: skip
    tail = []
    for messages in job["messages"]:
        text = formatter(messages=messages).prompt
        adds = bool(llama_cpp.llama_vocab_get_add_bos(vocabulary)) and not text.startswith(text_of(bos) or "\0")
        ids = model.tokenize(text.encode(), add_bos=adds, special=True)
        result["prompts"].append(ids)
        model.reset()
        model.eval(ids)
        said: list[int] = []
        while len(said) < job["n_new"]:
            said.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            if said[-1] in result["stops"]:
                break
            model.eval(said[-1:])
        result["answers"].append(said)
    for ids in job["texts"]:
        model.reset()
        model.eval(ids)
        logprobs, last = _scored(np.array(model.scores[: len(ids)], np.float32), ids, job["tail"])
        result["logprobs"].append(logprobs)
        tail.append(last)
    return result, tail


def _scored(logits: np.ndarray, ids: list[int], tail: int) -> tuple[list[float], np.ndarray]:
    """ln p of each token but the first, and the whole distributions ln p of the last positions."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    rows = np.arange(len(ids) - 1)
    return logprobs[rows, ids[1:]].tolist(), logprobs[-tail:].astype(np.float32)


if __name__ == "__main__":
    main()
