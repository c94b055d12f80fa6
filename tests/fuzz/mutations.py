"""Random changes of valid inputs: of values, of trees as JSON and YAML hold them, and of bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any


# Text that programs, terminals, file systems or parsers treat specially.
TEXTS = (
    *("", " ", "\t", "\n", "\r", "\x00", "a\x00b", "\x1b[2J", "\x1b[8m", "\x1b]52;c;eA==\x07", "\x9b31m", "\x7f"),
    *("\u202e", "\u2066x\u2069", "\u200b", "\ufeff", "\u2028", "\ud800", "\udfff\ud800", "\U0001f600", "e\u0301"),
    *("..", ".", "../../x", "/etc/passwd", "C:\\x", "\\\\host\\x", "con", "a/", "a//b", ".git/config", "x" * 255),
    *("true", "null", "~", "1", "0x1F", "1_000", "190:20:30", "1e5", ".inf", "2024-01-01", "<<", "=", "!!int ''"),
    *("-", "---", "...", "[", "{", "|", ">", "&a", "*a", "%", "@", "`", "#", "a: b", "- a", "? a", '"', "'"),
    *("{{ 7 * 7 }}", "{% x %}", "%s%n", "$(id)", "<img src=x onerror=y>", "| a |", "](x)", "javascript:x"),
    *("os.system", "__main__", "__class__", "builtins.eval", "transformers.__loader__", "constructor"),
    *("nan", "inf", "None", "all-linear", ".*", "a|", "(", "\\", "[a", "a{99999}", "(?i)"),
)
_SIZES = (256, 257, 512, 513, 1_025, 5_000, 70_000)
NUMBERS = (
    *(0, -1, 1, 2, 3, 4, 5, 127, 128, 255, 256, 4_096, 4_097, 16_384, 16_385, 10_000, 10**6, 10**9, 10**12, 10**18),
    *(2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**63, -(10**63)),
    *(0.0, -0.0, 0.1, 0.5, 1.0, 1.5, -1.5, 1e-300, 5e-324, 1e300, -1e308, 1.7976931348623157e308),
)
# Text of JSON that Python's own values can't express.
_RAW = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "-0", "1E400", "0.1e-9999", "00", "01", "+1", "0x10", "1."),
    *("9" * 65, "9" * 5_000, "-" + "9" * 70, "1" + "0" * 400, "1." + "0" * 5_000 + "1", "'x'", "undefined", "tru", ""),
    *('"\\ud800"', '"\\x"', '"\n"', '"unterminated', "{,}", "[1,]", "{1: 2}", '{"a": 1, "a": 2}', "/* */ 1"),
)
_STAND_IN = re.compile(r"@@raw(\d{1,9})@@")
_TOKEN = re.compile(f'"{_STAND_IN.pattern}"')


def count(rng: Random, most: int, least: int = 1) -> int:
    """A number of things whose logarithm is uniform: small ones are as likely as large ones."""
    return round(least * (most / least) ** rng.random())


def rarely_many(rng: Random) -> int:
    """A number of entries; in one of a thousand inputs up to a hundred thousand, which are slow to make."""
    return count(rng, 100_000, 5_000) if rng.random() < 0.001 else count(rng, 40)


def text(rng: Random) -> str:
    """A text that is hard to treat."""
    kind = rng.random()
    if kind < 0.7:
        return rng.choice(TEXTS)
    if kind < 0.8:
        return rng.choice(("a", "\u202e", "é", "\n", " ", "../", "0", "\\")) * rng.choice(_SIZES)
    return "".join(rng.choice(TEXTS) for _ in range(rng.randrange(2, 5)))


class JsonMutator:
    """
    Changes trees of dictionaries, lists and values, and writes them as JSON.

    Args:
        rng (`Random`): The source of all choices.
        own (`Callable[[Random], Any]`, *optional*): Makes values of a kind that suits the reader.
    """

    def __init__(self, rng: Random, own: Callable[[Random], Any] | None = None) -> None:
        self.rng, self.own = rng, own
        self._raw: list[str] = []

    def raw(self, source: str) -> str:
        """A stand-in for a value, or a key, that is written as this text."""
        self._raw.append(source)
        return f"@@raw{len(self._raw) - 1}@@"

    def write(self, tree: Any) -> str:
        """The tree as JSON."""
        source = json.dumps(tree)
        return _TOKEN.sub(self._source_of, source) if self._raw else source

    def _source_of(self, match: re.Match[str]) -> str:
        index = int(match[1])
        return self._raw[index] if index < len(self._raw) else match[0]  # a stand-in that was changed itself

    def value(self) -> Any:
        """A value of any type."""
        rng = self.rng
        kind = rng.randrange(12)
        if kind < 3:
            return text(rng)
        if kind < 5:
            return rng.choice(NUMBERS)
        if kind == 5:
            return rng.choice((None, True, False, [], {}, [[]], [None], {"": None}, [1, "a"], {"a": {"b": []}}))
        if kind == 6:
            return self.raw(rng.choice(_RAW))
        if kind == 7:
            return self._deep()
        if kind == 8:
            item = rng.choice((0, "a", None, 0.5, [], {}))
            return [_copy(item) for _ in range(rarely_many(rng))]  # not one object, which a change would change often
        if kind == 9:
            return {f"k{i}": i for i in range(rarely_many(rng))}
        return self.own(rng) if self.own is not None else text(rng)

    def _deep(self) -> str:
        # 500 pass Python's limit of recursion; 100,000 would overflow the stack of a parser in C.
        depth = self.rng.choice((5, 31, 32, 33, 100, 500, 2_000, 100_000 if self.rng.random() < 0.05 else 20))
        opening, closing = self.rng.choice((("[", "]"), ('{"a":', "}"), ('[{"b":', "}]")))
        return self.raw(opening * depth + "1" + closing * depth)

    def mutate(self, tree: Any) -> Any:
        """The tree with some random changes, which are made in place."""
        holder = [tree]
        for _ in range(1 + min(int(self.rng.expovariate(0.7)), 8)):
            self._change(holder)
        return holder[0]

    def _change(self, holder: list) -> None:
        parent, key = self._choose(holder)
        rng, value = self.rng, parent[key]
        kind = rng.randrange(12)
        if kind < 5:
            parent[key] = self.value()
        elif kind == 5:
            parent[key] = self._retype(value)
        elif kind == 6 and parent is not holder:
            del parent[key]
        elif kind == 7 and isinstance(parent, dict):  # a key twice, or under another name
            parent[rng.choice((self.raw(json.dumps(key)), text(rng), rng.choice(list(parent))))] = self.value()
        elif kind == 8:  # a copy of another part of the tree
            source, name = self._choose(holder)
            if self._is_small(source[name]):
                parent[key] = _copy(source[name])
        elif kind == 9 and isinstance(value, list) and self._is_small(value):
            parent[key] = [_copy(item) for item in value * rng.randrange(1, 5)]
            rng.shuffle(parent[key])
        elif kind == 10 and isinstance(value, int | float) and not isinstance(value, bool):
            parent[key] = rng.choice((value + 1, value - 1, -value, value * 2, value * 1_000, value + 0.5))
        elif isinstance(value, dict):
            value[text(rng)] = self.value()
        elif isinstance(value, list):
            value.insert(rng.randint(0, len(value)), self.value())
        elif isinstance(value, str):
            parent[key] = change_text(rng, value)

    def _is_small(self, tree: Any) -> bool:
        """Whether a part may be copied: copies of copies would take all memory."""
        size, left = 0, [tree]
        while left and size < 50_000:
            value = left.pop()
            if isinstance(value, dict | list):
                size += len(value)
                left += value.values() if isinstance(value, dict) else value
            elif isinstance(value, str):
                match = _STAND_IN.fullmatch(value)
                size += len(self._source_of(match) if match else value)
        return not left and size < 50_000

    def _choose(self, holder: list) -> tuple[Any, Any]:
        """A place in the tree, as the list or dictionary that has it and its index or key."""
        place: tuple[Any, Any] = (holder, 0)
        while True:
            inner = place[0][place[1]]
            if not isinstance(inner, dict | list) or not inner or (self.rng.random() < 0.2 and inner is not holder[0]):
                return place
            place = (
                inner,
                self.rng.choice(list(inner)) if isinstance(inner, dict) else self.rng.randrange(len(inner)),
            )

    def _retype(self, value: Any) -> Any:
        options = [[value], {"a": value}, {"": value}, str(value)[:10_000], bool(value), None]
        if isinstance(value, list):
            options += [{str(i): item for i, item in enumerate(value)}, value[0] if value else 0]
        if isinstance(value, dict):
            options += [list(value), list(value.values()), [[k, v] for k, v in value.items()]]
        if isinstance(value, str):
            options += [list(value[:1_000]), len(value)]
        return self.rng.choice(options)


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree


def change_text(rng: Random, value: str) -> str:
    """A text with one random change."""
    start = rng.randint(0, len(value))
    end = min(len(value), start + count(rng, 8))
    return rng.choice(
        (
            value[:start] + text(rng) + value[start:],
            value[:start] + value[end:],
            value[:start] + value[start:end] * rng.randrange(2, 40) + value[end:],
            value.swapcase(),
            value + value,
            value[::-1],
        )
    )


def change_bytes(rng: Random, data: bytes, words: Sequence[bytes] = ()) -> bytes:
    """
    Bytes with some random changes: bits flipped; parts cut, repeated, moved or inserted; numbers replaced.

    Args:
        rng (`Random`): The source of all choices.
        data (`bytes`): The original.
        words (`Sequence[bytes]`, *optional*): What to insert besides random bytes, such as parts of other inputs.
    """
    for _ in range(1 + min(int(rng.expovariate(0.5)), 12)):
        size = len(data)
        start = rng.randint(0, size)
        end = min(size, start + count(rng, max(size // 2, 2)))
        kind = rng.randrange(8)
        if kind == 0 and size:
            start = min(start, size - 1)
            data = data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :]
        elif kind == 1:
            data = data[:start] + data[end:]
        elif kind == 2:
            data = data[:end]
        elif kind == 3 and size < 100_000:
            data = data[:end] + data[start:end] * rng.randrange(1, 9) + data[end:]
        elif kind == 4:
            data = data[:start] + rng.randbytes(count(rng, 16)) + data[start:]
        elif kind == 5 and words:
            data = data[:start] + rng.choice(words) + data[start:]
        elif kind == 6:
            number = str(rng.choice(NUMBERS)).encode()
            data = data[:start] + re.sub(rb"-?\d+(\.\d+)?", number, data[start:], count=1)
        else:
            data = data[:start] + text(rng).encode("utf-8", "surrogatepass") + data[start:]
    return data
