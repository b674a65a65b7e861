"""One process of a run that shards the model by FSDP2: torchrun sharded.py OUT.

The Trainer hands the model to accelerate, which shards on accelerators only; here PyTorch's
`fully_shard` itself is applied, as accelerate applies it: to each layer, then to the model.
"""

import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
warnings.simplefilter("ignore")

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from worker import build, rows

import depthmix

STEPS = 3


def shard(model):
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def batch_of(rank, world):
    chosen = rows(uneven=False)[rank::world]
    return {
        name: torch.tensor([row[name] for row in chosen])
        for name in ("input_ids", "attention_mask", "labels")
    }


def main():
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = build(torch.float32)
    if world > 1:
        model = shard(model)
    optimizer = torch.optim.SGD(depthmix.param_groups(model, lr=1e-2))
    model.train()
    batch = batch_of(rank, world)
    count = (batch["labels"][:, 1:] != -100).sum()
    dist.all_reduce(count)
    losses = []
    for _ in range(STEPS):
        # The mean over processes, as FSDP takes it, of world x sum / count.
        loss = model(**batch, num_items_in_batch=count).loss * world
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach())
        losses.append(loss.item() / world)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=batch_of(0, 1)["input_ids"]).logits
    trained = {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    if rank == 0:
        torch.save({"trained": trained, "losses": losses, "logits": logits}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
