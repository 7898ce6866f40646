"""Arriero raises Llama models.

    import arriero

    arriero.sft("smollm2-135m", "train.jsonl", out="out/mine", lr=1e-4)
    model, tokenizer = arriero.load("smollm2-135m", adapter="out/mine/adapter")
    prompt = arriero.encode_chat(tokenizer, [{"role": "user", "content": "What is a llama?"}])
    for piece in arriero.stream(model, tokenizer, prompt):
        print(piece, end="", flush=True)

Names are imported when first used: `import arriero` takes milliseconds and no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from arriero.version import __version__ as __version__

if TYPE_CHECKING:
    from arriero.api import dpo as dpo
    from arriero.api import evaluate as evaluate
    from arriero.api import grpo as grpo
    from arriero.api import online_dpo as online_dpo
    from arriero.api import ppo as ppo
    from arriero.api import pretrain as pretrain
    from arriero.api import rejection as rejection
    from arriero.api import reward as reward
    from arriero.api import sft as sft
    from arriero.checkpoint.average import average as average
    from arriero.checkpoint.convert import convert as convert
    from arriero.checkpoint.load import load as load
    from arriero.checkpoint.merge import merge as merge
    from arriero.checkpoint.quantize import quantize as quantize
    from arriero.errors import UserError as UserError
    from arriero.eval.config import EvalConfig as EvalConfig
    from arriero.infer.config import SamplingConfig as SamplingConfig
    from arriero.infer.engine import Engine as Engine
    from arriero.infer.generate import generate as generate
    from arriero.infer.generate import stream as stream
    from arriero.infer.request import Request as Request
    from arriero.infer.score import open_reward_model as open_reward_model
    from arriero.model.config import LlamaConfig as LlamaConfig
    from arriero.model.llama import Llama as Llama
    from arriero.model.lora_config import LoraConfig as LoraConfig
    from arriero.tokenizer import Tokenizer as Tokenizer
    from arriero.tokenizer import load_tokenizer as load_tokenizer
    from arriero.tokenizer.chat import encode_chat as encode_chat
    from arriero.train.config import PretrainConfig as PretrainConfig
    from arriero.train.config import SftConfig as SftConfig
    from arriero.train.recover import recover as recover


_HOMES = {
    "dpo": "arriero.api",
    "evaluate": "arriero.api",
    "grpo": "arriero.api",
    "online_dpo": "arriero.api",
    "ppo": "arriero.api",
    "pretrain": "arriero.api",
    "rejection": "arriero.api",
    "reward": "arriero.api",
    "sft": "arriero.api",
    "average": "arriero.checkpoint.average",
    "convert": "arriero.checkpoint.convert",
    "load": "arriero.checkpoint.load",
    "merge": "arriero.checkpoint.merge",
    "quantize": "arriero.checkpoint.quantize",
    "UserError": "arriero.errors",
    "EvalConfig": "arriero.eval.config",
    "SamplingConfig": "arriero.infer.config",
    "Engine": "arriero.infer.engine",
    "Request": "arriero.infer.request",
    "generate": "arriero.infer.generate",
    "stream": "arriero.infer.generate",
    "open_reward_model": "arriero.infer.score",
    "LlamaConfig": "arriero.model.config",
    "LoraConfig": "arriero.model.lora_config",
    "Llama": "arriero.model.llama",
    "Tokenizer": "arriero.tokenizer",
    "load_tokenizer": "arriero.tokenizer",
    "encode_chat": "arriero.tokenizer.chat",
    "PretrainConfig": "arriero.train.config",
    "SftConfig": "arriero.train.config",
    "recover": "arriero.train.recover",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'arriero' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
