"""The modelling code of an exported folder: `modeling.py` with the names of the model's classes."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

import depthmix
from depthmix.errors import ConfigError

MODULE = "modeling_depthmix"
_TEMPLATE = Path(__file__).with_name("modeling.py")  # is the code for Llama
_IMPORT = "from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel"
# Where the causal model calls not its trunk but a part of it (OPT, BART), that part mixes, and the
# trunk has a class that holds it.
_HOLDER = '''
class DepthMix{cls}({cls}):
    """{cls} around the model without its head."""

    _keep_in_fp32_modules_strict = {{"depthmix"}}

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say no, or transformers leaves buffers unset that {cls} computes."""
        return False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.{name} = DepthMix{inner}(config)
        self.post_init()

'''


@dataclass(frozen=True)
class Names:
    """What differs between the codes of two models.

    Attributes:
        imports: lines that import the classes.
        host: class of the causal model.
        path: of attributes from it to the model without its head: `model`, or `model.decoder`.
        classes: of what is on that path.
    """

    imports: str
    host: str
    path: tuple[str, ...]
    classes: tuple[str, ...]

    @classmethod
    def of(cls, host: nn.Module, path: str) -> Names:
        """Return the names for a model.

        Args:
            host: the causal model.
            path: where the model without its head is in it.

        Raises:
            ConfigError: a class is none of transformers.
        """
        places = path.split(".")
        modules = [host.get_submodule(".".join(places[:n])) for n in range(1, len(places) + 1)]
        found = [type(host), *map(type, reversed(modules))]
        for other in found:
            if not other.__module__.startswith("transformers."):
                raise ConfigError(
                    f"{other.__name__} is no class of transformers: its code is not there"
                )
        files = {other.__module__: "" for other in found}
        for file in files:
            files[file] = ", ".join(o.__name__ for o in found if o.__module__ == file)
        imports = "\n".join(f"from {file} import {names}" for file, names in files.items())
        names = tuple(o.__name__ for o in reversed(found[1:]))
        return cls(imports, found[0].__name__, tuple(places), names)

    @classmethod
    def read(cls, code: str) -> Names | None:
        """Return those in a file of modelling code; None where it is not of our making."""
        imports = re.findall(r"^from transformers\.[\w.]+ import [\w, ]+$", code, re.MULTILINE)
        places = re.findall(r"^        self\.(\w+) = DepthMix\w+\(config\)$", code, re.MULTILINE)
        found = re.findall(r"^class DepthMix(\w+)\(\1\):$", code, re.MULTILINE)
        if len(found) < 2 or len(places) != len(found) - 1:
            return None
        inner, *holder, host = found
        path = [*reversed(places)] if holder else places
        return cls("\n".join(imports), host, tuple(path), (*holder, inner))

    @property
    def auto_map(self) -> dict[str, str]:
        """What `config.json` says of the classes."""
        return {
            "AutoModel": f"{MODULE}.DepthMix{self.classes[0]}",
            "AutoModelForCausalLM": f"{MODULE}.DepthMix{self.host}",
        }

    @cached_property
    def code(self) -> str:
        """The file."""
        names = {"LlamaForCausalLM": self.host, "LlamaModel": self.classes[-1]}
        before, _, after = _TEMPLATE.read_text("utf-8").partition(_IMPORT)
        # Not one after the other, nor in the imports: a name may be part of another one.
        before, after = (
            re.sub("|".join(names), lambda found: names[found[0]], part) for part in (before, after)
        )
        text = f"{before.replace('VERSION', depthmix.__version__)}{self.imports}{after}"
        trunk = f"self.{self.path[0]} = DepthMix{self.classes[0]}("
        text = text.replace(f"self.model = DepthMix{self.classes[-1]}(", trunk)
        if len(self.path) == 1:
            return text
        outer, inner = self.classes
        holder = _HOLDER.format(cls=outer, name=self.path[1], inner=inner)
        before, mark, after = text.partition(f"\nclass DepthMix{self.host}(")
        return f"{before}{holder}{mark}{after}"


def run_code(path: Path) -> Any:
    """Run a file of modelling code and return the module."""
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_own_code(folder: Path) -> bool:
    """Whether the code in an exported folder is, to the letter, what `export_model` writes.

    Then it can be run without asking: it is code of this very package.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    path = folder / f"{MODULE}.py"
    if not path.exists():
        return False
    found = path.read_text("utf-8", errors="replace")
    names = Names.read(found)
    return names is not None and names.auto_map == config.get("auto_map") and names.code == found
