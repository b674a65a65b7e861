"""Scores of the ensemble and of each layer, against the naive definition."""

import pytest
import torch
import torch.nn.functional as F

import reference
from depthmix.analysis.layers import encode, score_rows
from models import ANATOMIES, attached, tiny_model


class Letters:
    """A tokenizer of one token a letter."""

    eos_token_id = 2

    def __call__(self, text):
        return {"input_ids": [4 + ord(letter) % 90 for letter in text]}


ROWS = [
    {"prompt": "ab", "completion": "cde"},
    {"prompt": "abcdefg", "completion": "h"},
    {"prompt": "b", "completion": "cdcdcdcd"},
]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_equal_the_definition(model_type, batch_size):
    base = tiny_model(model_type)
    model = attached(base, k=3)
    scores = score_rows(model, Letters(), ROWS, batch_size)
    losses, right, gates = [], [], []
    for row, count, total in zip(ROWS, scores.tokens, scores.loss, strict=True):
        ids, prompt = encode(row, Letters())
        inputs = torch.tensor([ids])
        anatomy = ANATOMIES[model_type]
        with torch.no_grad():
            expected = reference.logits(base, anatomy, model.depthmix, input_ids=inputs)
            normed = reference.normed_states(base, anatomy, 3, input_ids=inputs)
            states, gate = model.depthmix.adapt(normed)
            layers = anatomy.transform(base.get_output_embeddings()(states))
        target = inputs[0, prompt:]
        where = slice(prompt - 1, -1)
        assert count == len(target)
        assert total == pytest.approx(
            F.cross_entropy(expected[0, where], target, reduction="sum").item(), rel=1e-4
        )
        losses.append([F.cross_entropy(layers[0, where, j], target).item() for j in range(3)])
        right.append(layers[0, where].argmax(-1) == target[:, None])
        gates.append(gate[0, where])
    weights = torch.tensor(scores.tokens) / sum(scores.tokens)
    mean_losses = (torch.tensor(losses) * weights[:, None]).sum(0)
    assert scores.layer_loss == pytest.approx(mean_losses.tolist(), rel=1e-4)
    correct = torch.cat(right)
    assert scores.layer_accuracy == pytest.approx(correct.float().mean(0).tolist())
    rescued = ~correct[:, -1] & correct[:, :-1].any(-1)
    assert scores.rescued == pytest.approx(rescued.float().mean().item())
    gate = torch.cat(gates)
    assert scores.gate == pytest.approx(gate.mean(0).tolist(), rel=1e-4)
    entropy = torch.distributions.Categorical(probs=gate).entropy().mean().item()
    assert scores.entropy == pytest.approx(entropy, rel=1e-4)


def test_model_without_mode_has_no_layers():
    scores = score_rows(tiny_model("llama"), Letters(), ROWS)
    assert len(scores.loss) == 3
    assert scores.layer_loss == []
    assert scores.entropy is None


def test_exact_is_what_greedy_decoding_gives():
    model = tiny_model("llama")
    ids = torch.tensor([encode({"prompt": "abc", "completion": ""}, Letters())[0][:-1]])
    reply = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)[0, 3:]

    class Ids(Letters):
        eos_token_id = int(reply[-1])

        def __call__(self, text):
            letters = [4 + ord(letter) % 90 for letter in text.rstrip("!")]
            return {"input_ids": letters + (reply[:-1].tolist() if text.endswith("!") else [])}

    scores = score_rows(model, Ids(), [{"prompt": "abc", "completion": "!"}])
    assert scores.exact == [True]
    assert scores.accuracy == 1.0
