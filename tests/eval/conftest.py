import pytest
import torch

from arriero.checkpoint.load import load_model, load_tokenizer_at


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf):
    """The real model in fp32, multiplied out, and its tokenizer."""
    return load_model(smollm2_gguf, dtype=torch.float32), load_tokenizer_at(smollm2_gguf)


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
