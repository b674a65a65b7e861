"""What must hold for MoDE on a type of model: one function a property, each on a fresh copy.

A check takes the base model, a copy of it with MoDE, and the logits of the base model for `IDS`.
What the base model itself cannot do (threads, padding, a cache) is not asked of it.
"""

from __future__ import annotations

import copy
import gc
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM

import depthmix
import reference
from depthmix.carry.adapters import mode_only_config
from depthmix.errors import ConfigError, TrainingError
from depthmix.export.folder import export_model
from depthmix.model.anatomy import Between
from depthmix.model.runtime import runtime_of
from models import PLAIN, choose_last_layer, perturb
from tiny_types import V
from without_depthmix import FORWARDS, forwards_of, half, near

K = 2
IDS = torch.randint(4, V, (2, 7), generator=torch.Generator().manual_seed(0))


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
    with torch.no_grad():  # what the model adds to its cross-entropy
        own = base(input_ids=IDS, labels=IDS)
        logits = own.logits[:, :length].flatten(0, 1)
        extra = own.loss - F.cross_entropy(logits, targets)
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


def own_loss(base, model, expected):
    """With the gate on the last layer and no distillation, with router logits on and off."""
    alone = depthmix.MoDEConfig(k=K, adaptation="none", distill_weight=0.0, router_prior=None)
    model = depthmix.attach(copy.deepcopy(base), alone).train()
    choose_last_layer(model.depthmix)
    base = copy.deepcopy(base).train()
    switches = [{}]
    if "output_router_logits" in vars(base.config.get_text_config()):
        switches.append({"output_router_logits": True})
    for switch in switches:
        inputs = {"input_ids": IDS, "labels": IDS, **switch}
        if switch and model.depthmix_runtime.anatomy.other_terms == "lost":
            with pytest.raises(TrainingError, match="output_router_logits"):
                model(**inputs)
        else:
            found, wanted = model(**inputs).loss, base(**inputs).loss
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def eight_threads(base, model, expected):
    perturb(model.depthmix)
    prompts = [torch.randint(4, V, (1, 2 + i)) for i in range(8)]

    def same(model):
        @torch.no_grad()
        def run(ids):
            return model(input_ids=ids, use_cache=False).logits

        alone = list(map(run, prompts))
        with ThreadPoolExecutor(8) as threads:
            return all(map(torch.equal, alone, threads.map(run, prompts)))

    try:
        if not same(base):
            return
    except Exception:
        return
    assert same(model), "threads change each other's logits"


def exception_in_mid_forward(base, model, expected):
    perturb(model.depthmix)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    layers = runtime_of(model).anatomy.layer_paths
    if not _states_after_an_error(copy.deepcopy(base), layers):
        assert not _states_after_an_error(model, layers), "a state outlives its forward"
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=IDS).logits, before), "the next forward differs"


def _states_after_an_error(model, layers):
    """How many states of a late layer are alive after forwards that failed in the last one."""
    states = []

    def keep(_layer, _args, output):
        states.append(weakref.ref(output if isinstance(output, torch.Tensor) else output[0]))

    def fail(*_):
        raise torch.OutOfMemoryError

    handles = [
        model.get_submodule(layers[0]).register_forward_hook(keep),
        model.get_submodule(layers[-1]).register_forward_hook(fail),
    ]
    for training in (False, True):
        with pytest.raises(torch.OutOfMemoryError):
            model.train(training)(input_ids=IDS, labels=IDS)
    for handle in handles:
        handle.remove()
    gc.collect()
    assert states, "the late layer did not run"
    return sum(state() is not None for state in states)


def lora_on_the_head(base, model, expected):
    """LoRA that has learned nothing changes neither logits nor loss, and learns."""
    head = model.depthmix_runtime.anatomy.head_path
    if type(base.get_submodule(head)) is not nn.Linear:
        return
    perturb(model.depthmix)
    tuned = depthmix.attach(
        copy.deepcopy(base),
        depthmix.MoDEConfig(k=K, **PLAIN),
        LoraConfig(target_modules=rf"{head}", r=2),
    )
    mixture = tuned.get_base_model().depthmix.modules_to_save["default"]
    mixture.load_state_dict(model.depthmix.state_dict())
    for rows in (1, 2):
        with torch.no_grad():
            wanted = model.eval()(input_ids=IDS[:rows]).logits
            found = tuned.eval()(input_ids=IDS[:rows]).logits
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    inputs = {"input_ids": IDS, "labels": IDS}
    loss = tuned.train()(**inputs).loss
    torch.testing.assert_close(loss, model.train()(**inputs).loss, rtol=1e-3, atol=1e-4)
    loss.backward()
    assert all(p.grad.any() for n, p in tuned.named_parameters() if "lora_B" in n)


class NoTokenizer:
    """In place of a tokenizer, which has no part in this."""

    def save_pretrained(self, folder):
        """Save nothing."""


def exported(base, model, expected, ask):
    """What an exported folder gives where depthmix cannot be imported is what the model gives.

    Logits, and in bfloat16; generation with a cache; a batch that is padded on the left. Returns
    "yes", or why there is no such folder.
    """
    perturb(model.depthmix)
    with tempfile.TemporaryDirectory() as parent, torch.no_grad():
        base.save_pretrained(Path(parent) / "base")
        try:
            again = AutoModelForCausalLM.from_pretrained(Path(parent) / "base").eval()
        except ValueError:
            return "not checked: transformers does not load this type again"
        if not torch.allclose(again(input_ids=IDS).logits, expected, rtol=0, atol=1e-5):
            return "not checked: transformers does not save this type whole"
        wanted, _ = forwards_of(model)
        in_half = AutoModelForCausalLM.from_pretrained(Path(parent) / "base", dtype=torch.bfloat16)
        if not near(in_half.eval()(input_ids=IDS).logits, half(base), 0.02):
            wanted["bfloat16"] = None  # the base model, loaded so, is not the one that is cast
        folder = Path(parent) / "exported"
        try:
            export_model(model, NoTokenizer(), folder)
        except ConfigError as error:
            return f"refused: {error}"
        found = ask(folder)
    for name in FORWARDS:
        if wanted[name] is None:
            continue  # nor does the model do it
        assert found[name] is not None, f"{name}: {found['errors'][name]}"
        share = 0.02 if name == "bfloat16" else 1e-5
        assert near(found[name], wanted[name], share), f"{name} differs from the attached model's"
    return "yes"


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
    "own loss": own_loss,
    "threads": eight_threads,
    "exception": exception_in_mid_forward,
    "LoRA on the head": lora_on_the_head,
    "generation": generation_with_and_without_cache,
    "left padding": left_padding,
    "save and load": save_and_load,
}
