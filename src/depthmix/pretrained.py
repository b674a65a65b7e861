"""Base models, tokenizers and saved runs, loaded; what goes wrong is one clear error."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from depthmix.carry.saved_run import Holds, SavedRun
from depthmix.errors import CheckpointError, ConfigError, DepthmixError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from depthmix.config import MoDEConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Loading:
    """How a base model is loaded. None: as the record of the run says, or as transformers does.

    Attributes:
        revision: branch, tag or commit on the hub.
        trust_remote_code: run modelling code that comes with the weights.
        dtype: name of a torch dtype, or auto for that of the files.
        load_in_4bit: quantise by bitsandbytes while loading; False: not, whatever the record says.
        quantization: options of bitsandbytes, as recorded.
    """

    revision: str | None = None
    trust_remote_code: bool | None = None
    dtype: str | None = None
    load_in_4bit: bool | None = None
    quantization: dict[str, Any] | None = None

    def or_as_recorded(self, base: dict[str, Any], same_base: bool) -> Loading:
        """Fill in what is None from a record (`RunRecord.base`).

        Revision and trust are those of one repository: another base takes neither over.
        """
        at = base if same_base else {}
        trust = self.trust_remote_code
        return Loading(
            self.revision or at.get("revision"),
            at.get("trust_remote_code") if trust is None else trust,
            self.dtype or base.get("dtype"),
            self.load_in_4bit,
            base.get("quantization") if self.load_in_4bit is None else None,
        )

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `from_pretrained`."""
        given: dict[str, Any] = {"trust_remote_code": bool(self.trust_remote_code)}
        if self.revision:
            given["revision"] = self.revision
        if self.dtype:
            given["dtype"] = self.dtype
        quantization = self._quantization()
        if quantization:
            from transformers import BitsAndBytesConfig

            config = BitsAndBytesConfig.from_dict(quantization)
            given |= {"quantization_config": config, "device_map": {"": _device()}}
        return given

    def _quantization(self) -> dict[str, Any] | None:
        if self.load_in_4bit:
            compute = self.dtype if self.dtype not in (None, "auto") else "bfloat16"
            return {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": compute,
            }
        return self.quantization


def load_base(name: str, **options: Any) -> Any:
    """Load a causal language model from a folder or the hub, to be tuned or measured.

    Args:
        name: folder or hub name.
        options: passed on to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        CheckpointError: there is an adapter or an export, which would lose MoDE here, or nothing.
    """
    run = SavedRun.find(name, options.get("revision"))
    require_no_adapter(run)
    if run.holds is Holds.EXPORT:
        raise CheckpointError(f"{name}: an exported model, which is for inference alone")
    if run.has_mode:
        raise CheckpointError(
            f"{name}: holds a model with MoDE, where a base model is asked for; as one it would "
            "lose MoDE"
        )
    return _load_model(name, **options)


def require_no_adapter(run: SavedRun) -> None:
    """Raise `CheckpointError` for an adapter where a base model is asked for, with its own."""
    if run.holds is Holds.ADAPTER:
        raise CheckpointError(
            f"{run.name}: holds an adapter, where a base model is asked for; its own is {run.base}"
        )


def _load_model(name: str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return _found("model", name, lambda: AutoModelForCausalLM.from_pretrained(name, **options))


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model from a folder or the hub.

    Raises:
        CheckpointError: there is no model.
    """
    from transformers import AutoTokenizer

    SavedRun.find(name, options.get("revision"))

    return _found("tokenizer of", name, lambda: AutoTokenizer.from_pretrained(name, **options))


def load_config(name: str, **options: Any) -> PretrainedConfig:
    """Load the configuration of a model from a folder or the hub.

    Raises:
        DepthmixError: it cannot be loaded.
    """
    from transformers import AutoConfig

    def load() -> PretrainedConfig:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, **options)
        return config

    return _found("configuration of", name, load)


def load_saved(
    run: SavedRun,
    base: str | None = None,
    loading: Loading | None = None,
    is_trainable: bool = False,
    calibrated: bool = True,
) -> Any:
    """Load what a name holds: a base model as it is, or a tuned one with all it was tuned with.

    With the temperature that was fitted to it, if one was (`depthmix calibrate`).

    Args:
        run: what there is.
        base: base model of an adapter, where it is not the one that the adapter names.
        loading: overrules what the run has recorded.
        is_trainable: give an adapter gradients.
        calibrated: False leaves the temperature out.

    Raises:
        CheckpointError: it does not fit its base model, or a file is broken.
        ConfigError: `base` is given for a model that is whole.
    """
    model = _load_saved(run, base, loading, is_trainable)
    if calibrated:
        from depthmix.model.temperature import set_temperature

        set_temperature(model, run.temperature)
    return model


def _load_saved(
    run: SavedRun, base: str | None, loading: Loading | None, is_trainable: bool
) -> Any:
    if run.holds is not Holds.ADAPTER and base:
        raise ConfigError(f"--model: {run.name} holds a whole model, not an adapter")
    options = _loading(run, base, loading).options()
    if run.holds is Holds.ADAPTER:
        _require_safe(run)
        if base is None:
            _require_base(run)
        return with_adapter(load_base(base or run.base, **options), run, is_trainable)
    if run.holds is Holds.EXPORT:
        return _exported(run, options)
    where, revision = _place(run)
    model = _load_model(where, **{**options, "revision": revision or "main"})
    if not run.has_mode:
        return model
    import depthmix

    return depthmix.load(model, run.folder, is_trainable=is_trainable)


def load_tokenizer_of(
    run: SavedRun, base: str | None = None, loading: Loading | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved with a model, or that of its base."""
    options = _loading(run, base, loading).options()
    trust = options["trust_remote_code"]
    if run.holds is not Holds.ADAPTER:
        where, revision = _place(run)
    elif (run.folder / "tokenizer_config.json").exists():
        where, revision = str(run.folder), None
    else:
        where, revision = base or run.base, options.get("revision")
    return load_tokenizer(where, trust_remote_code=trust, revision=revision or "main")


def _place(run: SavedRun) -> tuple[str, str | None]:
    """Return where `from_pretrained` finds a run, and at which revision."""
    return (run.repository, run.commit) if run.commit else (str(run.folder), None)


def to_device(model: Any) -> Any:
    """Move a model to the accelerator, where there is one, for inference."""
    quantised = getattr(model, "is_quantized", False) or hasattr(model, "hf_quantizer")
    return (model if quantised else model.to(_device())).eval()


def _device() -> Any:
    import torch

    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _loading(run: SavedRun, base: str | None, loading: Loading | None) -> Loading:
    recorded = run.record.base
    if run.commit:  # what a stranger wrote down is no permission to run code
        recorded = {name: v for name, v in recorded.items() if name != "trust_remote_code"}
    if run.holds is not Holds.ADAPTER:  # the weights lie here, not where they came from
        recorded = {name: v for name, v in recorded.items() if name != "revision"}
    same_base = base is None or base == recorded.get("name")
    return (loading or Loading()).or_as_recorded(recorded, same_base)


def _require_safe(run: SavedRun) -> None:
    """Refuse an adapter that lies there as a pickle alone, or as half a file."""
    if not run.weight_files:
        raise CheckpointError(f"{run.name}: the adapter has no safetensors file")
    _ = run.has_mode  # opens every file


def _require_base(run: SavedRun) -> None:
    """Refuse an adapter whose base was a folder that is not there (any more, or from here)."""
    recorded = run.record.base
    was_local = recorded.get("local") and recorded.get("name") == run.base
    if was_local and not Path(run.base).is_dir():
        raise CheckpointError(
            f"{run.name}: its base model was the folder {run.base}, which is not there: give it "
            "with --model"
        )


def with_adapter(
    model: Any, run: SavedRun, is_trainable: bool, config: MoDEConfig | None = None
) -> Any:
    """Put a saved adapter on its base model.

    Args:
        model: the base model.
        run: where the adapter lies.
        is_trainable: give it gradients.
        config: of MoDE, where its loss is to be another one than before.

    Raises:
        CheckpointError: it does not go onto the model.
    """
    from peft import PeftModel

    import depthmix

    try:
        if run.has_mode:
            return depthmix.load(model, run.folder, is_trainable=is_trainable, config=config)
        return PeftModel.from_pretrained(model, str(run.folder), is_trainable=is_trainable)
    except DepthmixError:
        raise
    except (ValueError, TypeError, KeyError, RuntimeError) as error:  # PEFT's and torch's
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{run.name}: the adapter does not go onto {model.config.name_or_path}: {reason}"
        ) from error


def _exported(run: SavedRun, options: dict[str, Any]) -> Any:
    """Load an exported folder by the code in it, once it is known to be ours."""
    from depthmix.export.code import is_own_code

    if not (options["trust_remote_code"] or is_own_code(run.folder)):
        raise CheckpointError(
            f"{run.name}: the modelling code in it is not what this version of depthmix writes: "
            "read it, then give --trust-remote-code"
        )
    return _load_model(str(run.folder), **{**options, "trust_remote_code": True})


def _found(what: str, name: str, load: Callable[[], T]) -> T:
    """Run `load`; say what was looked for where it fails."""
    try:
        return load()
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = str(error).replace("`trust_remote_code=True`", "--trust-remote-code")
        raise DepthmixError(f"{what} {name}: cannot be loaded: {reason}") from error


def ignore_renamed_properties() -> None:
    """Keep two notices of PEFT from the reader of a command's output.

    It asks for a property of transformers by its old name, at every model; and it says that the
    base model is another one than the adapter names, where `--model` has just said so.
    """
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was")
