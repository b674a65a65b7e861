"""What formats make of a row, what overlap is, and generators as sources."""

import pytest

from depthmix.data.files import read_items
from depthmix.data.formats import FORMATS
from depthmix.data.load import load_data, load_questions
from depthmix.data.overlap import find_overlap, normalised
from depthmix.data.questions import Question
from depthmix.errors import DataError

SUMS = "reasoning_gym:chain_sum?size=40&seed=1&min_terms=2&max_terms=2&min_digits=1&max_digits=1"


@pytest.mark.parametrize(
    ("equation", "answer", "solution"),
    [
        ("X=((22.0-14.0)/4.0)", 2.0, "((22-14)/4) = 2"),
        ("x=5.91+8.11", "14.02", "5.91+8.11 = 14.02"),
        ("x=8100.0*15.0*0.01", 1215.0, "8100*15*0.01 = 1215"),
    ],
)
def test_mawps(equation, answer, solution):
    row = {"original_text": " Sam had some . ", "equation": equation, "ans": answer}
    question = FORMATS["mawps"].read(row)
    assert question.solution == solution
    assert float(question.answer) == pytest.approx(float(answer))
    assert FORMATS["mawps"].training_row(row, None) == {
        "prompt": "Question: Sam had some .\nAnswer:",
        "completion": f" {solution}",
    }


def test_mawps_without_a_number_is_refused_by_line(tmp_path):
    path = tmp_path / "m.json"
    path.write_text('[{"original_text": "a", "equation": "X=1", "ans": "many"}]')
    with pytest.raises(DataError, match=r"m\.json: row 1: field ans must be a number"):
        load_data([str(path)])


def test_test_rows_may_lack_a_solution_and_training_rows_may_not(tmp_path):
    path = tmp_path / "t.json"
    path.write_text('[{"instruction": "What?", "input": "", "output": "", "answer": "3.0"}]')
    questions, _ = load_questions([str(path)])
    assert questions == [Question("What?", "", None, "3.0")]
    with pytest.raises(DataError, match=r"row 1: field output is empty"):
        load_data([str(path)])


def test_gsm8k_answer_stands_behind_the_marks():
    row = {"question": "How many?", "answer": "2*3=<<2*3=6>>6 apples\n#### 6"}
    question = FORMATS["question"].read(row)
    assert question.solution == "2*3=6 apples\n#### 6"
    assert question.answer == "6"


def test_rows_without_questions_cannot_be_scored(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(DataError, match="hold no question and answer"):
        load_questions([str(path)])


def test_overlap_ignores_case_punctuation_and_idle_zeros():
    def ask(text):
        return Question(text, "", None, "")

    train = [ask("Tom has 3.0 cats , and 2 dogs .")]
    test = [ask("tom has 3 cats and 2 dogs?"), ask("Tom has 30 cats and 2 dogs.")]
    assert find_overlap(train, test).shared == (True, False)
    assert str(find_overlap(train, test)).startswith("1 of 2 test questions")
    assert normalised(ask("3.50 and 3.05")) == "3.50 and 3.05"


def test_generator_is_a_source():
    data, name = load_data([SUMS])
    assert name == "question"
    assert data.column_names == ["prompt", "completion"]
    prompts = data["prompt"]
    assert len(set(prompts)) == len(prompts) <= 40
    assert load_data([SUMS])[0].to_list() == data.to_list()
    assert "entry" in next(read_items([SUMS], "train", None)).row


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning_gym:nothing", "nothing"),
        ("reasoning_gym:chain_sum?colour=3", "colour"),
        ("reasoning_gym:chain_sum?min_terms=9&max_terms=2", "reasoning_gym:chain_sum"),
    ],
)
def test_wrong_generator_is_named(source, message):
    with pytest.raises(DataError, match=message):
        load_data([source])
