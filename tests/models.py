"""Tiny models of ten types, with what the reference must know of each written down by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import depthmix
from depthmix.method.mixture import DepthMixture

VOCABULARY = 97
HIDDEN = 32
LAYERS = 4
CAP = 5.0  # small, so that it bites on logits of these models


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a type are, and what it does to the head's output."""

    config: Callable[..., PreTrainedConfig]
    options: dict[str, Any]
    layers: str = "model.layers"
    norm: str = "model.norm"
    transform: Callable[[Tensor], Tensor] = lambda raw: raw


COMMON = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
}
USUAL = {
    **COMMON,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}
GROUPED = {**USUAL, "num_key_value_heads": 2}
_GEMMA2 = {
    **GROUPED,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "final_logit_softcapping": CAP,
}
_GPT2 = {
    **COMMON,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_OPT = {**USUAL, "ffn_dim": 64, "word_embed_proj_dim": HIDDEN, "dropout": 0.0}

ANATOMIES = {
    "llama": Anatomy(LlamaConfig, GROUPED),
    "mistral": Anatomy(MistralConfig, GROUPED),
    "qwen2": Anatomy(Qwen2Config, GROUPED | {"tie_word_embeddings": True}),
    "gemma2": Anatomy(Gemma2Config, _GEMMA2, transform=lambda raw: CAP * torch.tanh(raw / CAP)),
    "granite": Anatomy(
        GraniteConfig, GROUPED | {"logits_scaling": 4.0}, transform=lambda raw: raw / 4
    ),
    "cohere2": Anatomy(
        Cohere2Config, GROUPED | {"logit_scale": 0.5}, transform=lambda raw: raw * 0.5
    ),
    "gpt2": Anatomy(GPT2Config, _GPT2, "transformer.h", "transformer.ln_f"),
    "gpt_neox": Anatomy(GPTNeoXConfig, USUAL, "gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "opt": Anatomy(OPTConfig, _OPT, "model.decoder.layers", "model.decoder.final_layer_norm"),
    "phi": Anatomy(PhiConfig, USUAL, norm="model.final_layernorm"),
}
TYPES = list(ANATOMIES)


# Weights that are even at the start, and every token distilled: nothing random in the loss.
PLAIN = {"router_prior": None, "distill_fraction": 1.0}


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """Return a random model of 4 layers, in eval mode; `changes` go to its configuration."""
    anatomy = ANATOMIES[model_type]
    config = anatomy.config(**(anatomy.options | changes))
    return randomise(AutoModelForCausalLM.from_config(config)).eval()


def randomise(model: nn.Module) -> nn.Module:
    """Make every parameter matter: norms not one, biases not zero, logits of several units."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def attached(base: PreTrainedModel, perturbed: bool = True, **config: Any) -> PreTrainedModel:
    """Return a copy of `base` with MoDE, whose parameters are random unless `perturbed` is off."""
    model = copy.deepcopy(base)
    depthmix.attach(model, depthmix.MoDEConfig(**(PLAIN | config)))
    if perturbed and model.depthmix.config.k > 1:
        perturb(model.depthmix)
    return model


def perturb(mixture: DepthMixture) -> None:
    """Set MoDE's parameters as if it were trained: uneven gates, scales away from zero."""
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            parameter.normal_(std=2.0 if name == "router.weight" else 0.3)


def choose_last_layer(mixture: DepthMixture) -> None:
    """Make the gate one-hot on the last layer."""
    with torch.no_grad():
        mixture.router.bias[-1] = 1e4


def token_ids(batch: int = 2, length: int = 9) -> Tensor:
    """Return random ids above the special ones; the same on every call."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(4, VOCABULARY, (batch, length), generator=generator)


def word_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of 97 words: four special ones, then w4 to w96."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocabulary |= {f"w{i}": i for i in range(4, VOCABULARY)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **options,
    )
