"""What the documentation site has beside the pages of this folder; a hook of MkDocs.

The start is README.md, the changes are CHANGELOG.md, and the page of the command line is what
`--help` says. A link to a file of the repository (`../configs/...`) leads to a copy of it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"\]\(((?:\.\./)+)([^)#]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made, and the files of the repository that pages link to."""
    readme = (ROOT / "README.md").read_text("utf-8")
    made = {
        "index.md": _as_pages(re.sub(r"\]\((?!https?:|docs/|#)", "](../", readme)),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text("utf-8"),
        "commands.md": _commands(),
    }
    for page in [*made.values(), *(f.content_string for f in files.documentation_pages())]:
        made |= _linked(page)
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links out of this folder to the copies in the site."""
    depth = "../" * page.file.src_uri.count("/")
    return _OUTSIDE.sub(lambda link: f"]({depth}{_place(link[2])})", markdown)


def _as_pages(text: str) -> str:
    """Return a text of the repository's root as one of this folder."""
    return text.replace("](docs/", "](")


def _linked(page: str) -> dict[str, str | bytes]:
    """Return copies of the files that a page links to, and a list for a folder."""
    copies: dict[str, str | bytes] = {}
    for link in _OUTSIDE.finditer(page):
        path = ROOT / link[2]
        if path.is_dir():
            copies |= _folder(link[2].rstrip("/"))
        elif path.is_file() and path.name not in ("README.md", "CHANGELOG.md"):
            copies[_place(link[2])] = path.read_bytes()
    return copies


def _folder(name: str) -> dict[str, str | bytes]:
    """Return copies of the files of a folder, with a list of them unless it has a page already."""
    files = sorted(path for path in (ROOT / name).iterdir() if path.is_file())
    copies: dict[str, str | bytes] = {f"{name}/{path.name}": path.read_bytes() for path in files}
    if f"{name}/README.md" not in copies:
        lines = "\n".join(f"- [{path.name}]({path.name})" for path in files)
        copies[f"{name}/index.md"] = f"# {name}\n\n{lines}\n"
    return copies


def _place(target: str) -> str:
    """Return where the site has a file or a folder of the repository."""
    named = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
    if not (ROOT / target).is_dir():
        return named.get(target, target)
    page = "README.md" if (ROOT / target / "README.md").exists() else "index.md"
    return f"{target.rstrip('/')}/{page}"


def _commands() -> str:
    """Return the help of every command, as it is printed."""
    from depthmix.cli import COMMANDS, main

    os.environ["COLUMNS"] = "88"
    parts = ["# Command line\n", _block("depthmix --help", _printed(main, "--help"))]
    for name, summary in COMMANDS.items():
        printed = _printed(main, name, "--help")
        parts += [
            f"\n## depthmix {name}\n\n{summary[0].upper() + summary[1:]}.\n",
            _block(f"depthmix {name} --help", printed),
        ]
    return "\n".join(parts)


def _printed(main: Any, *argv: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        main(list(argv))
    return output.getvalue()


def _block(command: str, text: str) -> str:
    return f"```text\n$ {command}\n{text.rstrip()}\n```\n"
