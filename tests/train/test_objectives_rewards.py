"""What `--reward` means: marks of replies, columns that are read, functions of the user's own."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from depthmix.data.gym import gym_rows
from depthmix.errors import ConfigError, DataError, TrainingError
from depthmix.train.objectives.reward_figures import RewardFigures
from depthmix.train.objectives.rewards import reward, rewards_of
from depthmix.train.run_options import RunOptions

SUMS = "reasoning_gym:chain_sum?size=3&seed=1&min_terms=2&max_terms=2"


def marks(text, replies, **row):
    found = reward(text)
    columns = {name: [json.dumps(row[name])] * len(replies) for name in found.columns}
    return found.score(prompts=["?"] * len(replies), completions=replies, **columns)


@pytest.mark.parametrize(
    ("text", "row", "right", "wrong"),
    [
        ("number:answer", {"answer": 7}, [" 7", "3 + 4 = 7.0"], ["8", "seven", "7 or 8"]),
        ("number:answer", {"answer": "so 3\n#### 1,000"}, ["1000"], ["3"]),
        ("exact:label", {"label": "yes"}, [" yes\n"], ["Yes", "yes!"]),
        ("exact:n", {"n": 7}, ["7"], ["7.0"]),
        (r"regex:^\s*\d{2}$", {}, [" 12"], ["1", "a 12"]),
        (r"regex:is {answer}\b", {"answer": "1.5"}, ["It is 1.5."], ["It is 1x5"]),
    ],
)
def test_marks(text, row, right, wrong):
    assert marks(text, right, **row) == [1.0] * len(right)
    assert marks(text, wrong, **row) == [0.0] * len(wrong)


def test_conversations_are_marked_by_their_last_message():
    replies = [[{"role": "assistant", "content": "7"}]]
    assert marks("number:answer", replies, answer="7") == [1.0]


@pytest.mark.parametrize("text", ["reasoning_gym", "reasoning_gym:chain_sum"])
def test_the_verifier_of_a_generator(text):
    entry = next(gym_rows(SUMS))["entry"]
    right, wrong = marks(text, [f" {entry['answer']}\nand more", "none"], entry=entry)
    assert right == 1.0
    assert wrong < 0.1


def test_generated_data_brings_its_verifier():
    (found,) = rewards_of(RunOptions(objective="grpo", dataset=[SUMS]))
    assert (found.name, found.columns) == ("reasoning_gym", ("entry",))
    with pytest.raises(ConfigError, match="reward is missing"):
        rewards_of(RunOptions(objective="grpo", dataset=[SUMS, "rows.jsonl"]))


def test_an_answer_without_a_number_is_refused():
    with pytest.raises(DataError, match="field answer holds no number"):
        reward("number:answer").require({"answer": "many"})


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, code):
        (tmp_path / f"{name}.py").write_text(code)

    return write


def test_a_function_of_the_users_own_names_its_columns(module):
    module(
        "own_rewards",
        "def near(completions, answer, scale=2.0):\n"
        "    pairs = zip(completions, answer)\n"
        "    return [1 / scale if int(c) == a['n'] else None for c, a in pairs]\n"
        "def everything(prompts, completions, **columns):\n"
        "    return [float('answer' in columns)] * len(completions)\n",
    )
    assert reward("own_rewards:near").columns == ("answer",)
    assert marks("own_rewards:near", ["7", "8"], answer={"n": 7}) == [0.5, None]
    assert reward("own_rewards:everything").columns == ()
    assert marks("own_rewards:everything", ["7"]) == [0.0]


def test_the_prompt_is_no_column():
    with pytest.raises(ConfigError, match=r"regex:{prompt}: prompt is no column .* prompts"):
        rewards_of(RunOptions(objective="grpo", dataset=["rows.jsonl"], reward=["regex:{prompt}"]))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1.0]", "expected a list of 2 numbers"),
        ("return ['a', 'b']", "expected a list of 2 numbers"),
        ("raise KeyError('x')", "reward broken_rewards_{n}:f: KeyError: 'x'"),
    ],
)
def test_a_function_that_fails_is_one_line(module, body, said, request):
    number = abs(hash(body)) % 1000
    module(f"broken_rewards_{number}", f"def f(completions, **_):\n    {body}\n")
    with pytest.raises(TrainingError, match=said.format(n=number).replace("(", r"\(")):
        marks(f"broken_rewards_{number}:f", ["7", "8"])


def test_a_module_that_breaks_is_one_line(module):
    module("unfinished_rewards", "import no_such_thing\n")
    with pytest.raises(ConfigError, match="ModuleNotFoundError: No module named 'no_such_thing'"):
        reward("unfinished_rewards:f")


def test_standard_error_is_that_of_the_prompts_means(tmp_path):
    """By hand: means 0.5, 1 and 0 of three prompts."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    figures = RewardFigures([1.0, 2.0])
    figures.trainer = SimpleNamespace(model=SimpleNamespace(training=True))
    first, second = figures.watching([reward("exact:a"), reward("exact:b")])
    prompts = ["p", "p", "q", "q", "r", "r"]
    given = {"prompts": prompts, "completions": ["1", "0", "1", "1", "0", "0"]}
    first(**given, a=[json.dumps("1")] * 6)
    second(**given, b=[json.dumps("no")] * 6)
    logs = {"reward": 0.5}
    state = TrainerState(log_history=[{}])
    figures.on_log(arguments, state, TrainerControl(), logs)
    expected = torch.tensor([0.5, 1.0, 0.0]).std() / 3**0.5
    assert logs["reward_se"] == pytest.approx(float(expected))
    assert state.log_history[0]["reward_se"] == logs["reward_se"]
    logs = {"reward": 0.5}  # nothing since the last log
    figures.on_log(arguments, state, TrainerControl(), logs)
    assert "reward_se" not in logs
