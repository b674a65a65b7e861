"""How often does `attach` take a model for what it is not? Random tiny models, family by family.

    python experiments/probe_errors.py --models 200

A model counts as wrong if `attach` is silent and labels are moved though they should not be (or
the other way round), or if the training loss, with the gate on the last layer and without
distillation, is not the model's own. One that `attach` refuses counts as refused.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
)

import depthmix
from depthmix.errors import DiscoveryError

VOCABULARY = 61
COMMON: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
ENCODER = COMMON | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIDES = {
    **{"vocab_size": VOCABULARY, "d_model": 32, "dropout": 0.0, "decoder_start_token_id": 2},
    **{f"{side}_layers": 3 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    **{f"{side}_layerdrop": 0.0 for side in ("encoder", "decoder")},
    **{"attention_dropout": 0.0},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2},
}
T5 = {
    **{"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4},
    **{"num_layers": 3, "decoder_start_token_id": 0, "dropout_rate": 0.0},
}


def dense(draw: random.Random) -> PreTrainedConfig:
    """A causal model without anything beside its cross-entropy."""
    kind = draw.choice(["LlamaConfig", "Qwen2Config", "Gemma2Config", "GraniteConfig"])
    cap = {"final_logit_softcapping": draw.choice([5.0, 30.0]), "head_dim": 8}
    scaled = {"logits_scaling": draw.choice([0.25, 4.0, 13.0])}
    further = {"Gemma2Config": cap, "GraniteConfig": scaled}.get(kind, {})
    return _config(kind, COMMON | further | {"tie_word_embeddings": draw.random() < 0.5})


def experts(draw: random.Random) -> PreTrainedConfig:
    """Experts with router logits on, whose loss has a coefficient of 0.001 to 1."""
    kind = draw.choice(["MixtralConfig", "Qwen3MoeConfig", "GptOssConfig", "JetMoeConfig"])
    coefficient = 10 ** draw.uniform(-3, 0)
    options = COMMON | {
        **{"output_router_logits": True, "num_local_experts": 4, "num_experts_per_tok": 2},
        **{"router_aux_loss_coef": coefficient, "head_dim": 8, "sliding_window": 32},
    }
    if kind == "Qwen3MoeConfig":
        options |= {"num_experts": 4, "moe_intermediate_size": 24}
    if kind == "JetMoeConfig":
        options |= {"aux_loss_coef": coefficient, "kv_channels": 8, "num_key_value_heads": 2}
    return _config(kind, options)


def masked(draw: random.Random) -> PreTrainedConfig:
    """A bidirectional model, whose labels stay where they are."""
    kinds = ["BertConfig", "RobertaConfig", "ModernBertConfig", "DebertaV2Config"]
    return _config(draw.choice(kinds), ENCODER | {"cls_token_id": 1, "sep_token_id": 2})


def encoder_decoder(draw: random.Random) -> PreTrainedConfig:
    """A decoder behind an encoder, which gets its labels moved by one."""
    kinds = ["T5Config", "BartConfig", "M2M100Config", "BlenderbotConfig", "MarianConfig"]
    kind = draw.choice(kinds)
    return _config(kind, T5 if kind == "T5Config" else SIDES)


def _config(kind: str, options: dict[str, Any]) -> PreTrainedConfig:
    config: PreTrainedConfig = getattr(transformers, kind)(**options)
    return config


# Configuration, class that builds it, whether labels are moved, dtype.
FAMILIES: dict[str, tuple[Callable[..., PreTrainedConfig], Any, bool, torch.dtype]] = {
    "dense": (dense, AutoModelForCausalLM, True, torch.float32),
    "dense, bf16": (dense, AutoModelForCausalLM, True, torch.bfloat16),
    "experts": (experts, AutoModelForCausalLM, True, torch.float32),
    "experts, bf16": (experts, AutoModelForCausalLM, True, torch.bfloat16),
    "masked": (masked, AutoModelForMaskedLM, False, torch.float32),
    "masked, bf16": (masked, AutoModelForMaskedLM, False, torch.bfloat16),
    "encoder-decoder": (encoder_decoder, AutoModelForSeq2SeqLM, False, torch.float32),
    "encoder-decoder, bf16": (encoder_decoder, AutoModelForSeq2SeqLM, False, torch.bfloat16),
}


def main() -> None:
    """Attach to all models and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=int, default=200, help="a family (default: 200)")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print("| family | right | refused | wrong |\n|---|---|---|---|")
    for family in options.families:
        counts, notes = Counter[str](), set[str]()
        for seed in range(options.models):
            verdict, note = judged(family, seed)
            counts[verdict] += 1
            notes |= {f"    seed {seed}: {verdict}: {note}"} if note else set()
        figures = " | ".join(str(counts[v]) for v in ("right", "refused", "wrong"))
        print(f"| {family} | {figures} |", *sorted(notes), sep="\n", flush=True)


def judged(family: str, seed: int) -> tuple[str, str]:
    """Return what `attach` made of one model of a family, and why if that is not right."""
    draw_config, auto, moved, dtype = FAMILIES[family]
    draw = random.Random(seed)
    config = draw_config(draw)
    torch.manual_seed(seed)
    base: Any = auto.from_config(config)
    if draw.random() < 0.7:  # otherwise as fresh as the library makes it
        spread(base, draw.choice([0.05, 0.2, 0.5]))
    base = base.to(dtype).eval()
    model = copy.deepcopy(base)
    mode = depthmix.MoDEConfig(k=2, adaptation="none", distill_weight=0.0, router_prior=None)
    try:
        depthmix.attach(model, mode)
    except DiscoveryError as error:
        return "refused", f"{type(base).__name__}: {error}"
    found: Any = model
    if found.depthmix_runtime.anatomy.labels_shifted != moved:
        return "wrong", f"{type(base).__name__}: labels moved: {not moved}"
    found.depthmix.router.bias.data[-1] = 1e4
    ids = torch.randint(4, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
    own = float(base(input_ids=ids, labels=ids).loss.detach())
    ours = float(model.train()(input_ids=ids, labels=ids).loss.detach())
    tolerance = max(1e-4, 8 * torch.finfo(dtype).eps) * max(1.0, abs(own))
    if abs(own - ours) > tolerance:
        return "wrong", f"{type(base).__name__}: loss {ours:.6g}, its own {own:.6g}"
    return "right", ""


def spread(model: torch.nn.Module, size: float) -> None:
    """Make every weight matter: norms not one, biases not zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=size)
            else:
                parameter.add_(size * torch.randn_like(parameter))


if __name__ == "__main__":
    main()
