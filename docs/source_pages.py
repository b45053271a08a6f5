"""Pages of the repository's own files, so that what the documents link to can be read beside them, without a network.

MkDocs calls this (hooks in mkdocs.yml). A link to a file outside docs/, such as `../learner/ppo.py`, leads to a page with that
file; where its words name a function (`learner/ppo.py::gae`), to the line where it begins.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "source/"
"""Below it the pages of files lie."""
HEAD = "---\nsearch:\n  exclude: true\nhide: [toc]\n---\n"
"""Of each: nobody who looks for a word looks for it in there, and lines of code are long."""
LINK = re.compile(r"\[(?P<words>[^\]]*)\]\((?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
NAMED = re.compile(r'(href="[^"#]*\.py\.html)("><code>([^<:]+)::([\w.]+)</code>)')
"""A link to a listing whose words name what is meant."""


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file that a document links to, and for those that such a page links to."""
    waiting = list(files.documentation_pages())
    while waiting:
        page = waiting.pop()
        for found in LINK.finditer(page.content_string):
            path = outside(page.src_uri, found["target"])
            if path is None or files.get_file_from_path(place(path)) is not None:
                continue
            made = File.generated(config, place(path), content=content(path))
            files.append(made)
            if path.endswith(".md"):
                waiting.append(made)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The links that lead outside docs/, turned to the pages of what they name."""

    def turned(found: re.Match[str]) -> str:
        path = outside(page.file.src_uri, found["target"])
        if path is None:
            return found[0]
        here = posixpath.dirname(page.file.src_uri)
        return f"[{found['words']}]({posixpath.relpath(place(path), here or '.')}{found['anchor'] or ''})"

    return markdown if page.file.src_uri.endswith(".py.md") else LINK.sub(turned, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """The lines that links mean. Only now, because MkDocs looks for anchors where the listings are not written yet."""
    return NAMED.sub(lambda found: f"{found[1]}#__codelineno-0-{line_of(found[3], found[4])}{found[2]}", html)


def outside(source: str, target: str) -> str | None:
    """The repository's file that a link on a page means, where it is none of docs/; None where there is no such file."""
    origin = source.removeprefix(SOURCE) if source.startswith(SOURCE) else f"docs/{source}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
    return None if path.startswith(("docs/", "..")) or not (ROOT / path).is_file() else path


def place(path: str) -> str:
    """Where the page of a file lies: Markdown and pictures as they are, everything else as a listing."""
    return SOURCE + (path if path.endswith((".md", ".svg")) else f"{path}.md")


def content(path: str) -> str:
    text = (ROOT / path).read_text("utf-8")
    if path.endswith(".svg"):
        return text
    if path.endswith(".md"):
        return f"{HEAD}{text}"
    language = {"py": "python", "yml": "yaml"}.get(path.rpartition(".")[2], path.rpartition(".")[2])
    return f'{HEAD}# {path}\n\n`````{language} linenums="1"\n{text.rstrip()}\n`````\n'


def line_of(path: str, name: str) -> int:
    """The line where a function, class or constant of a Python file begins; `Class.method` too. Raises LookupError."""
    body: list[ast.stmt] = ast.parse((ROOT / path).read_text("utf-8")).body
    line = 0
    for step in name.split("."):
        [found] = [node for node in body if step in names(node)] or [None]
        if found is None:
            raise LookupError(f"{path} has no {name}")
        line, body = found.lineno, getattr(found, "body", [])
    return line


def names(node: ast.stmt) -> set[str]:
    """What a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}
