"""The router's weights in one chart of the real TensorBoard and of the real trackio."""

import uuid

import pytest
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import depthmix
from models import tiny_model, token_ids

STEPS = 3

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")


def train(folder, report_to, k=2, **options):
    """Train a tiny model by an unmodified Trainer."""
    model = depthmix.attach(tiny_model("llama"), depthmix.MoDEConfig(k=k))
    ids = token_ids(8, 9).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=STEPS,
        save_strategy="no",
        report_to=report_to,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    Trainer(model, arguments, train_dataset=rows, eval_dataset=rows).train()


@pytest.fixture
def events(tmp_path, monkeypatch):
    """Train, and read what TensorBoard finds."""
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))

    def read(k):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        train(tmp_path / "out", "tensorboard", k)
        return EventAccumulator(str(tmp_path / "events")).Reload()

    return read


def test_tensorboard_draws_all_late_layers_in_one_chart(events):
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    found = events(k=2)
    content = found.Tensors(metadata.CONFIG_SUMMARY_TAG)[0].tensor_proto.string_val[0]
    (category,) = layout_pb2.Layout.FromString(content).category
    assert category.title == "MoDE"
    logged = found.Tags()["scalars"]
    for chart, of in zip(category.chart, ("train", "eval"), strict=True):
        tags = list(chart.multiline.tag)
        assert tags == [f"{of}/router_weight/layer_{layer}" for layer in (2, 3)]
        assert set(tags) <= set(logged)
    weights = [found.Scalars(f"train/router_weight/layer_{n}") for n in (2, 3)]
    assert [event.step for event in weights[0]] == [1, 2, 3]
    assert weights[0][0].value + weights[1][0].value == pytest.approx(1, abs=1e-5)


def test_tensorboard_has_no_chart_without_a_mixture(events):
    from tensorboard.plugins.custom_scalar import metadata

    assert metadata.CONFIG_SUMMARY_TAG not in events(k=1).Tags()["tensors"]


@pytest.mark.optional
@pytest.mark.filterwarnings("ignore")  # its own and those of its web server
def test_trackio_draws_bars_by_layer(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    # Where trackio was imported before, it has another folder, with what earlier tests left.
    project = f"routing-{uuid.uuid4()}"
    train(tmp_path / "out", "trackio", project=project, run_name="one")
    entries = SQLiteStorage.get_logs(project, "one")
    bars = [e["train/router_weights"] for e in entries if "train/router_weights" in e]
    assert len(bars) == STEPS
    assert bars[0]["bins"] == [1.5, 2.5, 3.5]
    weights = [e["train/router_weight/layer_3"] for e in entries if "train/router_weights" in e]
    assert [bar["values"][1] for bar in bars] == pytest.approx(weights)
    assert any("eval/router_weights" in entry for entry in entries)
