"""
Metrics of a generated answer: exact match and F1 after SQuAD's normalization, and the number at the end of a solution.

Each is a function of two texts, the answer and the reference, and gives a value in `[0, 1]`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable
from decimal import Decimal


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A sign belongs to a number unless something that could be subtracted from stands before it.
_NUMBER = re.compile(
    r"(?:(?<![\w.,)$%])([-+\u2212]))?(?:\$\s?([-\u2212]?))?"
    r"((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
)
_ANSWER_MARK = "####"


def normalize_answer(text: str) -> str:
    """A text as SQuAD compares it: lower case, without punctuation, English articles and superfluous white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, reference: str) -> float:
    """1 if both are the same after SQuAD's normalization, else 0."""
    return float(normalize_answer(answer) == normalize_answer(reference))


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words, each as often as it occurs, after SQuAD's normalization."""
    words, expected = normalize_answer(answer).split(), normalize_answer(reference).split()
    common = (Counter(words) & Counter(expected)).total()
    if not words or not expected:
        return float(words == expected)
    return 2 * common / (len(words) + len(expected))


def find_number(text: str) -> Decimal | None:
    """
    The number that a text answers with: the first after `####`, as GSM8K writes it, else the last one.

    Thousands may be separated by commas, and a sign or a dollar sign may precede. `None` if there is no number.
    """
    _, mark, marked = text.partition(_ANSWER_MARK)
    found = list(_NUMBER.finditer(marked.strip().partition("\n")[0])) if mark else []
    match = found[0] if found else next(iter(list(_NUMBER.finditer(text))[-1:]), None)
    if match is None:
        return None
    sign = match[1] or match[2] or ""
    number = Decimal(match[3].replace(",", ""))
    return -number if sign in ("-", "\u2212") else number


def same_number(answer: str, reference: str) -> float:
    """1 if both answer with the same number, else 0."""
    number = find_number(answer)
    return float(number is not None and number == find_number(reference))


# Metrics of generated answers by name.
GENERATED: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "f1": f1, "number": same_number}
# All metrics: that of likelihoods first.
METRICS = ("accuracy", *GENERATED)
