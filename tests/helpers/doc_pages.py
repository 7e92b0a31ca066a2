"""Code blocks of the documentation: commands, Python and YAML, each with what it is marked to need.

A block may be marked by a comment on the line before it, `<!-- needs: hub, GPU -->`, with words of `NEEDS`. A page is
read as Markdown, so an indented block counts like a fenced one.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from tests.helpers import ROOT

# What a block may need that a test machine does not have.
NEEDS = {
    "GPU": "a GPU",
    "cluster": "several machines, Slurm, MPI or ssh",
    "hub": "weights from the hub",
    "data set": "a published data set",
    "your files": "files or runs of the reader",
    "time": "more than seconds",
    "network": "a package registry",
    "root": "rights to change the network of the machine",
    "docker": "a Docker engine",
    "lmms-eval": "lmms-eval, a package that is not installed",
}
SHELL = {"sh", "bash", "shell", "console"}
PROGRAMS = {
    "python", "deepspeed", "torchrun", "srun", "sbatch", "mpirun", "accelerate", "make", "pip", "git", "docker",
    "tensorboard", "ip", "pytest", "ssh", "kill", "ruff", "for", "printf", "cd", "export", "nvidia-smi", "jq",
}  # fmt: skip
MARK = re.compile(r"<!--\s*needs:\s*(.*?)\s*-->", re.DOTALL)
ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
ENDS = {";", "&&", "||", "|", "&"}


@dataclass(frozen=True)
class Block:
    """One code block.

    Attributes:
        page: path relative to the repository.
        line: where it begins, from 1.
        language: `sh`, `python`, `yaml` or another word; empty where the fence says nothing and no command is in it.
        needs: what it is marked to need.
    """

    page: str
    line: int
    language: str
    text: str
    needs: frozenset[str]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """README.md and every page of docs/, without what is built."""
    built = {"_build", "generated"}
    docs = (p for p in (ROOT / "docs").rglob("*.md") if not built & set(p.parts))
    return [ROOT / "README.md", *sorted(docs)]


def blocks(text: str, page: str) -> list[Block]:
    """Code blocks of a page in order."""
    found, needs = [], frozenset[str]()
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "html_block":
            words = [word.strip() for mark in MARK.findall(token.content) for word in mark.split(",")]
            needs = frozenset(words)
        elif token.type in ("fence", "code_block"):
            language = (token.info.split() or [""])[0]
            language = "sh" if language in SHELL or not language and _is_shell(token.content) else language
            found.append(Block(page, token.map[0] + 1, language, token.content, needs))
            needs = frozenset()
        elif token.nesting >= 0 and token.level == 0:
            needs = frozenset()
    return found


def inline_commands(text: str, page: str) -> list[Block]:
    """Commands in running text and tables, `python launchers/...`. They may need anything, but must be well formed."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        for child in token.children or ():
            words = child.content.split() if child.type == "code_inline" else []
            if len(words) > 1 and words[0] in PROGRAMS and any(w.endswith(".py") for w in words):
                found.append(Block(page, token.map[0] + 1, "sh", child.content, frozenset(NEEDS)))
    return found


def commands(block: Block) -> list[list[str]]:
    """Words of each command of a shell block, without leading assignments, comments and redirections."""
    lines = block.text.replace("\\\n", " ").splitlines()
    found: list[list[str]] = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        lexer.commenters = "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in ENDS:
                _keep(words, found)
                words = []
            else:
                words.append(word)
    return found


def _keep(words: list[str], found: list[list[str]]) -> None:
    while words and (ASSIGNMENT.match(words[0]) or words[0] in ("do", "env", "sudo", "$")):
        words = words[1:]
    if ">" in words:
        words = words[: words.index(">")]
    if words and words[0] not in ("done", "cd", "export", "for", "printf"):
        found.append(words)


def _is_shell(text: str) -> bool:
    """Whether a block without a language begins with a command."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    if not lines:
        return False
    words = lines[0].removeprefix("$ ").split()
    while words and ASSIGNMENT.match(words[0]):
        words = words[1:]
    # "python" alone may begin a sentence of an output; a command has an argument that looks like one
    return bool(words) and words[0] in PROGRAMS
