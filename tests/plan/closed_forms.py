"""What five published models cost, by hand: the formulas are written out, and share no code with
`depthmix.plan`. Run as a script, it prints the table of errors.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from peft import LoraConfig
from transformers import GPT2Config, LlamaConfig, MambaConfig, MistralConfig, Qwen3MoeConfig

from depthmix.plan.methods import METHODS
from depthmix.plan.profile import Setting
from depthmix.plan.report import Counted, count
from depthmix.tables import print_figures

RANK = 16
K = 3
CHUNKS = 6.3 * 2**25  # what the fused loss holds of logits


@dataclass(frozen=True)
class Case:
    """A model, the rows it is trained on, and its costs by hand, by the names in `found`."""

    config: Any
    length: int
    by_hand: Callable[[int], dict[str, float]]
    methods: tuple[str, ...]


def lora(rank: int) -> LoraConfig:
    """LoRA as `train` makes it by default."""
    return LoraConfig(r=rank, target_modules="all-linear", lora_dropout=0.05, task_type="CAUSAL_LM")


# One layer of a dense decoder: q, k, v, o and a gated feed-forward network.


@dataclass(frozen=True)
class Dense:
    """d: width; q and kv: widths of queries and of keys; f: of the network; h: heads."""

    layers: int
    d: int
    q: int
    kv: int
    f: int
    h: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """Of the matrices of a layer."""
        return self.d * self.q + 2 * self.d * self.kv + self.q * self.d + 3 * self.d * self.f

    @property
    def parameters(self) -> int:
        """Of the model, head untied: two norms a layer and the last one."""
        embeddings = 2 * self.vocabulary * self.d
        return self.layers * (self.weights + 2 * self.d) + self.d + embeddings

    @property
    def adapter(self) -> int:
        """Of a layer: rank x (in + out) of seven matrices."""
        d, q, kv, f = self.d, self.q, self.kv, self.f
        return RANK * ((d + q) + 2 * (d + kv) + (q + d) + 3 * (d + f))

    def saved(self, keys: int, mask: int) -> int:
        """Bytes a token and layer that LoRA on bf16 keeps; keys: width of k, v as attention has it.

        Two norms in fp32; of the input of each of seven adapters a bf16 copy and one byte a number
        for dropout, and the rank's output; q, k, v and what attention gives, a number a head; three
        of the gated network; and the row of an attention mask.
        """
        d, q, f = self.d, self.q, self.f
        norms = 2 * 4 * d
        adapters = 3 * (5 * d + q + f) + 7 * 2 * RANK
        attention = 2 * (q + 2 * keys + q) + 4 * self.h
        return norms + adapters + attention + 3 * 2 * f + mask


def dense(model: Dense, window: int | None = None) -> Callable[[int], dict[str, float]]:
    """Costs of a dense model; `window`: of sliding attention, if it is shorter than the rows."""

    def by_hand(length: int) -> dict[str, float]:
        n, t, d = model.layers, length, model.d
        seen = t if window is None else min(t, window)
        scores = 4 * t * t * model.q  # two products of every token with every other one
        masked = window is not None and t >= window
        saved = model.saved(model.q if masked else model.kv, 2 * t if masked else 0) * t
        forward = 2 * model.weights * t + scores
        through = 2 * model.weights * t + 2.5 * scores  # five products instead of two
        adapted = 2 * model.adapter * t
        half = n // 2
        head = 2 * model.vocabulary * d * t / 2  # half of the tokens are supervised
        a = n * model.adapter
        lora_activations = n * 2 * d * t + saved
        half_weights = 2 * model.parameters + 4 * half * model.adapter
        return {
            "parameters": model.parameters,
            "lora.trained": a,
            "lora.memory.weights": 2 * model.parameters + 4 * a,
            "lora.memory.optimizer": 8 * a,
            "lora.memory.activations": lora_activations,
            "lora.memory.total": 2 * model.parameters + 16 * a + lora_activations + CHUNKS,
            "lora.flops.forward": n * (forward + adapted),
            "lora.flops.backward": n * (through + 2 * adapted) + n * (forward + adapted),
            "lora.flops.loss": 2 * head,
            "half.memory.activations": half * saved,
            "half.memory.total": half_weights + 12 * half * model.adapter + half * saved + CHUNKS,
            "half.flops.forward": n * forward + half * adapted,
            "half.flops.backward": half * (through + 2 * adapted),
            "half.flops.cached": half * (forward + 3 * adapted + through) + 2 * head,
            "full.memory.total": 16 * model.parameters + _full_rest(model, t),
            "full.flops.backward": n * (4 * model.weights * t + 2.5 * scores + forward),
            "decode": 2 * (n * model.weights + d * model.vocabulary) + 4 * n * seen * model.q,
            "kv": n * 2 * 2 * model.kv * min(t, seen),
        }

    return by_hand


def _full_rest(model: Dense, t: int) -> float:
    """Boundaries in fp32, a layer with bf16 copies of its weights, and the head's gradient."""
    layer = t * (16 * model.d + 4 * (model.q + model.kv) + 10 * model.f) + 2 * model.weights
    return model.layers * 4 * model.d * t + layer + 4 * model.vocabulary * model.d + CHUNKS


LLAMA = Dense(layers=80, d=8192, q=8192, kv=1024, f=28672, h=64, vocabulary=128256)
MISTRAL = Dense(layers=32, d=4096, q=4096, kv=1024, f=14336, h=32, vocabulary=32000)


def experts(length: int) -> dict[str, float]:
    """Qwen3-30B-A3B: 128 experts a layer, of which a token has eight."""
    n, d, q, kv, m, vocabulary = 48, 2048, 4096, 512, 768, 151936
    attention = d * q + 2 * d * kv + q * d
    router, expert, norms = 128 * d, 3 * d * m, 2 * d + 2 * 128
    parameters = n * (attention + router + 128 * expert + norms) + d + 2 * vocabulary * d
    active = attention + router + 8 * expert
    t = length
    scores = 4 * t * t * q
    forward = n * (2 * active * t + scores)
    return {
        "parameters": parameters,
        "mode.memory.weights": 2 * parameters,
        "mode.flops.forward": forward,
        "mode.flops.cached": K * (2 * active * t + scores) + 1.5 * 2 * d * vocabulary * t,
        "full.flops.forward": forward,
        "full.flops.backward": n * (4 * active * t + 2.5 * scores) + forward,
        "full.memory.optimizer": 8 * parameters,
        "decode": 2 * (n * active + d * vocabulary) + 4 * n * t * q,
        "kv": n * 2 * 2 * kv * t,
    }


def state_space(length: int) -> dict[str, float]:
    """Mamba of 2.8 billion: no attention; a state of 16 for each of 5,120 channels."""
    n, d, inner, state, step, kernel, vocabulary = 64, 2560, 5120, 16, 160, 4, 50280
    weights = d * 2 * inner + inner * (step + 2 * state) + step * inner + inner * d
    others = inner * kernel + inner + inner + inner * state + inner + d
    parameters = n * (weights + others) + d + vocabulary * d  # the head is tied
    t = length
    forward = 2 * (weights + kernel * inner + state * inner) * t
    adapter = RANK * ((d + 2 * inner) + (inner + step + 2 * state) + (step + inner))
    # fp32 decay, input and state of every channel, the state in bf16 as well; and what is kept of
    # the channels: gates, convolution, time steps, three adapters' inputs.
    saved = (14 * state + 25) * inner + 3 * d
    half = n // 2
    through = 2 * weights * t + 2 * (kernel + 2 * state) * inner * t
    return {
        "parameters": parameters,
        "lora.trained": n * adapter,
        "lora.memory.activations": n * 4 * d * t + saved * t,
        "lora.flops.forward": n * (forward + 2 * adapter * t),
        "half.memory.activations": half * saved * t,
        "half.flops.backward": half * (through + 4 * adapter * t),
        "full.memory.optimizer": 8 * parameters,
        "decode": n * forward / t + 2 * d * vocabulary,
        "kv": n * inner * (2 * kernel + 4 * state),
    }


def gpt2(length: int) -> dict[str, float]:
    """GPT-2 small: matrices lie transposed (Conv1D), have biases, and the head is tied."""
    n, d, vocabulary, positions, t = 12, 768, 50257, 1024, length
    weights = 12 * d * d
    parameters = n * (weights + 13 * d) + 2 * d + (vocabulary + positions) * d
    scores = 4 * t * t * d
    adapter = RANK * ((d + 3 * d) + (d + d) + (d + 4 * d) + (4 * d + d))
    return {
        "parameters": parameters,
        "lora.trained": n * adapter,
        "lora.flops.forward": n * (2 * (weights + adapter) * t + scores),
        "half.flops.backward": n // 2 * (2 * (weights + 2 * adapter) * t + 2.5 * scores),
        "full.memory.optimizer": 8 * parameters,
        "decode": 2 * (n * weights + d * vocabulary) + 4 * n * t * d,
        "kv": n * 2 * 2 * d * t,
    }


_SOME = ("lora", "half", "full")
CASES = {
    "Llama-3-70B": Case(
        LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
        ),
        2048,
        dense(LLAMA),
        _SOME,
    ),
    "Qwen3-30B-A3B": Case(
        Qwen3MoeConfig(
            hidden_size=2048,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            vocab_size=151936,
            tie_word_embeddings=False,
        ),
        1024,
        experts,
        ("mode", "full"),
    ),
    "Mistral-7B, window 4096": Case(
        MistralConfig(sliding_window=4096), 8192, dense(MISTRAL, window=4096), _SOME
    ),
    "Mamba-2.8B": Case(
        MambaConfig(hidden_size=2560, num_hidden_layers=64, vocab_size=50280),
        1024,
        state_space,
        _SOME,
    ),
    "GPT-2": Case(GPT2Config(), 1024, gpt2, _SOME),
}


@cache
def errors(name: str) -> list[tuple[str, float, float]]:
    """Return each quantity of a model, by hand and by plan."""
    case = CASES[name]
    counted = count(
        case.config,
        Setting(rows=1, length=case.length),
        {method: METHODS[method] for method in case.methods},
        k=K,
        rank=RANK,
        adapter=lora,
        checkpointing=lambda method: method.depth == "all" and method.tuning != "none",
    )
    by_hand = case.by_hand(case.length)
    return [(quantity, value, _found(counted, quantity)) for quantity, value in by_hand.items()]


def _found(counted: Counted, quantity: str) -> float:
    bill = next(iter(counted.bills.values()))
    if quantity == "parameters":
        return counted.base.sizes.parameters
    if quantity in ("decode", "kv"):
        return bill.flops.decode if quantity == "decode" else bill.kv_bytes
    method, _, path = quantity.partition(".")
    value: Any = counted.bills[method]
    for attribute in path.split("."):
        value = getattr(value, attribute)
    return float(value)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for model, case in CASES.items():
        print_figures(
            f"{model}, {case.length} tokens",
            ("quantity", "by hand", "plan", "error"),
            [(q, f"{h:.4g}", f"{p:.4g}", f"{p / h - 1:+.1%}") for q, h, p in errors(model)],
        )
