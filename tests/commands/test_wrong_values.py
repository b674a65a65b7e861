"""Every wrong value of every option of every command is one line, and nothing is written.

The options of `depthmix train` are those that it lists itself, so that new ones of TRL come in by
themselves; the other commands' are read off their parsers. What is wrong for a kind of option
stands in WRONG; what is wrong for one option only, in SPECIAL.
"""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from depthmix.cli import COMMANDS, main
from depthmix.config import MoDEConfig
from depthmix.errors import ConfigError
from depthmix.train.arguments import all_options, parse
from depthmix.train.options import options
from depthmix.train.values import MOST_SEED, RANGES

HUGE = "9" * 40
NO_NUMBER = ["nan", "abc", "", "1,5", "0x10", "null", "\ud83d", "9" * 5000, "1e999", "-inf"]
WRONG = {
    "count": ["0", "-1", "1.5", HUGE, *NO_NUMBER],
    "integer": ["1.5", HUGE, *NO_NUMBER],
    "not negative": ["-1", *NO_NUMBER],
    "positive": ["0", "-1", *NO_NUMBER],
    "share": ["-0.1", "1", "7", *NO_NUMBER],
    "inner share": ["0", "1", "-0.1", *NO_NUMBER],
    "seed": ["-1", "1.5", HUGE, *NO_NUMBER],
    "choice": ["no-such-choice", "", "1e3"],
    "yes or no": ["maybe", "2", ""],
}


def files(folder):
    """Return what a folder holds, with sizes and times."""
    found = (path for path in Path(folder).rglob("*"))
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in found if p.is_file()}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a command that must be refused; returns its line."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, said=None):
        before = files(tmp_path)
        shown = " ".join(map(repr, argv))[-300:]
        try:
            status = main([str(argument) for argument in argv])
        except BaseException as error:
            pytest.fail(f"{type(error).__name__}: {str(error)[:500]}: {shown}")
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if "depthmix: error: " in line]
        assert status in (1, 2), f"status {status}: {shown}"
        assert len(errors) == 1, f"{errors}: {shown}"
        assert lines[-1] == errors[0], shown
        assert errors[0].startswith("depthmix: error: "), shown
        assert len(errors[0]) < 700, f"{len(errors[0])} characters: {shown}"
        if said is not None:
            assert said in errors[0], f"{said!r} is not in {errors[0]!r}"
        assert files(tmp_path) == before, shown
        return errors[0]

    return run


# --- depthmix train


TRAIN = {name: option for group in all_options().values() for name, option in group.items()}
MODE = options(MoDEConfig)


# Options whose values are checked where they are declared, not by RANGES.
CHECKS_ITSELF = {
    **dict.fromkeys(MODE, "not negative"),
    **{"k": "count", "adaptation_rank": "count", "router_top_k": "count"},
    **{"validation_split": "inner share", "preview": "count"},
}


def kind_of(name):
    """Return the kind of an option of `depthmix train`; None for texts and mappings."""
    hint = str(TRAIN[name].hint)
    if TRAIN[name].choices or "Literal['" in hint or "Type" in hint.replace("NoneType", ""):
        return "choice"
    if any(word in hint for word in ("str", "dict", "list")):
        return None
    if "bool" in hint:
        return "yes or no"
    return CHECKS_ITSELF.get(name) or kind_of_range(name, whole="float" not in hint)


def kind_of_range(name, whole):
    allowed = RANGES[name]
    if allowed.high == MOST_SEED:
        return "seed"
    if whole:
        return "count" if 0 not in allowed and -1 not in allowed else "integer"
    if 0 not in allowed:
        return "positive"
    return "share" if allowed.high == 1 and allowed.below else "not negative"


KINDS = {name: kind for name in TRAIN if (kind := kind_of(name))}
# null is a value of these.
NULLABLE = {name for name in KINDS if "None" in str(TRAIN[name].hint)}
# False and True are texts of these.


def wrong_for_train(name):
    values = WRONG[KINDS[name]]
    return [value for value in values if not (value == "null" and name in NULLABLE)]


@pytest.fixture
def training(tiny, rows, tmp_path):
    """The command line that is right but for the option in question."""
    return [
        *("train", "--model_name_or_path", tiny, "--dataset", rows, "--max_steps", "1"),
        *("--output_dir", str(tmp_path / "out"), "--report_to", "none", "--k", "2"),
    ]


def test_every_number_of_train_has_a_range():
    checked = {*CHECKS_ITSELF, "dataset_weights"}
    numbers = {
        name
        for name, option in TRAIN.items()
        if re.search(r"\b(int|float)\b", str(option.hint)) and "str" not in str(option.hint)
    }
    assert numbers - checked <= set(RANGES)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_wrong_values_of_train(name, training, refused):
    for value in wrong_for_train(name):
        line = refused(*training, f"--{name}={value}", said=name)
        assert "\n" not in line
    refused(*training, f"--{name}", "1", "2", "3", said=name)
    dashed = f"--{name.replace('_', '-')}"
    line = refused(*training, f"{dashed}={WRONG[KINDS[name]][1]}")
    assert name in line or dashed in line


@pytest.mark.parametrize("name", sorted(TRAIN))
def test_misspelt_options_of_train(name, training, refused):
    for misspelt in (f"{name}e", name[:-1] + "q", f"x{name}"):
        refused(*training, f"--{misspelt}", "1", said="no such option")
    if len(name) > 4:
        refused(*training, f"--{name}e", "1", said=f"did you mean {name}?")


SPECIAL = [
    ("model_name_or_path", "./none"),
    ("model_name_or_path", "no-such-model"),
    ("model_name_or_path", "~/no-such-folder"),
    ("dataset", "none.jsonl"),
    ("dataset", "empty.jsonl"),
    ("dataset", "folder"),
    ("dataset", "~/none.jsonl"),
    ("dataset", "binary.bin"),
    ("dataset", ""),
    ("eval_dataset", "none.jsonl"),
    ("output_dir", ""),
    ("output_dir", "a-file"),
    ("cache_dir", "a-file", "--late_layers_only", "--cache", "on", "--num_train_epochs", "2"),
    *(("tuned_layers", wrong) for wrong in ("0", "-1", "1.5", "0.0", "most", "nan", "", HUGE)),
    ("tuned_layers", "99"),
    ("tuned_layers", "2", "--late_layers_only"),
    ("tuned_layers", "2", "--method", "full"),
    ("attn_implementation", "flash_attention_9"),
    ("attn_implementation", "flash_attention_2"),
    ("torch_compile_backend", "inductr"),
    ("report_to", "wandbb"),
    ("report_to", "comet_ml"),
    ("eos_token", "<no-such-token>"),
    ("pad_token", "<no-such-token>"),
    ("chat_template_path", "none.jinja"),
    ("chat_template_path", "none"),
    ("chat_template_path", "~/none.jinja"),
    ("deepspeed", "none.json"),
    ("deepspeed", "{}"),
    ("fsdp", "no_shard_like_this"),
    ("fsdp_config", "none.json"),
    ("accelerator_config", "none.json"),
    ("accelerator_config", '{"no_such_key": 1}'),
    ("lora_target_modules", "no_such_module"),
    ("lora_target_parameters", "no.such.parameter"),
    ("lora_modules_to_save", "no_such_module"),
    ("optim_args", "no-equals-sign"),
    ("optim", "galore_adamw"),
    ("optim", "lomo"),
    ("lr_scheduler_kwargs", '{"no_such_key": 1}'),
    ("lr_scheduler_kwargs", "{not json"),
    ("layers_path", "no.such.layers"),
    ("norm_path", "no.such.norm"),
    ("k", "5"),
    ("lora_r", "2000000000"),
    ("vera_r", "2000000000", "--method", "vera"),
    ("num_virtual_tokens", "2000000000", "--method", "prompt_tuning"),
    ("resume_from_checkpoint", "none"),
    ("resume_from_checkpoint", "a-file"),
    ("debug", "no_such_option"),
    ("bnb_4bit_quant_storage", "no_dtype", "--load_in_4bit"),
    ("model_init_kwargs", '{"no_such_key": 1}'),
    ("activation_checkpointing_kwargs", '{"no_such_key": 1}', "--activation_checkpointing"),
    ("metric_for_best_model", "no_such_metric", "--load_best_model_at_end"),
    ("train_sampling_strategy", "by_weight"),
    ("pad_to_multiple_of", "0"),
    ("pad_to_multiple_of", "-3"),
    ("pad_to_multiple_of", "abc"),
    ("label_smoothing_factor", "0.1"),
    ("loss_type", "dft"),
    ("use_liger_kernel", "true"),
    ("bf16", "true"),
    ("tf32", "true"),
    ("fp16", "true", "--bf16", "true", "--use_cpu"),
    ("router_aux_loss_coef", "0.1"),
    ("dataloader_prefetch_factor", "2"),
    ("load_best_model_at_end", "true"),
    ("lr_scheduler_type", "reduce_lr_on_plateau"),
    ("eval_steps", "5"),
    ("eval_strategy", "steps"),
    ("early_stopping_patience", "3"),
    ("eval_accuracy", "3"),
    ("packing", "true", "--max_length", "null"),
    ("max_length", "1"),
    ("method", "none", "--no_mode"),
    ("late_layers_only", "true", "--method", "full"),
    ("resume", "true", "--overwrite"),
    ("resume", "true"),
    ("cache", "on"),
    ("dataset_num_proc", "0"),
    ("hub_model_id", "a/b/c", "--push_to_hub"),
    ("dataset_template", "alpaca", "--dataset_format", "messages"),
    ("log_level", "loud"),
    ("ddp_backend", "carrier-pigeon"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("option", SPECIAL, ids=lambda option: " ".join(option)[:40])
def test_wrong_values_of_one_option_of_train(option, training, refused, tmp_path):
    name, value, *others = option
    (tmp_path / "folder").mkdir()
    (tmp_path / "a-file").write_text("not what is looked for")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)))
    refused(*training, f"--{name}={value}", *others)
    assert not (tmp_path / "out").exists()


CONFIGS = {
    "none.yaml": None,
    "list.yaml": "- k\n- 3\n",
    "torn.yaml": "k: [1, 2\n",
    "binary.yaml": b"\xff\xfe\x00\x01",
    "twice.yaml": "k: 2\nk: 3\n",
    "deep.yaml": "k: " + "[" * 3000,
    "nested.yaml": "k: {a: {b: 3}}\n",
    "huge.yaml": f"k: {'9' * 5000}\n",
    "number.yaml": "3: 4\n",
    "null.yaml": "k:\n",
    "tag.yaml": "lr_scheduler_kwargs: {a: !!python/object:os.system 3}\n",
    "anchor.yaml": "k: *nothing\n",
    "typo.yaml": "lerning_rate: 1e-3\n",
    "merge.yaml": "<<: 3\n",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_wrong_configuration_files(name, training, refused, tmp_path):
    content = CONFIGS[name]
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
    refused("train", tmp_path / name, *training[1:-2], said=name)


NUMBERS = sorted(name for name in RANGES if name not in ("local_rank",))
values = st.one_of(
    st.integers().map(str), st.floats().map(str), st.text(max_size=6), st.integers(-3, 3).map(str)
)


@given(st.sampled_from(NUMBERS), values)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_numbers_of_any_kind_are_in_range_or_refused(training, name, text):
    """Whatever is given for a number is in its range, or refused by name; nothing else happens."""
    try:
        arguments = parse([*training[1:], f"--{name}={text}"])
    except ConfigError as refusal:
        message = str(refusal)
        assert name in message or "SFTConfig" in message
        return
    holders = (arguments.run, arguments.model, arguments.training)
    value = next(getattr(holder, name) for holder in holders if hasattr(holder, name))
    if isinstance(value, int | float):
        assert math.isfinite(value)
        assert value in RANGES[name]


# --- the other commands


@pytest.fixture(scope="module")
def tuned(tiny, rows, tmp_path_factory):
    """A tuned model, and folders that are torn."""
    home = tmp_path_factory.mktemp("tuned")
    argv = ["train", "--model_name_or_path", tiny, "--dataset", rows, "--max_steps", "1"]
    assert main([*argv, "--output_dir", str(home / "out"), "--k", "2"]) == 0
    return home


INTEGERS = {
    "generate": {"--max-new-tokens": "count", "--batch-size": "count", "--seed": "seed"},
    "chat": {"--max-new-tokens": "count", "--seed": "seed"},
    "eval": {"--batch-size": "count", "--limit": "count", "--max-new-tokens": "count"},
    "plan": {
        **{"--k": "count", "--lora-r": "count", "--rows": "count", "--length": "count"},
        **{"--gpus": "count", "--cached-tokens": "count", "--supervised": "positive"},
        "--dtype": "choice",
        "--sharding": "choice",
    },
    "bench": {
        **{"--k": "count", "--rows": "count", "--longest": "count", "--repeats": "count"},
        "--steps": "count",
        "--parts": "choice",
    },
    "compare": {"--workers": "count", "--gpus": "not negative"},
    "serve": {"--engine": "choice"},
    "probe": {"--rows": "count"},
    "report": {
        **{"--rows": "count", "--max-new-tokens": "count", "--permutations": "count"},
        **{"--seed": "seed", "--format": "choice"},
    },
    "export": {
        **{"--steps": "count", "--batch-size": "count", "--max-length": "count"},
        "--learning-rate": "positive",
    },
}
INTEGERS["generate"] |= {"--temperature": "not negative", "--format": "choice"}
for command in ("generate", "chat", "eval", "bench", "compare", "report"):
    INTEGERS[command]["--dtype"] = "choice"
INTEGERS["chat"] |= {"--temperature": "not negative"}
INTEGERS["eval"] |= {"--scoring": "choice", "--template": "choice"}


@pytest.fixture
def right(tiny, rows, tuned, tmp_path):
    """Command lines that are right but for the option in question."""
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(
        json.dumps(
            {
                **{"model_name_or_path": tiny, "output_dir": str(tmp_path / "compared")},
                **{"baseline": "lora", "methods": {"lora": {"mode": False}}, "seeds": [1]},
                "tasks": {"sums": {"dataset": [rows], "train_rows": 2, "test_rows": 2}},
            }
        )
    )
    out = str(tuned / "out")
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": "What is 3 + 4?", "answer": "#### 7"}))
    return {
        "generate": ["generate", out, "--prompt", "What is 3 + 4?"],
        "chat": ["chat", out],
        "eval": ["eval", out, "--tasks", f"mawps={questions}"],
        "plan": ["plan", tiny],
        "bench": ["bench", "--model", tiny],
        "compare": ["compare", str(experiment)],
        "cache": ["cache", "list"],
        "info": ["info", tiny],
        "export": ["export", out, str(tmp_path / "exported")],
        "serve": ["serve", out],
        "probe": ["probe", tiny, rows],
        "calibrate": ["calibrate", out, rows],
        "report": ["report", out, rows, "--output", str(tmp_path / "report")],
    }


@pytest.mark.parametrize(
    ("command", "option"), [(c, o) for c, found in INTEGERS.items() for o in found]
)
def test_wrong_values_of_other_commands(command, option, right, refused):
    for value in WRONG[INTEGERS[command][option]]:
        refused(*right[command], f"{option}={value}", said=option)
        refused(*right[command], f"{option.replace('-', '_').replace('__', '--')}={value}")


def option_strings(command):
    """Return the options of a command, read off its parser."""
    import importlib

    module = importlib.import_module(f"depthmix.commands.{command}")
    if command == "chat":
        return ["--model", "--system", "--max-new-tokens", "--temperature", "--top-p", "--seed"]
    if command == "info":
        return ["--method", "--late-layers-only", "--lora-r", "--k", "--vera-r"]
    known = module._parser()._option_string_actions
    return [name for name in known if name.startswith("--") and name != "--help"]


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["generate", "out", "--promt", "x"], "--prompt"),
        (["eval", "out", "--task", "x"], "--tasks"),
        (["bench", "--modell", "x"], "--model"),
    ],
)
def test_a_required_option_that_is_misspelt_is_named(argv, meant, refused):
    assert refused(*argv, said="no such option").count(f"did you mean {meant}?") == 1


OTHERS = sorted(set(COMMANDS) - {"train"})


@pytest.mark.parametrize("command", OTHERS)
def test_misspelt_options_of_other_commands(command, right, refused):
    for option in option_strings(command):
        for misspelt in (f"{option}e", option[:-1] + "q"):
            line = refused(*right[command], misspelt, "1", said="no such option")
        if len(option) > 6:
            assert "did you mean" in line


MISSING = {
    "generate": [
        ["generate", "none", "--prompt", "x"],
        ["generate", "", "--prompt", "x"],
        ["generate", "empty", "--prompt", "x"],
        ["generate", "{out}", "--prompt", ""],
        ["generate", "{out}", "--prompt", "x", "--model", "./none"],
        ["generate", "{out}", "--prompts-file", "none.txt"],
        ["generate", "{out}", "--prompts-file", "empty"],
        ["generate", "{out}", "--prompts-file", "binary.bin"],
        ["generate", "{out}", "--prompt", "x", "--top-p", "0"],
        ["generate", "{out}", "--prompt", "x", "--top-p", "nan"],
        ["generate", "{out}", "--prompt", "x", "--prompts-file", "x"],
        ["generate", "{out}"],
    ],
    "chat": [["chat", "none"], ["chat", "empty"], ["chat"], ["chat", "{out}", "--model", "./none"]],
    "eval": [
        ["eval", "none", "--tasks", "mawps={rows}"],
        ["eval", "{out}", "--tasks", "mawps=none.json"],
        ["eval", "{out}", "--tasks", "mawsp={rows}"],
        ["eval", "{out}", "--tasks", "no_such_task"],
        ["eval", "{out}", "--tasks"],
        ["eval", "{out}"],
        ["eval", "{out}", "--tasks", "mawps={rows}", "--train-data", "none.json"],
        ["eval", "{out}", "--tasks", "reasoning_gym:no_such_generator"],
        ["eval", "{out}", "--tasks", "mawps={rows}", "--output", "a-file"],
    ],
    "plan": [
        ["plan", "./none"],
        ["plan", "none"],
        ["plan", "empty"],
        ["plan"],
        ["plan", "{tiny}", "--revision", "main"],
    ],
    "bench": [
        ["bench", "--model", "{tiny}", "--revision", "main"],
        ["bench", "--model", "./none", "--parts", "step"],
        ["bench"],
        ["bench", "--model", "{tiny}", "--table", "none.md"],
        ["bench", "--model", "{tiny}", "--json", "a-file/b.json"],
        ["bench", "--model", "{tiny}", "--plot", "empty"],
        ["bench", "--model", "{tiny}", "--plot", ""],
        ["bench", "--model", "{tiny}", "--k", "9", "--parts", "step"],
    ],
    "cache": [
        ["cache", "lst"],
        ["cache"],
        ["cache", "clear", "none"],
        ["cache", "list", "--cache-dir", "a-file"],
        ["cache", "list", "--cache-dir", ""],
    ],
    "compare": [["compare", "none.yaml"], ["compare", "empty"], ["compare"], ["compare", "a-file"]],
    "info": [
        ["info", "./none"],
        ["info", "empty"],
        ["info", "{tiny}", "--k", "9"],
        ["info", "{tiny}", "--k", "0"],
        ["info", "{tiny}", "--lora_r", "0"],
        ["info", "{tiny}", "--lora_r", "-1"],
        ["info", "{tiny}", "--method", "loora"],
        ["info", "{tiny}", "--seed", "3"],
        ["info", "{tiny}", "--lora_target_modules", "none"],
        ["info", "{out}", "--k", "3"],
    ],
    "report": [
        ["report", "none"],
        ["report", "empty", "{rows}"],
        ["report", "{tiny}"],
        ["report", "{out}"],
        ["report", "{out}", "none.jsonl"],
        ["report", "{out}", "{rows}", "--output", "a-file"],
        ["report", "{out}", "{rows}", "--pos", "none"],
        ["report", "{out}", "{rows}", "--model", "./none"],
        ["report"],
    ],
    "export": [
        ["export", "none", "exported"],
        ["export", "empty", "exported"],
        ["export", "{tiny}", "exported"],
        ["export", "{out}", "a-file"],
        ["export", "{out}", "full"],
        ["export", "{out}", "full", "--plain"],
        ["export", "{out}", "exported", "--dataset", "{rows}"],
        ["export", "{out}", "exported", "--plain", "--dataset", "none.jsonl"],
        ["export", "{out}"],
    ],
    "serve": [
        ["serve"],
        ["serve", "none", "--port", "0"],
        ["serve", "empty", "--port", "0"],
        ["serve", "{out}", "--port", "65536"],
        ["serve", "{out}", "--host", "no such host"],
        ["serve", "{out}", "--", "--max-model-len", "9"],
    ],
    "probe": [
        ["probe"],
        ["probe", "{tiny}"],
        ["probe", "./none", "{rows}"],
        ["probe", "{tiny}", "none.jsonl"],
        ["probe", "{tiny}", "empty"],
        ["probe", "{out}", "{rows}"],
        ["probe", "{tiny}", "{rows}", "--k", "2"],
        ["probe", "{tiny}", "{rows}", "--plot", "a-file/b.png"],
    ],
    "calibrate": [
        ["calibrate"],
        ["calibrate", "{out}"],
        ["calibrate", "none", "{rows}"],
        ["calibrate", "empty", "{rows}"],
        ["calibrate", "{out}", "none.jsonl"],
        ["calibrate", "{out}", "{rows}", "--plot", "a-file/b.png"],
    ],
    "": [["trian"], ["--verson"], [""], ["Train"]],
}


@pytest.mark.parametrize(
    "argv", [argv for group in MISSING.values() for argv in group], ids=lambda a: " ".join(a)[:50]
)
def test_missing_files_and_words(argv, tiny, rows, tuned, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other.txt").write_text("of someone")
    (tmp_path / "a-file").write_text("not what is looked for")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)))
    place = {"{out}": str(tuned / "out"), "{tiny}": tiny, "{rows}": rows}
    for name, value in place.items():
        argv = [argument.replace(name, value) for argument in argv]
    refused(*argv)


WEIGHTS = ["adapter_config.json", "adapter_model.safetensors", "depthmix.yaml"]
TORN = [
    *((command, name) for command in ("generate", "eval", "info", "export") for name in WEIGHTS),
    *((command, "tokenizer.json") for command in ("generate", "eval", "export")),
]


@pytest.mark.parametrize(("command", "name"), TORN)
def test_torn_files_of_a_tuned_model(command, name, right, tuned, refused, tmp_path):
    shutil.copytree(tuned / "out", tmp_path / "torn")
    whole = (tmp_path / "torn" / name).read_bytes()
    (tmp_path / "torn" / name).write_bytes(whole[: len(whole) // 2] + b"\x00{[")
    command_line = [command, str(tmp_path / "torn"), *right[command][2:]]
    refused(*command_line, said="torn")
