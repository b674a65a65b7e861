"""The former place of `depthmix.pretrained`, for code that imports from here."""

from depthmix.pretrained import load_base, load_saved, load_tokenizer, load_tuned

__all__ = ["load_base", "load_saved", "load_tokenizer", "load_tuned"]
