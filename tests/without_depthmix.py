"""What exported folders give in a process that cannot import depthmix.

    with without_depthmix() as ask:
        found = ask(folder)

As a script it is that process: it reads names of folders, a line each, and writes what they give
into `FOLDER.pt`.
"""

import sys


class Blocker:
    """Makes depthmix not installed."""

    def find_spec(self, name, *_):
        if name.split(".")[0] == "depthmix":
            raise ImportError("depthmix is not installed here")


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocker())

import copy
import subprocess
import warnings
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModel, AutoModelForCausalLM

from operations import Operations

IDS = torch.randint(4, 97, (2, 7), generator=torch.Generator().manual_seed(0))
NEW = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def logits(model):
    return model(input_ids=IDS).logits


def generated(model):
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=True, **NEW)


def padded(model):
    """Tokens after a batch whose first row is padded on the left."""
    ids = torch.stack([F.pad(IDS[0, 2:], (2, 0)), IDS[1]])
    mask = torch.stack([F.pad(torch.ones_like(IDS[0, 2:]), (2, 0)), torch.ones_like(IDS[1])])
    return model.generate(ids, attention_mask=mask, **NEW)[:, ids.shape[1] :]


def half(model):
    return copy.deepcopy(model).bfloat16()(input_ids=IDS).logits


FORWARDS = {"logits": logits, "generation": generated, "left padding": padded, "bfloat16": half}


def forwards_of(model):
    """What a model gives; None for what it does not do, with the error apart."""
    found, errors = {}, {}
    for name, run in FORWARDS.items():
        try:
            found[name] = run(model)
        except Exception as error:
            found[name], errors[name] = None, f"{type(error).__name__}: {error}"
    return found, errors


def near(found, wanted, share):
    """Whether two tensors differ by that share of their spread at most, on average."""
    found, wanted = found.float(), wanted.float()
    return (found - wanted).abs().mean() <= share * wanted.std()


@contextmanager
def without_depthmix():
    """Start the process; give what asks it."""
    command = [sys.executable, "-W", "ignore", __file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(command, **pipes) as process:

        def ask(folder, whole=False):
            process.stdin.write(f"{'whole' if whole else 'forwards'} {folder}\n")
            assert process.stdout.readline().startswith("done"), "the other process has failed"
            return torch.load(f"{folder}.pt")

        yield ask
        process.stdin.close()


def operations_of_mixture(model):
    mixture = next(module for name, module in model.named_modules() if name.endswith("depthmix"))
    k, d = mixture.maps.shape[:2]
    normed = torch.randn(k, 1, 1, d)
    with Operations() as mode:
        mixture(normed)
    return mode.names


def load(folder, auto=AutoModelForCausalLM, **options):
    return auto.from_pretrained(folder, trust_remote_code=True, **options).eval()


def dtypes(model):
    return {str(p.dtype) for name, p in model.named_parameters() if "depthmix." in name}


def whole(folder):
    """All that is asked of a folder, beside its forwards."""
    model = load(folder)
    found = {
        "operations": operations_of_mixture(model),
        "last": model(IDS, logits_to_keep=1).logits,
        "by position": model(IDS, logits_to_keep=torch.tensor([2, 5])).logits,
        "without cache": model.generate(IDS, use_cache=False, **NEW),
        "of the model": model.base_model(IDS).last_hidden_state,
        "trunk": load(folder, AutoModel)(IDS).last_hidden_state,
        "dtypes": dtypes(model) | dtypes(load(folder, dtype=torch.bfloat16)),
        "compiled": torch.compile(model, backend="eager", fullgraph=True)(IDS).logits,
    }
    torch.compiler.reset()
    model.save_pretrained(f"{folder}-again")
    found["again"] = load(f"{folder}-again")(IDS).logits
    found["trunk again"] = load(f"{folder}-again", AutoModel)(IDS).last_hidden_state
    return found


@torch.no_grad()
def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for line in sys.stdin:
        how, folder = line.strip().split(" ", 1)
        found, errors = forwards_of(load(folder))
        found["bfloat16"] = logits(load(folder, dtype=torch.bfloat16))  # the mixture stays in fp32
        found |= whole(folder) if how == "whole" else {}
        torch.save({**found, "errors": errors}, f"{folder}.pt")
        print("done", flush=True)


if __name__ == "__main__":
    main()
