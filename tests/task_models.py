"""Tiny models that are not causal (masked, encoder-decoder, classifiers)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from transformers import PreTrainedModel

from models import HIDDEN, LAYERS, USUAL, VOCABULARY, randomise

CLASSES = 3
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT = USUAL | _STILL
_MODERN = USUAL | {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2}
_DISTIL = {
    **{"vocab_size": VOCABULARY, "dim": HIDDEN, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 64},
    **{"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "pad_token_id": 0},
}
_T5 = {
    **{"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 64, "num_heads": 4},
    **{"num_layers": LAYERS, "decoder_start_token_id": 0, "dropout_rate": 0.0},
}
_BART = {
    **{"vocab_size": VOCABULARY, "d_model": HIDDEN, "dropout": 0.0, "decoder_start_token_id": 2},
    **{f"{side}_layers": LAYERS for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
}
_GPT2 = {
    **{"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_CLASSES = {"num_labels": CLASSES}


@dataclass(frozen=True)
class TaskModel:
    """How to build a tiny model, and where the layers and the head are."""

    build: Callable[..., PreTrainedModel]
    layers: str
    head: str


def _of(model: str, config: str, options: dict) -> Callable[..., PreTrainedModel]:
    def build(**changes):
        return getattr(hf, model)(getattr(hf, config)(**(options | changes)))

    return build


MASKED = {
    "bert": TaskModel(
        _of("BertForMaskedLM", "BertConfig", _BERT),
        "bert.encoder.layer",
        "cls.predictions.decoder",
    ),
    "roberta": TaskModel(
        _of("RobertaForMaskedLM", "RobertaConfig", _BERT),
        "roberta.encoder.layer",
        "lm_head.decoder",
    ),
    "modernbert": TaskModel(
        _of("ModernBertForMaskedLM", "ModernBertConfig", _MODERN), "model.layers", "decoder"
    ),
    "deberta-v2": TaskModel(
        _of("DebertaV2ForMaskedLM", "DebertaV2Config", _BERT),
        "deberta.encoder.layer",
        "cls.predictions.decoder",
    ),
    "distilbert": TaskModel(
        _of("DistilBertForMaskedLM", "DistilBertConfig", _DISTIL),
        "distilbert.transformer.layer",
        "vocab_projector",
    ),
    "electra": TaskModel(
        _of("ElectraForMaskedLM", "ElectraConfig", _BERT | {"embedding_size": 16}),
        "electra.encoder.layer",
        "generator_lm_head",
    ),
}
SEQ2SEQ = {
    "t5": TaskModel(_of("T5ForConditionalGeneration", "T5Config", _T5), "decoder.block", "lm_head"),
    "bart": TaskModel(
        _of("BartForConditionalGeneration", "BartConfig", _BART), "model.decoder.layers", "lm_head"
    ),
}
CLASSIFIERS = {
    "bert": TaskModel(
        _of("BertForSequenceClassification", "BertConfig", _BERT | _CLASSES),
        "bert.encoder.layer",
        "classifier",
    ),
    "roberta": TaskModel(
        _of("RobertaForSequenceClassification", "RobertaConfig", _BERT | _CLASSES),
        "roberta.encoder.layer",
        "classifier.out_proj",
    ),
    "modernbert": TaskModel(
        _of("ModernBertForSequenceClassification", "ModernBertConfig", _MODERN | _CLASSES),
        "model.layers",
        "classifier",
    ),
    "deberta-v2": TaskModel(
        _of("DebertaV2ForSequenceClassification", "DebertaV2Config", _BERT | _CLASSES),
        "deberta.encoder.layer",
        "classifier",
    ),
    "distilbert": TaskModel(
        _of("DistilBertForSequenceClassification", "DistilBertConfig", _DISTIL | _CLASSES),
        "distilbert.transformer.layer",
        "classifier",
    ),
    "llama": TaskModel(
        _of("LlamaForSequenceClassification", "LlamaConfig", USUAL | _CLASSES),
        "model.layers",
        "score",
    ),
    "gpt2": TaskModel(
        _of("GPT2ForSequenceClassification", "GPT2Config", _GPT2 | _CLASSES),
        "transformer.h",
        "score",
    ),
}


def build(task_model: TaskModel, **changes) -> PreTrainedModel:
    """Return a random model in eval mode."""
    torch.manual_seed(0)
    return randomise(task_model.build(**changes)).eval()
