"""Reading answers out of replies."""

import pytest

from depthmix.evaluate.answers import label_is_right, last_number, letter_is_right, number_is_right


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("(22-14)/4 = 2", "2.0", True),
        ("It costs $1,234.50 in total.", "1234.5", True),
        ("2 + 3 = 5. So the answer is -15", "-15.0", True),
        ("1.83333", "1.8333333333333335", True),
        ("1.84", "1.8333333333333335", False),
        ("no number", "3", False),
        ("3, 4", "3", False),
    ],
)
def test_last_number_is_compared(reply, answer, right):
    assert number_is_right(reply, answer) is right


def test_thousands_are_joined_and_lists_are_not():
    assert last_number("12,345,678") == 12345678
    assert last_number("3, 4") == 4


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("the correct answer is answer2", True),
        ("Answer2 is right, answer1 is not", True),
        ("answer1, or answer2", False),
        ("answer22", False),
        ("", False),
    ],
)
def test_first_label_is_compared(reply, right):
    assert label_is_right(reply, "answer2", ["answer1", "answer2"]) is right


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("A train leaves at 9. The answer is (C).", True),
        ("All of them: C", True),
        ("By Bayes the answer is D", False),
        ("A man walks", False),
        ("(A) is wrong, so (C)", True),
    ],
)
def test_letter_is_not_just_the_first_capital(reply, right):
    assert letter_is_right(reply, "C", list("ABCDE")) is right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is .5", 0.5),
        ("-.5", -0.5),
        ("x = \u22125", -5),  # a minus sign
        ("x = \u20135", -5),  # a dash, as telephones write it
        ("-$5", -5),
        ("$-5", -5),
        ("it costs $29.00.", 29),
        ("€1,234.50", 1234.5),
        ("10-5=5", 5),
        ("10-5", 5),
        ("10 - 5", 5),
        ("(-3)", -3),
        ("1/2", 0.5),
        ("1 \u2044 2", 0.5),
        ("-1/2", -0.5),
        ("2 1/2", 2.5),
        ("12/25/2024", 2024),
        ("5/0", 0),
        ("1.5e-3", 0.0015),
        ("3,4", 4),
        ("1,2345", 2345),
        ("about 5.", 5),
        ("*-4*", -4),
        ("3/4 of 8 = 6", 6),
        ("9" * 5000, float("inf")),
        ("none", None),
    ],
)
def test_numbers_are_read_as_people_write_them(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize("answer", ["50", "0.5"])
@pytest.mark.parametrize("reply", ["50 %", "50%", "50.0 % of them"])
def test_a_percentage_is_a_number_and_a_share(reply, answer):
    assert number_is_right(reply, answer)
    assert not number_is_right("5 %", answer)
