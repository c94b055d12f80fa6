"""
Docstrings of this package, in Hugging Face's style, as reStructuredText for the site.

They are Markdown with sections (`Args:`, `Returns:`, `Raises:`, `Attributes:`) whose entries are indented:

    name (`type`, *optional*, defaults to `value`):
        Text, also on the line of the name.

A name in brackets and code marks is a link if the site documents it, else code.
"""

import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Any


SECTIONS = {
    "Args": "Arguments",
    "Parameters": "Parameters",
    "Attributes": "Attributes",
    "Returns": "Returns",
    "Raises": "Raises",
    "Yields": "Yields",
}
# Their fields are the documentation, and a signature of two hundred of them is none.
NO_SIGNATURE = ("RLoraConfig", "RLoraSFTConfig")


@cache
def documented() -> dict[str, str]:
    """The full names on the page of the API, by their last part."""
    page = (Path(__file__).parent / "api.md").read_text(encoding="utf-8")
    names = re.findall(r"^\.\. auto\w+:: (\S+)", page, re.MULTILINE)
    return {name.rpartition(".")[2]: name for name in names}


def convert(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's hook: replaces the lines of a docstring."""
    lines[:] = to_rst("\n".join(lines)).splitlines()


def shorten_signature(app: Any, what: str, name: str, *_: Any) -> tuple[str, str] | None:
    """Sphinx's hook: no signature for configurations."""
    return ("", "") if name.rpartition(".")[2] in NO_SIGNATURE else None


def to_rst(text: str) -> str:
    """A docstring, without its indentation, as reStructuredText."""
    parts, section, body = [], None, []
    for line in [*text.splitlines(), "End:"]:
        heading = line.rstrip().removesuffix(":")
        if line.rstrip().endswith(":") and (heading in SECTIONS or line == "End:"):
            parts.append(_section(section, body) if section else _prose(body))
            section, body = heading, []
        elif section and line.strip() and not line.startswith(" "):  # prose behind the last section
            parts.append(_section(section, body))
            section, body = None, [line]
        else:
            body.append(line)
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, body: list[str]) -> str:
    """A section as a list; headings between entries (`> ...`) are left out."""
    entries: list[list[str]] = []
    for line in textwrap.dedent("\n".join(body)).splitlines():
        if not line.strip() or line.startswith(">"):
            continue
        if line.startswith(" ") and entries:
            entries[-1].append(line)
        else:
            entries.append([line])
    return f":{SECTIONS[title]}:\n" + textwrap.indent("\n".join(map(_entry, entries)), "   ")


def _entry(lines: list[str]) -> str:
    head, text = _split(lines[0])
    rest = textwrap.dedent("\n".join(lines[1:]))
    if not head:
        return "- " + textwrap.indent(_prose([text, *rest.splitlines()]), "  ").lstrip()
    head = re.sub(r"(?<![^ ])(\w+)(?= \(|,|$)(?![^(]*\))", r"`\1`", head)
    text = _prose([line for line in (text, *rest.splitlines()) if line])
    return f"- {_inline(head)}: " + textwrap.indent(text, "  ").lstrip()


def _split(line: str) -> tuple[str, str]:
    """The names and types of an entry, and its text: at the first colon outside of parentheses and code."""
    depth, code = 0, False
    for index, letter in enumerate(line):
        if letter == "`":
            code = not code
        elif not code and letter in "([":
            depth += 1
        elif not code and letter in ")]":
            depth -= 1
        elif letter == ":" and not depth and not code:
            return line[:index], line[index + 1 :].strip()
    return "", line


def _prose(lines: list[str]) -> str:
    """Paragraphs, lists, blocks of code and notes."""
    out: list[str] = []
    index = 0
    while index < len(lines):
        line = lines[index]
        end = index + 1
        if line.startswith("```"):
            end = next(number for number in range(end, len(lines)) if lines[number].startswith("```")) + 1
            out += ["", f".. code-block:: {line[3:] or 'none'}", "", *_indented(lines[index + 1 : end - 1]), ""]
        elif line.startswith(">"):
            while end < len(lines) and lines[end].startswith(">"):
                end += 1
            quoted = [quote.removeprefix(">").removeprefix(" ") for quote in lines[index:end]]
            kind = re.fullmatch(r"\[!(\w+)\]", quoted[0])
            body = _prose(quoted[1:] if kind else quoted).splitlines()
            out += ["", f".. {kind[1].lower()}::" if kind else "..", "", *_indented(body), ""]
        elif line.startswith("    ") and (not out or not out[-1].strip()) and not _in_list(out):
            while end < len(lines) and (not lines[end].strip() or lines[end].startswith("    ")):
                end += 1
            out += ["", "::", "", *lines[index:end], ""]
        elif not line.strip():
            out.append("")
        else:
            while end < len(lines) and lines[end].strip() and not lines[end].startswith((">", "```", "- ")):
                end += 1
            item = line.startswith("- ")
            if item and out and out[-1].strip() and not _in_list(out):
                out.append("")
            out += _inline("\n".join(lines[index:end])).splitlines()
        index = end
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip("\n")


def _in_list(out: list[str]) -> bool:
    """Whether the last paragraph belongs to a list."""
    last = next((line for line in reversed(out) if line.strip()), "")
    return last.startswith(("- ", "  "))


def _indented(lines: list[str]) -> list[str]:
    return textwrap.indent("\n".join(lines), "   ").splitlines()


def _inline(text: str) -> str:
    """Links, names and code within a paragraph."""

    def replace(found: re.Match[str]) -> str:
        if found["name"]:
            last = found["name"].removeprefix("~").rpartition(".")[2]
            full = documented().get(last)
            return f":py:obj:`{found['name']} <{full}>`" if full else f"``{found['name']}``"
        if found["url"]:
            return f"`{' '.join(found['label'].split())} <{found['url']}>`__"
        return f"``{found['code']}``"

    pattern = r"\[`(?P<name>[\w.~]+)`\]|\[(?P<label>[^\]`]+)\]\((?P<url>https?:[^)\s]+)\)|`(?P<code>[^`]+)`"
    pieces, position = [], 0
    for found in re.finditer(pattern, text):
        pieces += [_escaped(text[position : found.start()]), _spaced(text, found, replace(found))]
        position = found.end()
    return "".join(pieces) + _escaped(text[position:])


def _escaped(text: str) -> str:
    """Text without accidental markup: `*` is emphasis around words only, and `name_` is no reference."""
    text = re.sub(r"(\w)_(?!\w)", r"\1\\_", text)
    return re.sub(r"(\*\w[^*]*\*)|\*", lambda found: found[1] or r"\*", text)


def _spaced(text: str, found: re.Match[str], replacement: str) -> str:
    """Markup that touches a word needs an escaped space."""
    before = "\\ " if found.start() and re.match(r"\w", text[found.start() - 1]) else ""
    after = "\\ " if found.end() < len(text) and re.match(r"\w", text[found.end()]) else ""
    return before + replacement + after
