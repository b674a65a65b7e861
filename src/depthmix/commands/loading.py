"""The former place of loading, for code that imports from here."""

from depthmix.inference.loading import load_tuned
from depthmix.pretrained import load_base, load_saved, load_tokenizer

__all__ = ["load_base", "load_saved", "load_tokenizer", "load_tuned"]
