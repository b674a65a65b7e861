"""The definition: MoDE in plain autograd, with all logits of all layers. All else must equal it.

g_j = softmax_j(router(x) + prior)          y_j = N(h_j) (1 + scale_j)  [+ map]
z   = transform(sum_j g_j head(y_j))        z_j = transform(head(y_j))
L   = CE(z, y) + weight * mean_{j<k} D(sg[p_k] || p_j) + balance * KL(g || uniform)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def js(log_p, log_q):
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


DIVERGENCES = {"kl": kl, "reverse_kl": lambda log_p, log_q: kl(log_q, log_p), "js": js}


def identity(raw: Tensor) -> Tensor:
    return raw


def loss(raw, gate, labels, transform=identity, weight=1.0, divergence="kl", late_raw=None):
    """Sum of the loss over n tokens, from the head's output (n, k, v) and the gate (n, k)."""
    late_raw = raw[:, :-1] if late_raw is None else late_raw
    ensemble = transform((gate.unsqueeze(-1) * raw).sum(1))
    total = F.cross_entropy(ensemble, labels, reduction="sum")
    if weight == 0 or raw.shape[1] == 1:
        return total
    log_p = transform(raw[:, -1:]).log_softmax(-1).detach()
    log_q = transform(late_raw).log_softmax(-1)
    return total + weight * DIVERGENCES[divergence](log_p, log_q).mean(1).sum()


def adapted(mixture, normed):
    """y_j of every late layer, (..., k, d), in at least fp32."""
    y = normed.to(torch.promote_types(normed.dtype, torch.float32))
    own = {name: p.to(y.dtype) for name, p in mixture.named_parameters() if name.startswith("norm")}
    if not own:
        return y
    layers = []
    for j, state in enumerate(y.unbind(-2)):
        layer = state * (1 + own["norm.scale"][j])
        if "norm.map" in own:
            layer = layer + state @ own["norm.map"][j] + own["norm.bias"][j]
        if "norm.up" in own:
            layer = layer + state @ own["norm.down"][j] @ own["norm.up"][j]
        layers.append(layer)
    return torch.stack(layers, -2)


def gate(mixture, normed):
    """g of every token, (..., k)."""
    config, router = mixture.config, mixture.router
    y = normed.to(torch.promote_types(normed.dtype, torch.float32))
    x = {"last": y[..., -1, :], "first": y[..., 0, :], "all": y.flatten(-2)}[config.router_input]
    x = x / x.norm(dim=-1, keepdim=True)
    logits = x @ router.weight.to(x.dtype).T + router.bias.to(x.dtype)
    if config.router_prior is not None:
        odds = (config.k - 1) * config.router_prior / (1 - config.router_prior)
        logits = torch.cat([logits[..., :-1], logits[..., -1:] + math.log(odds)], -1)
    if config.router_top_k is not None:
        least = logits.topk(config.router_top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits.softmax(-1)


def normed_states(model, anatomy, k, **inputs):
    """The final norm of the outputs of the last k layers of a model without MoDE, (b, t, k, d)."""
    kept: list[Tensor] = []
    layers, norm = model.get_submodule(anatomy.layers), model.get_submodule(anatomy.norm)
    keep = [
        layer.register_forward_hook(
            lambda _m, _a, out: kept.append(out if isinstance(out, Tensor) else out[0])
        )
        for layer in layers[-k:]
    ]
    model(**inputs)
    for handle in keep:
        handle.remove()
    return torch.stack([norm(state) for state in kept], -2)


def head_inputs(model, layers_path, head_path, k, **inputs):
    """What the head gets if the last layer gave what each of the last k layers gives, (..., k, d).

    k + 1 forwards of a model without MoDE; nothing need be known of what lies between.
    """
    layers, states, given = model.get_submodule(layers_path), [], []
    taps = [
        layer.register_forward_hook(lambda _m, _a, o: states.append(o)) for layer in layers[-k:]
    ]
    model(**inputs)
    for tap in taps:
        tap.remove()
    keep = model.get_submodule(head_path).register_forward_pre_hook(
        lambda _m, args: given.append(args[0])
    )
    for state in states:
        exchange = layers[-1].register_forward_hook(lambda _m, _a, _o, state=state: state)
        model(**inputs)
        exchange.remove()
    keep.remove()
    return torch.stack(given, -2)


def raw_logits(model, states, trains_head=True):
    """The head's output on adapted states, at least in fp32; its gradient may spare the head."""
    head = model.get_output_embeddings()
    states = states.to(head.weight.dtype)
    if trains_head:
        raw = head(states)
    else:
        fixed = {name: p.detach() for name, p in head.named_parameters()}
        raw = torch.func.functional_call(head, fixed, (states,))
    return raw.to(torch.promote_types(raw.dtype, torch.float32))


def logits(model, anatomy, mixture, **inputs):
    """Ensemble logits (b, t, v) of a model without MoDE and a `DepthMixture` beside it."""
    normed = normed_states(model, anatomy, mixture.config.k, **inputs)
    raw = raw_logits(model, adapted(mixture, normed))
    return anatomy.transform((gate(mixture, normed).unsqueeze(-1) * raw).sum(-2))


def objective(model, anatomy, mixture, labels, **inputs):
    """Sum of the training objective over the supervised tokens."""
    config = mixture.config
    targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    supervised = targets != IGNORED
    normed = normed_states(model, anatomy, config.k, **inputs)[supervised]
    g = gate(mixture, normed)
    into_layers = config.distill_into == "layers"
    late = normed if into_layers else normed.detach()
    total = loss(
        raw_logits(model, adapted(mixture, normed)),
        g,
        targets[supervised],
        anatomy.transform,
        config.distill_weight,
        config.divergence,
        raw_logits(model, adapted(mixture, late), trains_head=into_layers)[:, :-1],
    )
    balance = (g * g.clamp_min(1e-30).log()).sum() + len(g) * math.log(config.k)
    return total + config.balance_weight * balance
