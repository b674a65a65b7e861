"""What is seen of every token, against the naive definition; row by row, one forward each."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

import reference
from depthmix.analysis.observations import ObservedRow
from depthmix.analysis.observe import observe
from depthmix.errors import ConfigError
from models import ANATOMIES, LAYERS, attached, tiny_model, token_ids

LENGTHS = (9, 4, 7)


def make_rows(in_full=False):
    ids = token_ids(3, 9).tolist()
    return [
        ObservedRow(ids[i][:n], [t > 2 for t in range(n)], in_full=in_full)
        for i, n in enumerate(LENGTHS)
    ]


def naive(base, anatomy, ids, mixture=None, k=LAYERS):
    """Logits of every layer alone (t, k, v), of the model (t, v), and the gate (t, k)."""
    inputs = {"input_ids": torch.tensor([ids])}
    with torch.no_grad():
        normed = reference.normed_states(base, anatomy, k, **inputs)[0]
        states = normed if mixture is None else reference.adapted(mixture, normed)
        layers = anatomy.transform(reference.raw_logits(base, states))
        if mixture is None:
            return layers, base(**inputs).logits[0], None
        own = reference.logits(base, anatomy, mixture, **inputs)[0]
        return layers, own, reference.gate(mixture, normed)


def check(seen, place, ids, logits, column):
    """Compare one predictor of one row with its naive logits."""
    log_probs = logits[:-1].log_softmax(-1)
    target = torch.tensor(ids[1:])
    chosen = seen.row == place
    wanted = -log_probs.gather(1, target[:, None])[:, 0]
    assert seen.loss[chosen, column] == pytest.approx(wanted.numpy(), abs=1e-4)
    best = log_probs.topk(3)
    np.testing.assert_array_equal(seen.top[chosen, column], best.indices.numpy())
    assert seen.top_probability[chosen, column] == pytest.approx(
        best.values.exp().numpy(), abs=1e-5
    )


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "opt", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_every_late_layer_is_as_defined(model_type, batch_tokens):
    base, anatomy = tiny_model(model_type), ANATOMIES[model_type]
    model = attached(base, k=3)
    rows = make_rows(in_full=True)
    seen = observe(model, rows, batch_tokens=batch_tokens)
    assert seen.layers == seen.late == (1, 2, 3)
    assert seen.token.tolist() == [token for row in rows for token in row.ids[1:]]
    assert seen.supervised.tolist() == [flag for row in rows for flag in row.supervised[1:]]
    for place, row in enumerate(rows):
        layers, own, gate = naive(base, anatomy, row.ids, model.depthmix, k=3)
        assert seen.gate[seen.row == place] == pytest.approx(gate[:-1].numpy(), abs=1e-5)
        for column in range(3):
            check(seen, place, row.ids, layers[:, column], column)
        check(seen, place, row.ids, own, 3)


def test_layers_below_are_seen_through_the_models_norm():
    base, anatomy = tiny_model("llama"), ANATOMIES["llama"]
    model = attached(base, k=2)
    rows = make_rows(in_full=True)
    seen = observe(model, rows, all_layers=True)
    assert (seen.layers, seen.late) == ((0, 1, 2, 3), (2, 3))
    layers, _, _ = naive(base, anatomy, rows[0].ids)
    late, own, _ = naive(base, anatomy, rows[0].ids, model.depthmix, k=2)
    for column, logits in enumerate([layers[:, 0], layers[:, 1], late[:, 0], late[:, 1], own]):
        check(seen, 0, rows[0].ids, logits, column)


@pytest.mark.parametrize("k", [None, 1])
def test_without_a_mixture_the_last_layers_are_a_lens(k):
    base = tiny_model("gemma2")
    model = base if k is None else attached(base, k=k)
    rows = make_rows(in_full=True)
    seen = observe(model, rows)
    assert (seen.layers, seen.late, seen.gate.shape[1]) == ((1, 2, 3), (), 0)
    layers, own, _ = naive(base, ANATOMIES["gemma2"], rows[0].ids)
    check(seen, 0, rows[0].ids, layers[:, 1], 0)
    check(seen, 0, rows[0].ids, own, 3)
    assert seen.loss[:, 2] == pytest.approx(seen.loss[:, 3], abs=1e-4)


def test_prompts_pass_the_head_once_unless_wanted_in_full():
    model = attached(tiny_model("llama"), k=2)
    part, whole = observe(model, make_rows()), observe(model, make_rows(in_full=True))
    prompt = ~part.supervised
    assert np.isnan(part.loss[prompt, :2]).all()
    assert (part.top[prompt, :2] == -1).all()
    np.testing.assert_array_equal(part.loss[:, 2], whole.loss[:, 2])
    np.testing.assert_array_equal(part.loss[~prompt], whole.loss[~prompt])
    np.testing.assert_array_equal(part.gate, whole.gate)


def test_a_masked_model_is_refused_with_what_to_do_instead():
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(vocab_size=97, intermediate_size=64, **sizes))
    with pytest.raises(ConfigError, match=r"depthmix\.routing"):
        observe(model, make_rows())


def test_no_rows_are_refused():
    with pytest.raises(ConfigError, match="no rows"):
        observe(attached(tiny_model("llama"), k=2), [ObservedRow([5], [True])])
