"""Regular expressions in a configuration: PEFT matches them against every layer's name, and a bad one never ends."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field

from .reading import AdapterCheckError, shorten


MAX_PATTERN = 1000
# In names of n characters, k repeats in a row take about n**k / k! steps, and each choice twice as many.
MAX_REPEATS = 4
MAX_CHOICES = 8

_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*+\]"  # an escape, a set of characters
    r"|\(\?(?:[=!]|<[=!]|P?<\w+>|P=\w+\)|#[^)]*\)|[a-zA-Z-]*[:)]|>)?|\(|\)|\|"
    r"|[*+?]|\{\d*,?\d*\}|.",
    re.DOTALL,
)
_VERBOSE = re.compile(r"\(\?[a-zA-Z-]*x")
_LITERAL = re.compile(r"[^.^$\[(\\]|\\\W")


def check_pattern(pattern: str, field: str, max_repeats: int = MAX_REPEATS) -> None:
    """
    Check that a regular expression is valid, and that matching it takes a bounded time.

    Refused are repeats of what repeats or has alternatives, such as `(a+)+`, which take exponential time; more than
    `max_repeats` repeats in a row, which take that power of the length of a name; and many choices in a row, optional
    characters or alternatives that begin alike, each of which doubles the time.

    Args:
        pattern (`str`): The expression.
        field (`str`): The field that it comes from, for messages.
        max_repeats (`int`, *optional*, defaults to 4): The most repeats in a row.

    Raises:
        AdapterCheckError: If it is refused.
    """
    quoted = f"`{field}` of the adapter's configuration has the regular expression {shorten(pattern)}"
    if len(pattern) > MAX_PATTERN:
        raise AdapterCheckError(f"{quoted} of {len(pattern)} characters, more than {MAX_PATTERN}. List names instead.")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterCheckError(f"{quoted}, which is not valid ({error}). Correct it, or list names.") from error
    problem = _Scanner().scan(pattern, max_repeats)
    if problem:
        raise AdapterCheckError(f"{quoted} with {problem}, which can take forever to match. List names instead.")


@dataclass
class _Group:
    """What is known of an open bracket. Repeats and choices are those in a row; of branches, the most count."""

    looks_around: bool = False
    repeats: int = 0
    choices: float = 0.0  # in bits
    most_repeats: int = 0
    most_choices: float = 0.0
    varies: bool = False  # how much it matches is not fixed
    at_start: bool = True
    beginnings: list[str] = field(default_factory=list)  # of its branches

    def see(self, token: str) -> None:
        if self.at_start:
            self.beginnings.append(token.lower())
        self.at_start = False

    def end_branch(self) -> None:
        self.see("")
        self.most_repeats, self.repeats = max(self.most_repeats, self.repeats), 0
        self.most_choices, self.choices = max(self.most_choices, self.choices), 0.0
        self.at_start = True

    def overlap(self) -> float:
        """In bits, how many branches can match at the same place: those that begin alike, or with no plain letter."""
        plain = Counter(token for token in self.beginnings if _LITERAL.fullmatch(token))
        return math.log2(max(plain.values(), default=0) + len(self.beginnings) - plain.total())


class _Scanner:
    def __init__(self) -> None:
        self.groups = [_Group()]
        self.closed: _Group | None = None  # what a quantifier that comes now would repeat, if that is a group
        self.quantifiable = False

    def scan(self, pattern: str, max_repeats: int) -> str | None:
        """What is wrong with a valid expression."""
        for match in _TOKEN.finditer(pattern):
            token = match.group()
            # Where spaces and comments are skipped, what follows would be misread.
            if _VERBOSE.match(token) or (self._is_quantifier(token) and self._repeats_a_repeat(token)):
                return "repeats within repeats"
            self._take(token)
        whole = self.groups[0]
        whole.end_branch()
        if whole.most_repeats > max_repeats:
            return f"{whole.most_repeats} repeats in a row"
        return "many choices in a row" if whole.most_choices > MAX_CHOICES else None

    def _take(self, token: str) -> None:
        group = self.groups[-1]
        closed, self.closed = self.closed, None
        if token == "|":
            group.end_branch()
            self.quantifiable = False
        elif token == ")":
            self._close()
        elif token.startswith("(") and not token.endswith(")"):
            group.see(token)
            self.groups.append(_Group(looks_around=token.endswith(("=", "!"))))
            self.quantifiable = False
        elif self._is_quantifier(token):
            self._repeat(token, closed)
        elif self.quantifiable or token not in "?+":  # which behind a quantifier change nothing here
            group.see(token)
            self.quantifiable = True

    def _close(self) -> None:
        inner = self.groups.pop()
        inner.end_branch()
        outer = self.groups[-1]
        outer.repeats += inner.most_repeats
        if not inner.looks_around:
            outer.choices += inner.most_choices + inner.overlap()
            outer.varies |= inner.varies or len(inner.beginnings) > 1
        inner.varies |= len(inner.beginnings) > 1
        self.closed, self.quantifiable = inner, True

    def _is_quantifier(self, token: str) -> bool:
        return self.quantifiable and (token in ("*", "+", "?") or (token[0] == "{" and len(token) > 2))

    def _repeats_a_repeat(self, token: str) -> bool:
        closed = self.closed
        return closed is not None and not closed.looks_around and closed.varies and _bounds(token)[1] > 1

    def _repeat(self, token: str, closed: _Group | None) -> None:
        fewest, most = _bounds(token)
        group = self.groups[-1]
        if fewest == 0 and len(group.beginnings) > 0 and closed is None and group.repeats + group.choices == 0:
            group.beginnings[-1] = ""  # the branch may begin with what follows
        group.varies |= fewest != most
        if math.isinf(most):
            group.repeats += 1
        else:
            group.choices += math.log2(most - fewest + 1)
        self.quantifiable = False


def _bounds(token: str) -> tuple[int, float]:
    if token in ("*", "+", "?"):
        return {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}[token]
    fewest, comma, most = token.strip("{}").partition(",")
    low = int(fewest or 0)
    return low, (float(most) if most else math.inf) if comma else low
