"""The pages of the API reference: one for each package, a section for each public module, all from docstrings.

The pages are written into docs/api/generated when a build begins, so a new module is there without being listed.
Docstrings are written in plain Markdown habits (`name`, |x|, a * b); `as_rst` turns these into what autodoc reads.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
PACKAGE = DOCS.parent / "mmpeft_ds"
# Of a folder that is one component, what is called from outside; its layers are read in the source.
COMPONENTS = {"methods", "backbones", "tasks"}
OUTSIDE = {"config", "options", "backbone", "method", "task"}
# Code spans stay together; outside them these characters would be markup in reStructuredText.
SPAN = re.compile(r"(``.+?``|(?<![`\w:])`[^`]+`(?!`))", re.DOTALL)
COLUMNS = re.compile(r"\S {3,}\S")
MARKUP = re.compile(r"([|*])|(?<=\w)(_)(?!\w)")


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("builder-inited", lambda _: write(DOCS / "api" / "generated"))
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon, at 500
    return {"version": "1", "parallel_read_safe": True}


def write(folder: Path) -> None:
    """One .rst for each package below mmpeft_ds; a page that has not changed is not touched."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {name: page(name, modules) for name, modules in packages().items()}
    for stale in {p.stem for p in folder.glob("*.rst")} - pages.keys():
        (folder / f"{stale}.rst").unlink()
    for name, text in pages.items():
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")


def packages() -> dict[str, list[str]]:
    """Page -> its public modules. Folders of one component stand on the page of their kind."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not parts or any(p.startswith("_") for p in parts) or not _is_shown(parts) or not _has_text(path):
            continue
        top = ".".join(["mmpeft_ds", *(parts[:2] if parts[0] == "engine" and len(parts) > 2 else parts[:1])])
        is_page = (PACKAGE / parts[0]).is_dir()
        found.setdefault(top if is_page else "mmpeft_ds", []).append(".".join(["mmpeft_ds", *parts]))
    return found


def page(name: str, modules: list[str]) -> str:
    """reStructuredText of a page: the package itself, then its modules under their names inside the package."""
    lines = [name, "=" * len(name), ""]
    for module in modules:
        if module != name:
            title = module.removeprefix(f"{name}.")
            lines += [title, "-" * len(title), ""]
        lines += [f".. automodule:: {module}", ""]
    return "\n".join(lines)


def as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Markdown habits of a docstring as reStructuredText, in place."""
    written: list[str] = []
    for is_block, part in _blocks(_indented_listings(list(lines))):
        written += ["::", "", *part, ""] if is_block else _prose("\n".join(part)).split("\n")
    lines[:] = written


def _indented_listings(lines: list[str]) -> list[str]:
    """Paragraphs with columns, words apart by three spaces or more, are moved in, so that they count as listings."""
    paragraphs = "\n".join(lines).split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        if i and not paragraph.startswith(" ") and COLUMNS.search(paragraph):
            paragraphs[i] = "\n".join(f"    {line}" for line in paragraph.split("\n"))
    return "\n\n".join(paragraphs).split("\n")


def _blocks(lines: list[str]) -> list[tuple[bool, list[str]]]:
    """(is it preformatted, lines): an indented paragraph below one that is not indented is a formula or a listing."""
    parts: list[tuple[bool, list[str]]] = [(False, [])]
    above, inside = "", False
    for i, line in enumerate(lines):
        starts = bool(line.startswith("    ") and i and not lines[i - 1].strip() and above and above[0] != " ")
        if starts and not inside:
            parts.append((True, []))
        elif inside and line.strip() and not line.startswith("    "):
            parts.append((False, []))
        inside = parts[-1][0]
        parts[-1][1].append(line)
        above = line if line.strip() else above
    return parts


def _prose(text: str) -> str:
    """Single backticks become code; outside them, characters that would be markup are taken as they stand."""
    parts = SPAN.split(text)
    for i, part in enumerate(parts):
        if i % 2 and not part.startswith("``"):
            parts[i] = _over_lines(part) if "\n" in part else f"``{' '.join(part[1:-1].split())}``"
            if parts[i + 1][:1].isalnum():
                parts[i] += "\\ "  # the end of a plural, as in `name`s
        elif not i % 2:
            parts[i] = MARKUP.sub(lambda m: "\\" + m.group(0), part)
    return "".join(parts)


def _over_lines(span: str) -> str:
    """A code span that runs over a line break: two spans, so that the indentation stays."""
    first, _, rest = span[1:-1].partition("\n")
    indent = rest[: len(rest) - len(rest.lstrip())]
    return f"``{first.strip()}``\n{indent}``{rest.strip()}``"


def _is_shown(parts: tuple[str, ...]) -> bool:
    inside = len(parts) > 2 and parts[0] in COMPONENTS and parts[1] != "common"
    return parts[:2] != ("sites", "families") and (not inside or parts[2] in OUTSIDE)


def _has_text(path: Path) -> bool:
    return bool(ast.get_docstring(ast.parse(path.read_text("utf-8"))))
