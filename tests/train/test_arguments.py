"""From YAML and flags to typed options, and what is said when they are wrong."""

from typing import Literal

import pytest
import yaml

from depthmix.commands.train_help import CURATED
from depthmix.errors import ConfigError
from depthmix.train.arguments import all_options, parse
from depthmix.train.given import read_flags, read_nested, read_yaml
from depthmix.train.options import Option
from depthmix.train.run_options import RunOptions
from depthmix.train.typed import convert

REQUIRED = ["--model_name_or_path", "base", "--dataset", "a.jsonl", "--output_dir"]


@pytest.fixture
def required(tmp_path):
    return [*REQUIRED, str(tmp_path / "out")]


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_fit_the_device_and_the_method(required):
    arguments = parse(required)
    assert arguments.mode.k == 3
    assert arguments.run.method == "lora"
    training = arguments.training
    assert (training.learning_rate, training.save_strategy) == (2e-4, "epoch")
    assert (training.bf16, training.activation_checkpointing) == (False, False)
    assert training.eval_strategy == "no"
    assert parse([*required, "--method", "full"]).training.learning_rate == 2e-5


def test_every_source_of_options(tmp_path, required):
    path = write(
        tmp_path,
        """
        k: 2
        distill_weight: 5e-1
        method: dora
        lora_r: 4
        lora_target_modules: [q_proj, v_proj]
        learning_rate: 1e-4
        max_steps: -1
        save_strategy: no
        run_name: 12
        max_length:
        lr_scheduler_type: cosine
        lr_scheduler_kwargs: {num_cycles: 2, min_lr: 1e-6}
        """,
    )
    arguments = parse([path, *required, "--k", "4", "--packing", "--no-mode", "--seed=7"])
    assert (arguments.mode.k, arguments.mode.distill_weight) == (4, 0.5)
    assert (arguments.run.method, arguments.run.mode) == ("dora", False)
    assert arguments.model.lora_target_modules == ["q_proj", "v_proj"]
    training = arguments.training
    assert (training.learning_rate, training.save_strategy) == (1e-4, "no")
    assert (training.run_name, training.max_length, training.packing) == ("12", None, True)
    assert (training.lr_scheduler_type, training.seed) == ("cosine", 7)
    assert training.lr_scheduler_kwargs == {"num_cycles": 2, "min_lr": 1e-6}


def test_the_resolved_configuration_gives_the_same_run(tmp_path, required):
    flags = ["--k", "2", "--lora_r", "4", "--learning_rate", "3e-4", "--dataset", "b.csv"]
    first = parse([*required, *flags, "--gradient_checkpointing", "--resume"])
    path = write(tmp_path, yaml.safe_dump(first.resolved()))
    again = parse([path])
    assert (again.mode, again.model, again.training) == (first.mode, first.model, first.training)
    assert again.run.dataset == ["a.jsonl", "b.csv"]
    assert not again.run.resume
    assert again.training.activation_checkpointing


def test_of_a_flag_that_is_given_twice_a_list_takes_all(required):
    flags = ["--dataset", "b", "c", "--dataset=d", "--k", "2", "--k", "4"]
    arguments = parse([*required, *flags, "--dataset_weights", "4", "3", "2", "1e0"])
    assert arguments.run.dataset == ["a.jsonl", "b", "c", "d"]
    assert arguments.run.dataset_weights == [4.0, 3.0, 2.0, 1.0]
    assert arguments.mode.k == 4


def test_the_preview_needs_no_folder_and_is_not_stored():
    arguments = parse([*REQUIRED[:-1], "--preview"])
    assert arguments.run.preview == 3
    assert "preview" not in arguments.resolved()
    assert parse([*REQUIRED[:-1], "--preview", "1"]).run.preview == 1
    with pytest.raises(ConfigError, match="preview: expected an integer or null, not 'all'"):
        parse([*REQUIRED[:-1], "--preview", "all"])


def test_what_is_supervised_is_stored_and_trl_is_not_told(required):
    arguments = parse([*required, "--assistant_only_loss", "--completion_only_loss", "true"])
    assert arguments.resolved()["supervise"] == "assistant"
    assert not arguments.training.assistant_only_loss
    assert "assistant_only_loss" not in arguments.resolved()
    assert parse([*required, "--supervise", "all"]).resolved()["supervise"] == "all"


def test_steps_imply_their_strategy(required):
    flags = ["--save_steps", "5", "--eval_steps", "7", "--eval_dataset", "b.jsonl"]
    training = parse([*required, *flags]).training
    assert (training.save_strategy, training.eval_strategy) == ("steps", "steps")
    training = parse([*required, "--eval_dataset", "b.jsonl"]).training
    assert training.eval_strategy == "epoch"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("k: 2\nlerning_rate: 1", "run.yaml:2: lerning_rate: no such option; .* learning_rate"),
        ("lr: 1", r"run.yaml:1: lr: no such option; did you mean learning_rate\?"),
        ("use_peft: true", "run.yaml:1: use_peft: no such option; did you mean method"),
        ("zzzz: 1", "run.yaml:1: zzzz: no such option$"),
        ("\nlearning_rate: fast", "run.yaml:2: learning_rate: expected a number, not 'fast'"),
        ("k: 0", "run.yaml:1: k must be an integer >= 1, not 0"),
        ("k: two", "run.yaml:1: k: expected an integer, not 'two'"),
        ("k:", "run.yaml:1: k: expected an integer, not null"),
        ("k: [1, 2]", r"run.yaml:1: k: expected an integer, not 2 values \('1', '2'\)"),
        ("divergence: kd", "run.yaml:1: divergence: expected one of kl, reverse_kl, js, not 'kd'"),
        ("router_top_k: 9", r"run.yaml:1: router_top_k must be an integer in 1..k \(3\)"),
        ("method: lorra", "run.yaml:1: method: expected one of lora, dora"),
        ("packing: maybe", "run.yaml:1: packing: expected true or false, not 'maybe'"),
        ("max_length: long", "run.yaml:1: max_length: expected an integer or null"),
        ("loss_type: mse", "run.yaml:1: loss_type: expected one of nll, dft"),
        ("optim: foo", r"run.yaml:1: optim: expected one of adamw_torch, .* \(see --help-all\)"),
        ("lr_scheduler_kwargs: [1]", "run.yaml:1: lr_scheduler_kwargs: expected"),
        ("k: 2\nk: 3", "run.yaml:2: k is given twice"),
        ("k: [", "run.yaml:1: not valid YAML"),
        ("- a", "must hold `key: value` lines"),
        ("load_in_4bit: true\nload_in_8bit: true", "ModelConfig: You can't use 8 bit and 4 bit"),
        ("fp16: true\nbf16: true\nuse_cpu: true", "SFTConfig: .*[Aa]t most one of fp16 and bf16"),
        ("mode: false\nmethod: none", "with mode false nothing is trained"),
        ("late_layers_only: true\nmethod: prompt_tuning", "late_layers_only needs lora"),
        ("resume: true\noverwrite: true", "exclude each other"),
        ("eval_strategy: epoch", "there is no eval_dataset and no validation_split"),
        ("validation_split: 1.0", "validation_split must lie between 0 and 1"),
        ("validation_split: nan", "validation_split must lie between 0 and 1"),
        ("validation_split: 0.1\neval_dataset: a", "validation_split and eval_dataset exclude"),
        ("dataset_weights: [1, 2]", "2 weights for 1 sources in dataset"),
        ("dataset_weights: 0", "dataset_weights must be numbers above 0"),
        ("dataset_weights: nan", "dataset_weights must be numbers above 0"),
        ("dataset_weights: many", "run.yaml:1: dataset_weights: expected a list of numbers"),
        ("messages_column: a\nprompt_column: b", "messages_column excludes prompt_column"),
        ("preview: 0", "preview must be 1 or more rows"),
        ("supervise: user", "expected one of assistant, all, last, not 'user'"),
        ("assistant_only_loss: true\nsupervise: all", "leave it out and set supervise assistant"),
        ("completion_only_loss: false", "leave it out and set supervise all"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, required, text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse([write(tmp_path, text), *required])


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--kk", "3"], "--kk: no such option; did you mean k"),
        (["--k", "x"], "--k: expected an integer, not 'x'"),
        (["--k"], "--k: needs a value"),
        (["--k", "0"], "--k must be an integer >= 1"),
        (["--no_k"], "--no_k: no such option"),
        (["--k", "2", "run.yaml"], "run.yaml: the configuration file must come before the flags"),
        (["--output_dir", "null"], "output_dir is missing"),
    ],
)
def test_wrong_flags(required, flags, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse([*required, *flags])


def test_missing_options_and_files(tmp_path):
    with pytest.raises(ConfigError, match="model_name_or_path is missing"):
        parse(["--k", "2"])
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        parse([str(tmp_path / "none.yaml")])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        parse([str(tmp_path / "binary.yaml")])
    with pytest.raises(ConfigError, match="expected a flag"):
        read_flags(["-k", "3"])


def test_an_empty_file_gives_nothing(tmp_path):
    assert read_yaml(write(tmp_path, "# nothing\n")) == {}


def test_merge_keys_bring_what_is_not_given(tmp_path):
    path = write(
        tmp_path,
        "first: &a {k: 2, lora_r: 4}\n"
        "second: &b {k: 3, max_steps: 5}\n"
        "both: {<<: [*a, *b], lora_r: 8}\n",
    )
    read = read_nested(path, {"first": 1, "second": 1, "both": 1})["both"]
    texts = {name: given.text for name, given in read.items()}
    assert texts == {"k": "2", "max_steps": "5", "lora_r": "8"}
    assert read["max_steps"].place == f"{path}:2: both.max_steps"


def test_a_mapping_that_merges_itself_is_refused(tmp_path):
    path = write(tmp_path, "a: &a\n  k: 3\n  <<: *a\n")
    with pytest.raises(ConfigError, match=r":3: what is merged here holds itself"):
        read_nested(path, {"a": 1})


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (int | None, "null", None),
        (int | str | None, "auto", "auto"),
        (int | str | None, "8", 8),
        (str | bool, "no", False),
        (bool | None, [], True),
        (list[str] | None, "all-linear", ["all-linear"]),
        (None | str | list[str], ["a", "b"], ["a", "b"]),
        (None | str | list[str], "a", "a"),
        (dict | str | None, '{"a": 1e-3}', {"a": 1e-3}),
        (dict | str | None, "file.json", "file.json"),
        (Literal["a", "b"], "b", "b"),
    ],
)
def test_conversion_by_type(hint, text, value):
    assert convert(text, Option("x", hint, None, "", ())) == value


def test_no_key_has_two_meanings():
    groups = [set(group) for group in all_options().values()]
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_the_help_names_options_that_exist():
    known = set.union(*map(set, all_options().values()))
    assert set(CURATED) <= known
    assert all(option.help for option in all_options()["depthmix"].values())
    assert "dataset" in RunOptions.__dataclass_fields__


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ("all", 16, 32, 2e-4)),
        (["--budget", "full"], ("all", 16, 32, 2e-4)),
        (["--budget", "half"], ("half", 16, 32, 2e-4)),
        (["--budget", "light"], ("half", 1, 2, 4e-4)),
        (["--budget", "light", "--method", "dora"], ("half", 1, 2, 4e-4)),
        (["--budget", "light", "--tuned_layers", "0.25"], ("0.25", 1, 2, 4e-4)),
        (["--budget", "light", "--lora_r", "4", "--lora_alpha", "8"], ("half", 4, 8, 4e-4)),
        (["--budget", "light", "--learning_rate", "1e-3"], ("half", 1, 2, 1e-3)),
        (["--budget", "light", "--no_late_layers_only"], ("half", 1, 2, 4e-4)),
    ],
)
def test_a_budget_sets_what_is_not_given(required, given, expected):
    arguments = parse([*required, *given])
    model = arguments.model
    assert (
        arguments.run.tuned_layers or "all",
        model.lora_r,
        model.lora_alpha,
        arguments.training.learning_rate,
    ) == expected


def test_a_budget_is_kept_by_the_resolved_configuration(tmp_path, required):
    """As is one that a flag puts on a run that had none."""
    path = tmp_path / "run.yaml"
    for given, again in ([["--budget", "light"], []], [[], ["--budget", "light"]]):
        path.write_text(yaml.safe_dump(parse([*required, *given]).resolved()))
        arguments = parse([str(path), *again])
        assert (arguments.run.tuned_layers, arguments.model.lora_r) == ("half", 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--budget", "tiny"], "--budget: expected one of full, half, light or null, not 'tiny'"),
        (["--budget", "light", "--method", "ia3"], "budget light needs method lora or dora"),
        (["--budget", "full", "--method", "full"], "budget full needs method lora or dora"),
    ],
)
def test_budgets_that_cannot_be(required, given, message):
    with pytest.raises(ConfigError, match=message):
        parse([*required, *given])
