"""What is sent of a reply as it comes is what is in front of its first stop text."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthmix.serve.stops import Pieces, up_to

END = None


def sent(pieces, stops):
    """What comes of a queue of pieces, by both ways of asking."""
    queue = asyncio.Queue()
    for piece in (*pieces, END):
        queue.put_nowait(piece)
    reply, found = Pieces(queue, stops), []
    while True:
        try:
            found.append(reply.get_nowait())
        except asyncio.QueueEmpty:
            return found


@given(st.lists(st.text("ab\n", max_size=4)), st.lists(st.text("ab\n", min_size=1, max_size=3)))
def test_pieces_are_the_reply_up_to_the_first_stop(pieces, stops):
    *given, end = sent(pieces, stops)
    text = "".join(pieces)
    assert end is END
    assert "".join(given) == up_to(text, stops)
    assert not any(stop in "".join(given) for stop in stops)
    assert "" not in given


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [("a\nb", ["\n"], "a"), ("abc", ["c", "b"], "a"), ("abc", [], "abc"), ("abc", ["x"], "abc")],
)
def test_up_to(text, stops, left):
    assert up_to(text, stops) == left


def test_what_can_be_no_stop_is_not_held_back():
    queue = asyncio.Queue()
    queue.put_nowait("one two#")
    reply = Pieces(queue, ["##"])
    assert reply.get_nowait() == "one two"
    with pytest.raises(asyncio.QueueEmpty):
        reply.get_nowait()
    queue.put_nowait(" three")
    assert asyncio.run(reply.get()) == "# three"


def test_other_items_come_after_the_text_before_them():
    call = object()
    assert sent(["a#", call, "b"], ["##"]) == ["a", "#", call, "b", END]
