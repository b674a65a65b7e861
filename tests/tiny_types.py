"""A tiny configuration of every type of causal language model that transformers has."""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig

V = 99

# One value for each name that configurations use for it; those that a configuration lacks are left.
SMALL = {
    **dict.fromkeys(("vocab_size", "text_vocab_size"), V),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
            "encoder_layers",
        ),
        4,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "mamba_n_heads",
            "n_mamba_heads",
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "n_head_kv", "num_kv_heads"), 2),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "n_inner",
            "ffn_hidden_size",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "intermediate_size_mlp",
            "mlp_hidden_size",
        ),
        64,
    ),
    **dict.fromkeys(("head_dim", "attention_head_dim", "v_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "kv_lora_rank", "q_lora_rank"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_selected_experts", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    **dict.fromkeys(
        (
            "dropout",
            "attention_dropout",
            "activation_dropout",
            "hidden_dropout",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "resid_dropout",
            "embed_dropout",
            "attention_dropout_prob",
            "classifier_dropout",
            "residual_dropout",
            "input_jitter_noise",
            "router_jitter_noise",
        ),
        0.0,
    ),
    "hidden_act": None,
    "query_pre_attn_scalar": 8,
    "rotary_dim": 4,
    "state_size": 8,
    "mamba_d_state": 8,
    "use_cache": True,
    "is_decoder": True,
    "tie_word_embeddings": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 1,
    "sliding_window": 64,
    "attn_hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": V,
}
_MAMBA = {"mamba_d_head": 16, "mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_d_state": 8}
# What a type needs beside.
SPECIAL = {
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4},
    "mpt": {
        **{"d_model": 32, "n_layers": 4, "n_heads": 4, "expansion_ratio": 2},
        "attn_config": {"attn_pdrop": 0},
    },
    "dbrx": {"d_model": 32, "n_layers": 4, "n_heads": 4},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "gpt_oss": {"layer_types": ["full_attention"] * 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "deepseek_v2": {"topk_method": "greedy", "num_key_value_heads": 4},
    **{
        name: {"num_key_value_heads": 4}
        for name in (
            *("deepseek_v3", "deepseek_v32", "axk1", "axk2", "youtu", "kimi_linear"),
            *("glm4_moe_lite", "glm_moe_dsa", "minicpm3", "dots3_note_text"),
        )
    },
    "bailing_hybrid": {
        "num_key_value_heads": 4,
        "qk_rope_head_dim": 4,
        "partial_rotary_factor": 0.5,
    },
    "bamba": {"attn_layer_indices": [1, 3], **_MAMBA},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, **_MAMBA},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 16,
    },
    "cohere_compass_text": {"layer_types": ["full_attention"] * 4},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "is_decoder": True},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "xlm": {"emb_dim": 32, "n_layers": 4, "n_heads": 4, "n_words": V},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": V,
        "shape_embed_dim": 8,
        "shape_vocab_size": V,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 48},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "smollm3": {"layer_types": ["full_attention"] * 4, "no_rope_layers": [1, 1, 1, 0]},
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """Return a small configuration of a type."""
    cls = type(AutoConfig.for_model(model_type))
    return cls(**(_shrunk(cls()) | SPECIAL.get(model_type, {})))


def _shrunk(config: PretrainedConfig) -> dict:
    """Return the values of a configuration that are made small, those of its parts included."""
    known = config.to_dict()
    values = {k: v for k, v in SMALL.items() if k in known and v is not None}
    for name, value in known.items():
        part = vars(config).get(name)
        if isinstance(part, PretrainedConfig):
            values[name] = _shrunk(part) | SPECIAL.get(part.model_type, {})
        # Lists a layer each, and numbers of layers under other names, follow the depth.
        elif isinstance(value, list) and len(value) == known.get("num_hidden_layers"):
            values[name] = value[:4] if name != "layer_types" else _types(value)
    return values


def _types(kinds: list[str]) -> list[str]:
    """Return four layers with every kind that the model has, in the order that they come in."""
    distinct = list(dict.fromkeys(kinds))
    return (distinct * 4)[:4]
