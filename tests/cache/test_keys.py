"""What a row is known by: every argument that reaches the prefix, without padding."""

from types import SimpleNamespace

import pytest
import torch

from depthmix.cache.keys import read_batch

IDS = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
CONFIG = SimpleNamespace(image_token_id=9)


def digests(training=True, config=CONFIG, **arguments):
    return [row.digest for row in read_batch(arguments, config, training).rows]


def test_padding_to_the_right_does_not_matter():
    wide = digests(input_ids=IDS, attention_mask=MASK)
    narrow = digests(input_ids=IDS[:1, :3], attention_mask=MASK[:1, :3])
    assert wide[:1] == narrow
    left = digests(input_ids=IDS[:1].roll(1, 1), attention_mask=MASK[:1].roll(1, 1))
    assert left != narrow


@pytest.mark.parametrize("loss", ["labels", "shift_labels", "num_items_in_batch", "logits_to_keep"])
def test_what_only_the_loss_reads_does_not_matter(loss):
    given = [digests(input_ids=IDS, **{loss: torch.full((2, 4), value)}) for value in (3, 4)]
    assert given[0] == given[1]


@pytest.mark.parametrize(
    "changed",
    [
        {"input_ids": IDS + 1},
        {"position_ids": torch.arange(4)[None] + 1},
        {"token_type_ids": torch.ones_like(IDS)},
        {"inputs_embeds": torch.ones(2, 4, 3)},
        {"interpolate_pos_encoding": True},
        {"pixel_values": torch.ones(5, 3)},
        {"training": False},
        {"labels": IDS},
    ],
)
def test_everything_else_does(changed):
    before = digests(input_ids=IDS, attention_mask=MASK)
    after = digests(**{"input_ids": IDS, "attention_mask": MASK} | changed)
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_a_name_is_part_of_the_digest():
    given = [digests(input_ids=IDS, **{name: IDS}) for name in ("token_type_ids", "other_ids")]
    assert given[0] != given[1]


def test_packed_rows_are_known_one_by_one():
    ids, positions = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 1, 2, 0, 1]])
    borders = {"cu_seq_lens_q": torch.tensor([0, 3, 5]), "max_length_q": 3}
    packed = read_batch({"input_ids": ids, "position_ids": positions, **borders}, CONFIG, True)
    assert packed.packed
    assert [row.positions.tolist() for row in packed.rows] == [[0, 1, 2], [3, 4]]
    other = torch.tensor([[8, 9, 4]]), torch.tensor([[0, 1, 0]])
    elsewhere = digests(input_ids=other[0], position_ids=other[1])
    alone = digests(input_ids=ids[:, 3:], position_ids=positions[:, 3:])
    assert packed.rows[1].digest == elsewhere[0] == alone[0]


def test_images_are_by_row_where_every_row_holds_as_many():
    images = torch.arange(2.0)[:, None]
    ids = torch.tensor([[9, 5], [9, 6]])
    first = digests(input_ids=ids, pixel_values=images)
    changed = digests(input_ids=ids, pixel_values=images * torch.tensor([[1.0], [7.0]]))
    assert [a == b for a, b in zip(first, changed, strict=True)] == [True, False]
    ids = torch.tensor([[9, 9], [5, 6]])  # both images are of the first row
    first = digests(input_ids=ids, pixel_values=images)
    changed = digests(input_ids=ids, pixel_values=images * torch.tensor([[1.0], [7.0]]))
    assert [a == b for a, b in zip(first, changed, strict=True)] == [False, False]
    assert not read_batch({"input_ids": ids, "pixel_values": images}, CONFIG, True).apart


def test_no_rows_without_tokens_or_behind_other_tokens():
    assert read_batch({"labels": IDS}, CONFIG, True) is None
    assert read_batch({"input_ids": IDS, "attention_mask": MASK * 0}, CONFIG, True) is None
    assert read_batch({"input_ids": IDS, "past_key_values": object()}, CONFIG, True) is None
