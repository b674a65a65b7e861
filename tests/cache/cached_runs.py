"""Small trainings, with the cache and without, and what they must have in common."""

import copy

import torch
from peft import LoraConfig

import depthmix
from models import PLAIN, token_ids

CONFIG = depthmix.MoDEConfig(k=2, **PLAIN)


def lora(**changes):
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **changes)


def late(base, dtype=torch.float32, k=2, tuned_layers=2):
    torch.manual_seed(1)
    model = copy.deepcopy(base).to(dtype)
    config = depthmix.MoDEConfig(k=k, **PLAIN)
    return depthmix.attach(model, config, lora(), tuned_layers=tuned_layers)


def rows():
    """Four rows of different lengths, with their masks."""
    ids = token_ids(batch=4, length=9)
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 6, 7, 9)):
        mask[row, length:] = 0
    return ids, mask


def batches():
    """The rows in twos, padded right, in an order that changes with the epoch."""
    ids, mask = rows()
    labels = ids.masked_fill(mask == 0, -100)
    for order in ([0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]):
        for pair in (order[:2], order[2:]):
            width = int(mask[pair].sum(1).max())
            yield {
                "input_ids": ids[pair, :width],
                "attention_mask": mask[pair, :width],
                "labels": labels[pair, :width],
            }


def packed_batches():
    """The same rows without padding, two of them in a row of the batch, as TRL packs them."""
    for batch in batches():
        kept = batch["attention_mask"].bool()
        positions = torch.arange(kept.shape[1]).expand(kept.shape)[kept][None]
        starts = (positions[0] == 0).nonzero().squeeze(1)
        labels = batch["labels"][kept][None].clone()
        labels[positions == 0] = -100
        borders = torch.cat([starts, torch.tensor([positions.shape[1]])]).to(torch.int32)
        yield {
            "input_ids": batch["input_ids"][kept][None],
            "labels": labels,
            "position_ids": positions,
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": int(borders.diff().max()),
            "max_length_k": int(borders.diff().max()),
            "use_cache": False,  # with one, transformers lets packed rows attend to each other
        }


def train(model, batches=batches, evaluate=False):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for batch in batches():
        if evaluate:
            losses.append(evaluated(model.eval(), batch))
        model.train()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def evaluated(model, batch):
    with torch.no_grad():
        return model(**batch).loss.item()


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(model, other, **tolerance):
    for (name, a), b in zip(parameters(model).items(), parameters(other).values(), strict=True):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
