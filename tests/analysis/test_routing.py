"""Groups of tokens, and whether their routing differs."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import depthmix
from command_fixtures import build_tokenizer
from depthmix.analysis.observations import Observations, ObservedRow
from depthmix.analysis.parts_of_speech import load_tagger, parts_of_speech
from depthmix.analysis.routing import Grouping, differences, grouped_by, groupings
from depthmix.analysis.token_classes import Pieces, kind_of
from depthmix.errors import ConfigError
from models import attached, token_ids

TOKENIZER = build_tokenizer()
TEXT = "What is 3 + 4?\nSo be it."


def encoded(text):
    return [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]


def make_rows(count=12, sources=("a", "b")):
    rows = []
    for n in range(count):
        ids = encoded(f"What is {n % 10} + 4? The answer is {n % 7}.")
        learned = [t > 8 for t in range(len(ids))]
        rows.append(ObservedRow(ids, learned, sources[n % len(sources)]))
    return rows


def make_seen(rows, gate_of):
    """Observations of two late layers whose gate is a function of row, position and token."""
    cells = [
        (r, t, row.ids[t], row.supervised[t])
        for r, row in enumerate(rows)
        for t in range(1, len(row.ids))
    ]
    row, position, token, learned = (np.array(column) for column in zip(*cells, strict=True))
    last = np.array([gate_of(*cell[:3]) for cell in cells])
    n = len(cells)
    return Observations(
        (2, 3),
        (2, 3),
        row,
        position,
        token,
        learned,
        np.stack([1 - last, last], axis=1),
        np.full((n, 3), 0.5),
        np.tile(token[:, None, None], (1, 3, 3)),
        np.full((n, 3, 3), 0.3),
    )


@pytest.mark.parametrize(
    ("text", "before", "kind"),
    [
        ("7", " ", "digit"),
        (" 12", "", "digit"),
        ("+", "", "operator"),
        (" -", "3", "operator"),
        (" cat", "the", "word start"),
        ("cat", "(", "word start"),
        ("s", "cat", "word inside"),
        ("'s", "cat", "word start"),
        ("?", "it", "punctuation"),
        ("\n\n", "", "white space"),
        (" ", "x", "white space"),
    ],
)
def test_kinds(text, before, kind):
    assert kind_of(text, before) == kind


def test_pieces_are_the_text_and_the_end_is_known():
    pieces, ids = Pieces(TOKENIZER), encoded(TEXT)
    assert "".join(pieces[token] for token in ids[:-1]) == TEXT
    kinds = pieces.kinds(ids)
    assert kinds[-1] == "end of sequence"
    assert kinds[ids.index(TOKENIZER("?")["input_ids"][0])] == "punctuation"
    user = TOKENIZER("<|user|>")["input_ids"]
    assert pieces.kinds(user) == ["special token"]


def test_groupings_are_by_the_predicted_token_within_its_part():
    rows = make_rows()
    seen = make_seen(rows, lambda *_: 0.5)
    groups = {g.name: g for g in groupings(seen, rows, TOKENIZER)}
    assert {"part", "token class", "token class in prompts", "data set"} <= set(groups)
    part = np.array(groups["part"].labels)
    assert ((part == "completion") == seen.supervised).all()
    kinds = np.array(groups["token class"].labels)
    assert ((kinds == "") == ~seen.supervised).all()
    ends = seen.token == TOKENIZER.eos_token_id
    assert (kinds[ends] == "end of sequence").all()
    position = np.array(groups["position in the completion"].labels)
    assert (position[seen.position == 9] == "first").all()
    assert (position[seen.position == 10] == "second").all()
    assert groups["data set"].of_rows


def test_a_difference_is_found_where_it_is_and_only_there():
    rows = make_rows(24)
    generator = np.random.default_rng(0)
    end = TOKENIZER.eos_token_id
    seen = make_seen(
        rows, lambda _r, _t, token: 0.6 + 0.05 * generator.normal() + 0.2 * (token == end)
    )
    table = differences(seen.gate, seen.row, groupings(seen, rows, TOKENIZER), 1999)
    line = next(d for d in table if d.group == "end of sequence" and d.layer == 1)
    ends = seen.token == end
    others = seen.supervised & ~ends
    expected = np.mean(
        [
            seen.gate[ends & (seen.row == r), 1].mean()
            - seen.gate[others & (seen.row == r), 1].mean()
            for r in range(24)
        ]
    )
    assert line.difference == pytest.approx(expected)
    assert line.weight == pytest.approx(seen.gate[ends, 1].mean())
    assert (line.tokens, line.rows) == (24, 24)
    assert line.is_real
    prompts = [d for d in table if d.grouping in ("token class in prompts", "data set")]
    assert prompts
    assert not any(d.is_real for d in prompts)


def test_rows_of_data_sets_are_compared_as_rows():
    rows = make_rows(20)
    generator = np.random.default_rng(0)
    by_row = [0.6 + 0.1 * (r % 2) + 0.02 * generator.normal() for r in range(20)]
    seen = make_seen(rows, lambda r, *_: by_row[r])
    table = differences(seen.gate, seen.row, groupings(seen, rows, TOKENIZER), 999)
    sets = {d.group: d for d in table if d.grouping == "data set" and d.layer == 1}
    assert sets["b"].difference == pytest.approx(np.mean(by_row[1::2]) - np.mean(by_row[::2]))
    assert sets["a"].is_real
    # Tokens of one row are one draw: that they are many makes nothing significant.
    within = [d for d in table if d.grouping != "data set"]
    assert not any(d.is_real for d in within)


class Tagger:
    """Tags every word by its first letter."""

    def __call__(self, text):
        words = re.finditer(r"\w+|[^\w\s]", text)
        return [SimpleNamespace(idx=w.start(), text=w[0], pos_=w[0][0].upper()) for w in words]


def test_parts_of_speech_are_those_of_the_word_that_a_token_is_in():
    pieces = ["Th", "e", " ca", "t", " ", "sat", ".", "\n", "<end>"]
    tags = parts_of_speech(pieces, Tagger())
    assert tags == ["T", "T", "C", "C", "", "S", ".", "", "<"]
    rows = make_rows()
    seen = make_seen(rows, lambda *_: 0.5)
    groups = {g.name: g for g in groupings(seen, rows, TOKENIZER, Tagger())}
    labels = np.array(groups["part of speech in prompts"].labels)
    assert set(labels[seen.supervised]) == {""}
    assert "I" in labels  # of "is"


@pytest.mark.optional
def test_a_pipeline_of_spacy_is_loaded_from_its_folder(tmp_path):
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    ruler = pipeline.add_pipe("attribute_ruler")
    ruler.add([[{"LOWER": "cat"}]], {"POS": "NOUN"})
    pipeline.to_disk(tmp_path)
    tagger = load_tagger(str(tmp_path))
    assert parts_of_speech(["The", " c", "at", "."], tagger) == ["", "NOUN", "NOUN", ""]
    with pytest.raises(ConfigError, match="no such pipeline"):
        load_tagger("nowhere")


def test_labels_of_ones_own_for_a_classifier_that_pools():
    generator = np.random.default_rng(0)
    labels = ["yes" if i % 2 else "no" for i in range(30)]
    gate = np.stack([0.4 + 0.2 * (np.arange(30) % 2), 0.6 - 0.2 * (np.arange(30) % 2)], axis=1)
    gate += 0.02 * generator.normal(size=gate.shape)
    table = differences(gate, np.arange(30), [grouped_by("label", labels, of_rows=True)], 999)
    assert [d.group for d in table] == ["no", "no", "yes", "yes"]
    assert all(d.is_real for d in table)


def test_a_group_that_is_left_out_is_not_compared():
    gate = np.array([[0.2, 0.8], [0.3, 0.7], [0.9, 0.1]])
    group = Grouping("g", ["a", "b", ""], ("a", "b"))
    table = differences(gate, np.zeros(3, dtype=int), [group], 99)
    assert table[0].difference == pytest.approx(-0.1)
    assert np.isnan(table[0].p)


def test_a_classifier_of_both_directions_by_its_recorded_gates():
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    base = BertForSequenceClassification(BertConfig(vocab_size=97, intermediate_size=64, **sizes))
    model = attached(base.eval(), k=2)
    with depthmix.routing(model) as record, torch.no_grad():
        model(token_ids(12, 9))
    labels = ["even" if i % 2 == 0 else "odd" for i in range(12)]
    gates = np.concatenate([gate.numpy() for gate in record.gates])
    table = differences(gates, np.arange(12), [grouped_by("label", labels, of_rows=True)], 199)
    assert [(line.group, line.layer) for line in table] == [
        ("even", 0),
        ("even", 1),
        ("odd", 0),
        ("odd", 1),
    ]
    assert table[0].weight == pytest.approx(gates[::2, 0].mean())
    assert table[0].difference == pytest.approx(gates[::2, 0].mean() - gates[1::2, 0].mean())
