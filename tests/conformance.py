"""Check MoDE on every type of causal language model that the installed transformers has.

    python tests/conformance.py        # minutes; writes docs/models.json and docs/models.md

A tiny random model of each type is built from its configuration. `ok` means that all checks hold;
`refused`, that `attach` raised a DepthmixError; anything else is a failure of ours. Types that
cannot be built tiny here are listed apart, with the reason.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import depthmix
import reference
from depthmix.carry.adapters import mode_only_config
from depthmix.errors import DepthmixError
from depthmix.model.anatomy import Between
from models import PLAIN, choose_last_layer, perturb, randomise

DOCS = Path(__file__).parents[1] / "docs"
V, K = 99, 2
MOST_PARAMETERS = 10_000_000
IDS = torch.randint(4, V, (2, 7), generator=torch.Generator().manual_seed(0))

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


@dataclass
class Result:
    """What came out for a type: ok, refused, failed or not built, and why."""

    status: str
    reason: str = ""


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


def check(model_type: str) -> Result:
    """Build a tiny model and run all checks."""
    torch.manual_seed(0)
    try:
        config = tiny_config(model_type)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            return Result("not built", f"has {size:,} parameters by the usual names")
        base = AutoModelForCausalLM.from_config(config).float().eval()
        randomise(base)
        with torch.no_grad():
            expected = base(input_ids=IDS).logits
            if not torch.equal(expected, base(input_ids=IDS).logits):
                return Result("not built", "the base model is not deterministic")
    except Exception as error:
        return Result("not built", _short(error))
    try:
        model = depthmix.attach(copy.deepcopy(base), depthmix.MoDEConfig(k=K, **PLAIN))
    except DepthmixError as error:
        return Result("refused", _short(error))
    for name, run in CHECKS.items():
        try:
            run(base, copy.deepcopy(model), expected)
        except DepthmixError as error:
            return Result("refused", _short(error))
        except Exception as error:
            return Result("failed", f"{name}: {_short(error)}")
    return Result("ok")


def identity(base, model, expected):
    choose_last_layer(model.depthmix)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected), "differs from the base model"


def naive(base, model, **inputs):
    """Normed states of the late layers, gate, and the raw output of k heads."""
    anatomy = model.depthmix_runtime.anatomy
    normed = normed_states(base, anatomy, **inputs)
    states = reference.adapted(model.depthmix, normed) * anatomy.head_scale
    return reference.gate(model.depthmix, normed), reference.raw_logits(base, states)


def normed_states(base, anatomy, **inputs):
    """What the head gets of each late layer, (b, t, k, d)."""
    if anatomy.between is Between.MODULES:
        return reference.head_inputs(base, anatomy.layers_path, anatomy.head_path, K, **inputs)
    norm = base.get_submodule(anatomy.norm_path) if anatomy.norm_path else torch.nn.Identity()
    kept = []
    layers = base.get_submodule(anatomy.layers_path)[-K:]
    handles = [
        layer.register_forward_hook(
            lambda _m, _a, out: kept.append(out if isinstance(out, torch.Tensor) else out[0])
        )
        for layer in layers
    ]
    base(**inputs)
    for handle in handles:
        handle.remove()
    return torch.stack([norm(state) for state in kept], -2)


def mixture_is_the_gated_sum(base, model, expected):
    perturb(model.depthmix)
    transform = model.depthmix_runtime.anatomy.logit_transform
    with torch.no_grad():
        gate, raw = naive(base, model, input_ids=IDS)
        wanted = transform((gate.unsqueeze(-1) * raw).sum(-2))
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=1e-3, atol=1e-3)


def loss_and_gradients(base, model, expected):
    perturb(model.depthmix)
    base = copy.deepcopy(base).train()
    model.train()
    anatomy = model.depthmix_runtime.anatomy
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.depthmix.named_parameters()}
    model.zero_grad()
    gate, raw = naive(base, model, input_ids=IDS)
    shift = int(anatomy.labels_shifted)
    targets, length = IDS[:, shift:].flatten(), IDS.shape[1] - shift
    gate, raw = (tensor[:, :length].flatten(0, 1) for tensor in (gate, raw))
    normed = normed_states(base, anatomy, input_ids=IDS).detach()
    late = reference.adapted(model.depthmix, normed) * anatomy.head_scale
    late_raw = reference.raw_logits(base, late)[:, :length].flatten(0, 1)[:, :-1]
    total = reference.loss(
        raw,
        gate,
        targets,
        anatomy.logit_transform,
        model.depthmix.config.distill_weight,
        late_raw=late_raw,
    )
    wanted = total / len(targets)
    extra = _auxiliary(base)
    torch.testing.assert_close(loss, wanted + extra, rtol=1e-3, atol=1e-4)
    wanted.backward()
    for name, parameter in model.depthmix.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(
            ours[name],
            parameter.grad,
            rtol=1e-2,
            atol=1e-3 * scale + 1e-6,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def _auxiliary(base) -> torch.Tensor | float:
    """Return the loss of the experts' router that the model adds to its own, if it does."""
    with torch.no_grad():
        output = base(input_ids=IDS, labels=IDS)
    if output.get("aux_loss") is None or not getattr(base, "router_aux_loss_coef", 0):
        return 0.0
    return base.router_aux_loss_coef * output.aux_loss


def generation_with_and_without_cache(base, model, expected):
    perturb(model.depthmix)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}

    def generate(model, use_cache):
        mask = torch.ones_like(IDS)
        return model.generate(IDS, attention_mask=mask, use_cache=use_cache, **options)

    try:
        if not torch.equal(generate(base, True), generate(base, False)):
            return
    except Exception:
        return
    assert torch.equal(generate(model, True), generate(model, False)), "cache changes the reply"


def left_padding(base, model, expected):
    perturb(model.depthmix)
    ids = F.pad(IDS[:1], (2, 0))
    mask = F.pad(torch.ones_like(IDS[:1]), (2, 0))
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    @torch.no_grad()
    def gap(model):
        keywords = {"attention_mask": mask}
        if "position_ids" in model.forward.__code__.co_varnames:
            keywords["position_ids"] = positions
        padded = model(input_ids=ids, **keywords).logits[:, 2:]
        return (padded - model(input_ids=IDS[:1]).logits).abs().max().item()

    try:
        of_base = gap(base)
    except Exception:
        return
    if of_base < 1e-3:
        assert gap(model) < 1e-2, "left padding changes the logits"


def save_and_load(base, model, expected):
    wrapped = depthmix.attach(
        copy.deepcopy(base), depthmix.MoDEConfig(k=K, **PLAIN), mode_only_config()
    )
    perturb(wrapped.get_base_model().depthmix.modules_to_save["default"])
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        wanted = wrapped.eval()(input_ids=IDS).logits
        wrapped.save_pretrained(folder)
        loaded = depthmix.load(copy.deepcopy(base), folder).eval()
        assert torch.equal(loaded(input_ids=IDS).logits, wanted), "loaded logits differ"


CHECKS = {
    "identity": identity,
    "mixture": mixture_is_the_gated_sum,
    "loss": loss_and_gradients,
    "generation": generation_with_and_without_cache,
    "left padding": left_padding,
    "save and load": save_and_load,
}


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    prefix = (
        "" if isinstance(error, (DepthmixError, AssertionError)) else f"{type(error).__name__}: "
    )
    return (prefix + text)[:200]


def main() -> None:
    """Check all types and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("types", nargs="*", help="default: all that transformers maps")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of models.json, models.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    results: dict[str, Result] = {}
    for name in arguments.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        results[name] = check(name)
        print(f"{name}: {results[name].status} {results[name].reason}", flush=True)
    counts = {s: sum(r.status == s for r in results.values()) for s in _STATES}
    print(counts)
    if not arguments.types:
        write(results, counts, arguments.out)


_STATES = ("ok", "refused", "failed", "not built")


def write(results: dict[str, Result], counts: dict[str, int], folder: Path) -> None:
    """Write models.json with what was tested, and a table of everything."""
    tested = {n: vars(r) for n, r in results.items() if r.status != "not built"}
    (folder / "models.json").write_text(json.dumps(tested, indent=1) + "\n")
    lines = [
        "# Models",
        "",
        f"Types of transformers {transformers.__version__}, each checked as a "
        "tiny random model by `make models`: "
        + ", ".join(f"{count} {state}" for state, count in counts.items())
        + ".",
        "",
        "ok: with the gate on the last layer the logits are the base model's bit for bit; the "
        "mixture is the gated sum of the heads; loss and gradients are the naive ones; the cache "
        "and left padding change nothing (where they change nothing for the base model); saved and "
        "loaded, the logits are the same. refused: `attach` raises, with the reason.",
        "",
        "| type | status | reason |",
        "|---|---|---|",
        *(f"| {n} | {r.status} | {r.reason.replace('|', '/')} |" for n, r in results.items()),
    ]
    (folder / "models.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
