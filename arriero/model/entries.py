"""Entries of config.json other than the shape.

Entries that change the arithmetic are refused by name, entries that are merely unused are warned of once, and those
that every file has and nothing here needs are ignored.
"""

from __future__ import annotations

from typing import Any

from arriero.errors import CheckpointError
from arriero.io.fields import Fields, shown
from arriero.show.terminal import warn_once

# Entries that change what a decoder computes, by the value at which they change nothing.
_OFF = (
    "attention_bias", "mlp_bias", "qkv_bias", "attention_out_bias", "use_bias", "bias", "lm_head_bias",
    "use_sliding_window", "use_qk_norm", "qk_norm", "qk_layernorm", "use_parallel_residual", "parallel_attn",
    "rope_interleaved", "alibi", "attn_temperature_tuning", "use_bidirectional_attention", "is_encoder_decoder",
    "add_cross_attention", "attention_sinks",
)  # fmt: skip
_ONE = (
    "partial_rotary_factor", "rotary_pct", "embedding_multiplier", "scale_emb", "residual_multiplier",
    "logits_scaling", "logit_scale", "lm_head_multiplier",
)  # fmt: skip
_ABSENT = (
    "attention_multiplier", "scale_depth", "dim_model_base", "query_pre_attn_scalar", "clip_qkv",
    "attn_logit_softcapping", "final_logit_softcapping", "logit_softcapping", "attention_chunk_size",
    "no_rope_layers", "no_rope_layer_interval", "per_layer_config", "cross_attention_hidden_size",
    "transformers_weights",
)  # fmt: skip
_ZERO = (
    "num_experts", "num_local_experts", "n_routed_experts", "num_nextn_predict_layers",
    "chunk_size_feed_forward",
)  # fmt: skip
_NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(_OFF, False),
    **dict.fromkeys(_ONE, 1),
    **dict.fromkeys(_ABSENT),
    **dict.fromkeys(_ZERO, 0),
    "is_causal": True,
    "position_embedding_type": "rope",
}

# Entries that change nothing here; tokens and settings of generation are read by others.
_HARMLESS = (
    "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "_name_or_path",
    "architectures", "attention_probs_dropout_prob", "attn_implementation", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "id2label", "initializer_range", "is_decoder", "is_llama_config", "label2id", "length_penalty",
    "max_length", "max_window_layers", "min_length", "min_p", "model_max_length", "name_or_path",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "typical_p", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache",
)  # fmt: skip
_READ = (
    "attention_dropout", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_types",
    "max_position_embeddings", "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "original_max_position_embeddings", "quantization_config", "rms_norm_eps", "rope_parameters",
    "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings", "vocab_size",
)  # fmt: skip


def is_known(name: str) -> bool:
    """Whether an entry is computed with, refused where it would change the arithmetic, or of no effect here."""
    return name in _NEUTRAL or name in _HARMLESS or name in _READ


def check_entries(config: Fields, kind: str) -> None:
    """Refuse (`CheckpointError`) what decoders of this `kind` do not compute; warn once of what else is not read."""
    _check_layers(config, kind)
    for name, neutral in _NEUTRAL.items():
        if config.get(name, neutral) != neutral:
            raise CheckpointError(
                f"{config.file}: {name} is {shown(config[name])}; a {kind} is computed here as with "
                f"{shown(neutral)} only: take another model, or this one's own software"
            )
    if config.get("attention_dropout"):
        warn_once(f"{config.file}: attention_dropout is {shown(config['attention_dropout'])}; training applies none")
    unused = sorted(name for name in config if not is_known(name))
    if kind == "llama" and "sliding_window" in config:  # Mistral's; its weights may be called a Llama's
        unused.append("sliding_window")
    if unused:
        warn_once(f"{config.file}: not used for a {kind}, as in transformers: {', '.join(unused)}")


def _check_layers(config: Fields, kind: str) -> None:
    layers, activation = config.get("layer_types", []), config.get("hidden_act", "silu")
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise CheckpointError(
            f"{config.file}: layer_types is {shown(layers)}; every layer here has full attention: take another model, "
            "or this one's own software"
        )
    if activation not in ("silu", "swish"):  # two names of one function
        raise CheckpointError(
            f"{config.file}: hidden_act is {shown(activation)}; a {kind} here uses 'silu': take another model, or this "
            "one's own software"
        )
