"""What a token costs beside the model's own operations."""

import copy

import pytest
import torch
from transformers import DynamicCache

import depthmix
from models import perturb, tiny_model
from operations import Operations

MIXTURE = 11  # beside the stack of the late states, and the final norm of each


def decoding(model):
    """The operations of one token after a prompt, as `generate` asks for it."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]), past_key_values=cache, logits_to_keep=1)
        with Operations() as mode:
            model(torch.tensor([[8]]), past_key_values=cache, logits_to_keep=1)
    return mode.names


def norms(model):
    """The operations of one final norm."""
    with torch.no_grad(), Operations() as mode:
        model.model.norm(torch.randn(1, 1, model.config.hidden_size))
    return mode.names


@pytest.mark.parametrize("adaptation", ["low_rank", "norm", "affine"])
def test_the_operations_of_a_token(adaptation):
    base = tiny_model("llama")
    model = depthmix.attach(
        copy.deepcopy(base), depthmix.MoDEConfig(k=3, adaptation=adaptation)
    ).eval()
    perturb(model.depthmix)
    found, own, norm = decoding(model), decoding(base), norms(base)
    beside = len(found) - len(own) - 2 * len(norm) - 1
    assert 0 < beside <= MIXTURE, found[-30:]
