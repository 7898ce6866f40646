import pytest

from arriero.errors import CheckpointError, ConfigError
from arriero.model.config import PUBLISHED, LlamaConfig

COUNTS = {  # computed by hand from the papers' tables
    "llama1-7b": 6_738_415_616,
    "llama1-13b": 13_015_864_320,
    "llama1-33b": 32_528_943_616,
    "llama1-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def test_every_published_size_has_the_published_number_of_parameters():
    assert {name: config.n_params for name, config in PUBLISHED.items()} == COUNTS


def test_the_count_is_that_of_the_built_model():
    import torch

    from arriero.model.llama import Llama

    with torch.device("meta"):
        for name in ("llama2-70b", "llama3.2-1b", "smollm2-135m"):
            model = Llama(PUBLISHED[name])
            assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"n_heads 7 is not a multiple of n_kv_heads 3"):
        LlamaConfig(dim=56, n_layers=1, n_heads=7, n_kv_heads=3, ffn_dim=13, vocab_size=17, max_context=19)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE type 'yarn'"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(change, said):
    config = PUBLISHED["smollm2-135m"].to_hf() | change
    with pytest.raises(CheckpointError, match=said):
        LlamaConfig.from_hf(config)


def test_hf_config_round_trip():
    for config in PUBLISHED.values():
        assert LlamaConfig.from_hf(config.to_hf()) == config
