"""Foreign text in messages, and the readers of foreign JSON, YAML and safetensors headers."""

import pytest

from rlora_trl.reading import first_few, printable, shorten


LANGUAGES = [
    "plain text",
    "naïve façade, Straße, ångström",
    "русский язык",
    "日本語のテキスト",
    "हिन्दी",
    "עִבְרִית",
    "العَرَبِيَّة",
    "ไทยที่",
    "한국어",
    "emoji 🙂 👍🏽 ❤️",
    r"C:\folder",
    "x\u0323\u0302 and a blank\u00a0that does not break",
]


@pytest.mark.parametrize("text", LANGUAGES)
def test_text_of_any_language_stays_as_it_is(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b[8m", r"\x1b[2J\x1b[8m"),
        ("\x1b]52;c;aGk=\x07", r"\x1b]52;c;aGk=\x07"),
        ("a\rb\nc\td\0\x7f\x9b", r"a\rb\nc\td\x00\x7f\x9b"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("\u2066\u2069\u200e\u200b\ufeff\u2028\u2029\u00ad", r"\u2066\u2069\u200e\u200b\ufeff\u2028\u2029\xad"),
        ("\ud800\ue000\uffff\U000e0041", r"\ud800\ue000\uffff\U000e0041"),
    ],
)
def test_characters_that_do_more_than_show_are_escaped(text, shown):
    assert printable(text) == shown and printable(f"é{text}é") == f"é{shown}é"
    assert shown in shorten(text).replace("\\\\", "\\") and first_few([text]) == shown


def test_combining_marks_do_not_cover_other_lines():
    assert printable("e" + "\u0301" * 100) == "e" + "\u0301" * 4 + r"\u0301" * 96
    assert shorten("e" + "\u20dd" * 50, 200).count("\u20dd") == 4


def test_characters_to_keep():
    assert printable("a\n\x1bb", keep="\n") == "a\n\\x1bb"


def test_messages_stay_short():
    assert len(first_few(["x" * 10_000] * 10)) < 2000
    assert len(shorten("x" * 10_000)) < 100 and len(shorten(["x" * 10_000])) < 100
