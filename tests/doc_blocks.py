"""The code blocks of README.md and of docs/, as CommonMark has them, and the commands in them."""

import re
import shlex
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
PAGES.insert(0, "README.md")


@dataclass(frozen=True)
class Block:
    """A block of code; `kind` is the word behind the fence, empty where there is none."""

    page: str
    line: int
    kind: str
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"

    def run(self, names, local=None):
        """Execute Python with these names; `local` says what stands here for names of elsewhere."""
        # Line numbers in a traceback are those of the page.
        text = "\n" * self.line + replaced(self.text, local or {})
        exec(compile(text, self.page, "exec"), names)

    def commands(self):
        """Return the command lines as lists of words, without what only the shell reads."""
        text = self.text.replace("\\\n", " ")
        if self.kind == "console":
            text = "\n".join(re.findall(r"^\$ (.*)$", text, flags=re.M))
        return [words for line in text.splitlines() for words in _piped(line)]


def blocks(*pages, kinds=()):
    """Return the blocks of these pages, of all kinds or of some."""
    found = [block for page in pages for block in _blocks(page)]
    return [block for block in found if not kinds or block.kind in kinds]


def commands(*pages):
    """Return the pairs (block, words) of all command lines of these pages."""
    shells = blocks(*pages, kinds=("bash", "console"))
    return [(block, words) for block in shells for words in block.commands()]


def replaced(text, by):
    """Return a text with each key of a mapping replaced by its value."""
    for name, value in by.items():
        text = text.replace(name, value)
    return text


def _blocks(page):
    for token in MarkdownIt().parse((ROOT / page).read_text("utf-8")):
        if token.type in ("fence", "code_block"):
            yield Block(page, token.map[0] + 1, token.info.strip(), token.content)


def _piped(line):
    """Return the commands of a line, which pipes join."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|>")
    lexer.whitespace_split = True
    words = iter(lexer)
    while command := list(takewhile(lambda word: word != "|", words)):
        named = dropwhile(lambda word: re.match(r"[A-Z]+=", word), command)
        yield list(takewhile(lambda word: word != ">", named))
