import pytest

from arriero.errors import CheckpointError, ConfigError
from arriero.model.catalogue import PUBLISHED, QWEN3, SHAPES
from arriero.model.config import LlamaConfig

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
QWEN3_COUNTS = {  # as in the model cards, the tied head of the first three once
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}


def test_every_published_size_has_the_published_number_of_parameters():
    assert {name: config.n_params for name, config in PUBLISHED.items()} == COUNTS
    assert {name: config.n_params for name, config in QWEN3.items()} == QWEN3_COUNTS


def test_the_count_is_that_of_the_built_model():
    import torch

    from arriero.model.build import build_model

    with torch.device("meta"):
        for name in ("llama2-70b", "llama3.2-1b", "smollm2-135m", "qwen3-0.6b", "qwen3-30m"):
            assert sum(p.numel() for p in build_model(SHAPES[name]).parameters()) == SHAPES[name].n_params


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"n_heads 7 is not a multiple of n_kv_heads 3"):
        LlamaConfig(dim=56, n_layers=1, n_heads=7, n_kv_heads=3, ffn_dim=13, vocab_size=17, max_context=19)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, 'RoPE type "longrope"; computed here are'),
        ({"attention_multiplier": 0.1}, "attention_multiplier is 0.1; a .* is computed here as with null only"),
        ({"embedding_multiplier": 12}, "embedding_multiplier is 12; a .* is computed here as with 1 only"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_interleaved": True}, "rope_interleaved is true"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        (
            {"num_attention_heads": True},
            "num_attention_heads is true; it must be a whole number from 1 to 2,147,483,647",
        ),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number"),
        ({"max_position_embeddings": 1e30}, r"max_position_embeddings is 1e\+30; it must be a whole number"),
        ({"tie_word_embeddings": "true"}, 'tie_word_embeddings is "true"; it must be true or false'),
        ({"rms_norm_eps": 0}, r"norm_eps is 0\.0; it must be above 0 and below 1"),
        ({"rope_theta": 0}, r"rope_theta is 0\.0; it must be above 1"),
        ({"use_sliding_window": True}, "use_sliding_window is true; a .* is computed here as with false only"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "every layer here has full attention"),
    ],
)
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen3-0.6b"])
def test_what_the_decoder_does_not_compute_is_refused(name, change, said):
    config = SHAPES[name].to_hf() | change
    with pytest.raises(CheckpointError, match=said):
        LlamaConfig.from_hf(config)


def test_hf_config_round_trip():
    for config in SHAPES.values():
        assert LlamaConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen3-0.6b"])
def test_what_is_merely_not_used_is_named_once_and_what_every_file_has_is_not(name, fresh_warnings):
    usual = {"transformers_version": "5.0", "use_cache": False, "eos_token_id": [1, 2], "mlp_bias": False,
             "pretraining_tp": 2, "logit_scale": 1.0, "quantization_config": None, "is_llama_config": True}  # fmt: skip
    LlamaConfig.from_hf(SHAPES[name].to_hf() | usual)
    assert fresh_warnings() == []
    for _ in range(2):
        LlamaConfig.from_hf(
            SHAPES[name].to_hf() | {"my_notes": "x", "auto_map": {}, "attention_dropout": 0.1}, "a.json"
        )
    assert fresh_warnings() == [
        "a.json: attention_dropout is 0.1; training applies none",
        f"a.json: not used for a {SHAPES[name].model_type}, as in transformers: auto_map, my_notes",
    ]


def test_what_a_qwen3_leaves_out_is_as_in_transformers():
    left_out = {
        k: v for k, v in QWEN3["qwen3-0.6b"].to_hf().items() if k not in ("head_dim", "max_position_embeddings")
    }
    config = LlamaConfig.from_hf(left_out)
    assert (config.head_dim, config.max_context) == (128, 32_768)
