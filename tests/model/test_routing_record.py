"""What `routing` records: gates with their tokens, as a table and as a chart."""

import pytest
import torch

import depthmix
from depthmix.errors import ConfigError, DepthmixError
from models import attached, tiny_model, token_ids, word_tokenizer


@pytest.fixture
def model():
    return attached(tiny_model("llama"), k=2)


def test_a_table_has_every_token_and_layer(model):
    ids = token_ids(2, 5)
    with depthmix.routing(model) as record:
        model(input_ids=ids)
    lines = record.table(word_tokenizer())
    assert len(lines) == 2 * 5 * 2
    assert {line["layer"] for line in lines} == {2, 3}
    line = next(x for x in lines if (x["row"], x["position"], x["layer"]) == (1, 3, 3))
    assert line["weight"] == pytest.approx(record.gates[0][1, 3, 1].item())
    assert line["token"] == f"w{ids[1, 3]}"
    assert record.table()[0]["token"] == str(ids[0, 0].item())


def test_a_generation_goes_on_where_the_prompt_ended(model):
    ids = token_ids(1, 4)
    with depthmix.routing(model) as record:
        output = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    lines = [line for line in record.table() if line["layer"] == 3]
    assert [line["position"] for line in lines] == list(range(6))
    assert [int(line["token"]) for line in lines] == output[0, :6].tolist()
    assert [line["forward"] for line in lines] == [0, 0, 0, 0, 1, 2]


def test_tokens_stay_with_their_gates(model):
    """Where the trunk alone is called, no tokens are known; the next forward has its own."""
    ids = token_ids(2, 5)
    with depthmix.routing(model) as record:
        model.model(input_ids=ids[:, :3])
        model(inputs_embeds=model.get_input_embeddings()(ids))
        model(ids)
    assert record.ids[:2] == [None, None]
    assert torch.equal(record.ids[2], ids)
    assert {line["token"] for line in record.table() if line["forward"] < 2} == {""}
    before = len(record.ids)
    model(ids)
    assert len(record.ids) == before


def test_a_chart_cuts_each_tokens_weight_among_the_layers(model):
    pytest.importorskip("altair")
    with depthmix.routing(model) as record:
        model(token_ids(2, 5))
    chart = record.plot(word_tokenizer(), row=1).to_dict()
    values = chart["data"]["values"]
    assert len(values) == 5 * 2
    for position in range(5):
        parts = [value["weight"] for value in values if value["position"] == position]
        assert sum(parts) == pytest.approx(1, abs=1e-5)


def test_nothing_recorded_and_no_altair_are_said(model, monkeypatch):
    with depthmix.routing(model) as record:
        pass
    with pytest.raises(DepthmixError, match="no forward was recorded"):
        record.table()
    monkeypatch.setattr("depthmix.charts.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"depthmix\[report\]"):
        record.plot()
