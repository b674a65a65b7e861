"""Every code block of README.md and docs/ does what it says, as it stands there.

Python is executed, on tiny models. Of a command line every option and value is read by the parser
of its program; some are run as well (here, in `report/test_docs.py`, `train/test_objectives.py`
and `test_real.py`). A block that does not say what it is, and a program that nothing here knows,
is an error.
"""

import importlib
import json
import shutil
import subprocess

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import depthmix
from depthmix.cli import main
from depthmix.compare.engine import prepare
from depthmix.compare.experiment import read_experiment
from depthmix.train.arguments import parse as parse_train
from doc_blocks import PAGES, ROOT, blocks, commands, replaced
from serving import serving
from task_models import CLASSIFIERS, build

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning", "ignore:'pin_memory' argument:UserWarning"
)

# What stands behind a fence; `text` is what is printed, or drawn, and nobody types.
KINDS = ("python", "bash", "console", "yaml", "text")
TYPED = ("$ ", "depthmix ", "python ", "pip ", "import ", "from ")

# Pages whose Python is executed elsewhere.
ELSEWHERE = {
    "README.md": "test_real.py, on the real model",
    "docs/report.md": "report/test_docs.py, which looks at what comes out",
}

# Programs whose commands are neither run nor parsed, with the reason.
LEFT_OUT = {
    "pip": "needs a network",
    "vllm": "needs an environment of its own, and is served by `make serve-check`",
    "git": "is there for the command that it pipes into",
}

SERVED = "docs/serving.md"

MAWPS = [
    {"original_text": f"Ann has {n} figs .", "equation": f"x={n}.0+4.0", "ans": n + 4.0}
    for n in range(720)
]


# Where the blocks run


@pytest.fixture(scope="module")
def hub(tiny, tmp_path_factory):
    """A local folder for every name on the hub."""
    bert = str(tmp_path_factory.mktemp("models") / "bert")
    build(CLASSIFIERS["bert"], num_labels=2).save_pretrained(bert)
    return {"HuggingFaceTB/SmolLM2-135M-Instruct": tiny, "bert-base-uncased": bert}


@pytest.fixture(scope="module")
def workplace(tiny, hub, rows, tmp_path_factory):
    """A folder with what the pages name: rows, a run and its export, the experiment files."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copy(rows, folder / "train.jsonl")
    for name in ("experiments", "configs"):
        (folder / name).symlink_to(ROOT / name)
    experiment, *_ = blocks("docs/comparing.md", kinds=("yaml",))
    (folder / "experiment.yaml").write_text(replaced(experiment.text, hub))
    (folder / "mawps_train_raw.json").write_text(json.dumps(MAWPS))
    options = {"model_name_or_path": tiny, "dataset": "train.jsonl", "output_dir": "tuned"}
    (folder / "run.yaml").write_text(json.dumps(options))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "run.yaml", "--max_steps", "2", "--k", "2"]) == 0
        assert main(["export", "tuned", "exported"]) == 0
    return folder


@pytest.fixture
def inside(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


@pytest.fixture(scope="module")
def served(workplace):
    """The address of a real server for those that the page of serving names."""
    with serving(workplace, "tuned") as (address, _):
        yield {f"http://127.0.0.1:{port}/v1": address for port in (8000, 8765)}


# Every block


@pytest.mark.parametrize("block", blocks(*PAGES), ids=str)
def test_a_block_says_what_it_is(block):
    assert block.kind in KINDS, f"fence it as one of {', '.join(KINDS)}"
    if block.kind == "text":
        assert [line for line in block.text.splitlines() if line.startswith(TYPED)] == []


# Python


def run_page(page, names, local):
    """Execute the Python of a page, each block with the names of those before it."""
    for block in blocks(page, kinds=("python",)):
        block.run(names, local)
    return names


PYTHON = {block.page for block in blocks(*PAGES, kinds=("python",))}
NEED_MORE = {SERVED, "docs/cached-depth.md", "docs/objectives.md"}


@pytest.mark.parametrize("page", sorted(PYTHON - set(ELSEWHERE) - NEED_MORE))
def test_python_runs(page, hub, inside):
    run_page(page, {}, hub)


def test_python_around_a_trainer_runs(tiny, hub, inside):
    base, lora = AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(task_type="CAUSAL_LM")
    model = depthmix.attach(base, depthmix.MoDEConfig(k=2), lora, late_layers_only=True)
    rows = Dataset.from_list([{"prompt": "What is 2 + 3?", "completion": " 5"}] * 4)
    settings = SFTConfig("cached", bf16=False, num_train_epochs=2, report_to="none")
    trainer = SFTTrainer(model, settings, train_dataset=rows)
    run_page("docs/cached-depth.md", vars() | {"total_tokens": 1_000}, hub)
    assert trainer.state.global_step == 2


def test_a_reward_in_python_rewards(hub, inside):
    reward = run_page("docs/objectives.md", {}, hub)["short"]
    assert reward(["7", "it is 7", "8"], [7, 7, 7]) == [1 / 2, 1 / 8, 0]


def test_a_server_is_asked(served, inside, capsys):
    run_page(SERVED, {}, served)
    assert capsys.readouterr().out
    asked = [(block, words) for block, words in commands(SERVED) if words[0] == "curl"]
    for block, words in asked:
        local = [replaced(word, served) for word in words]
        answer = subprocess.run(local, capture_output=True, check=True).stdout.decode()
        expected = answer if block.kind == "console" else "choices"
        assert expected in (block.text if block.kind == "console" else json.loads(answer))


# Commands


def read_depthmix(words):
    """Read a command line as its command does; raise what it would print."""
    name, *rest = words
    if name == "info":
        assert main(words) == 0
        return
    if name == "train":
        parse_train(rest)
        return
    parser = importlib.import_module(f"depthmix.commands.{name}")._parser()
    if name in ("calibrate", "probe"):  # whose further options are those of train
        _, further = parser.parse_with_train_options(rest)
        parse_train(["run.yaml", *further])
        return
    engine = rest.index("--") if "--" in rest else len(rest)
    arguments = parser.parse_args(rest[:engine])
    if name == "compare":
        read_experiment(arguments.experiment)


def read_accelerate(words):
    """Read what accelerate starts; its configuration must be there."""
    arguments = launch_command_parser().parse_args(words[1:])
    assert (ROOT / arguments.config_file).exists()
    assert (arguments.module, arguments.training_script) == (True, "depthmix")
    read_depthmix(arguments.training_script_args)


def read_script(words):
    """See that a script is there, and that it has the options."""
    script = (ROOT / words[0]).read_text("utf-8")
    unknown = [word for word in words if word.startswith("--") and f'"{word}"' not in script]
    assert unknown == []


READERS = {"depthmix": read_depthmix, "accelerate": read_accelerate, "python": read_script}


@pytest.mark.parametrize(
    ("block", "words"),
    [pytest.param(block, words, id=f"{block}-{words[0]}") for block, words in commands(*PAGES)],
)
def test_a_command_line_is_understood(block, words, hub, inside):
    program, *rest = words
    assert "..." not in rest, "nobody can type that"
    if (block.page, program) == (SERVED, "curl"):  # asked above
        return
    if program not in LEFT_OUT:
        READERS[program]([replaced(word, hub) for word in rest])


# Experiments


@pytest.mark.parametrize("block", blocks(*PAGES, kinds=("yaml",)), ids=str)
def test_an_experiment_is_ready_to_run(block, workplace, hub, inside):
    """Read and checked as `compare` does before its first run; a part is added to the whole."""
    whole = yaml.safe_load((workplace / "experiment.yaml").read_text())
    path = workplace / "checked.yaml"
    both = whole | yaml.safe_load(replaced(block.text, hub))
    path.write_text(yaml.safe_dump(both, sort_keys=False))
    prepare(read_experiment(path))
