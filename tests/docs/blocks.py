"""The blocks of code in the documentation."""

import shlex
from typing import NamedTuple

from processes import ROOT


OTHER_PAGES = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "deepspeed_configs/README.md")
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / name for name in OTHER_PAGES)]


class Block(NamedTuple):
    """A fenced block, with the page and the line where its text begins."""

    page: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def find_blocks() -> list[Block]:
    """All blocks, in the order of the pages."""
    blocks = []
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines(keepends=True)
        fences = [number for number, line in enumerate(lines) if line.startswith("```")]
        assert len(fences) % 2 == 0, f"{page} has a block that does not end"
        for start, end in zip(fences[::2], fences[1::2], strict=True):
            language, text = lines[start].strip("`\n"), "".join(lines[start + 1 : end])
            blocks.append(Block(page.relative_to(ROOT).as_posix(), start + 2, language, text))
    return blocks


BLOCKS = find_blocks()


def commands(block: Block) -> list[list[str]]:
    """The words of each command in a block of `bash`, or behind the prompts of one of `console`."""
    text = block.text.replace("\\\n", " ")
    if block.language == "console":
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    found = []
    for line in text.splitlines():
        command: list[str] = []
        for word in [*_words(line), ";"]:
            if word in (";", "&&", "&", "|"):
                found.append(command)
                command = []
            elif not (word in ("do", "done") and not command):
                command.append(word)
    return [command for command in found if command and command[0] not in ("for", "export")]


def _words(line: str) -> list[str]:
    """The words of a line, with `;`, `&`, `&&` and `|` as words of their own where they stand alone."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    return list(lexer)
