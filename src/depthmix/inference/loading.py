"""A model ready to answer: on its device, and stopping where training ended its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from depthmix.carry.saved_run import SavedRun
from depthmix.errors import ConfigError
from depthmix.inference.form import Form, end_of_turn
from depthmix.pretrained import Loading, load_saved, load_tokenizer_of, to_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_for_use(
    run: SavedRun, form: Form, base: str | None = None, loading: Loading | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, for inference.

    Args:
        run: what is loaded.
        form: how it will be asked.
        base: base model of an adapter, where it is not the one that the adapter names.
        loading: overrules what the run has recorded.

    Raises:
        DepthmixError: something cannot be loaded, or does not fit.
    """
    tokenizer = load_tokenizer_of(run, base, loading)
    model = to_device(load_saved(run, base, loading))
    _require_whole_blocks(model)
    model.generation_config.eos_token_id = ends_of(model, tokenizer, form)
    return model, tokenizer


def load_tuned(name: str, base: str | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load what `depthmix train` saved and its tokenizer, for inference."""
    run = SavedRun.find(name)
    return load_for_use(run, Form.of(run), base)


def _require_whole_blocks(model: Any) -> None:
    """Refuse layers of 4 bits that bitsandbytes cannot repack for a CPU, as it does on new ones.

    Raises:
        ConfigError: names the layer.
    """
    for name, layer in model.named_modules():
        if not getattr(layer, "support_avx512bf16_for_cpu", False) or layer.weight.is_cuda:
            continue
        if layer.in_features % layer.weight.blocksize or layer.out_features % _REPACKED_ROWS:
            raise ConfigError(
                f"--load-in-4bit: bitsandbytes runs layers of {layer.weight.blocksize} x n inputs "
                f"and {_REPACKED_ROWS} x n outputs on this CPU, and {name} has "
                f"{layer.in_features} and {layer.out_features}: give --no-load-in-4bit"
            )


_REPACKED_ROWS = 32  # bitsandbytes.functional._convert_weight_packed_for_cpu


def ends_of(model: Any, tokenizer: PreTrainedTokenizerBase, form: Form) -> list[int] | None:
    """Return the tokens to stop at: the model's own, and what training ended rows with."""
    own = model.generation_config.eos_token_id
    ends = own if isinstance(own, list) else [own]
    ends = [*ends, tokenizer.eos_token_id]
    if form.is_chat and tokenizer.chat_template is not None:
        ends += end_of_turn(tokenizer)
    return list(dict.fromkeys(end for end in ends if end is not None)) or None
