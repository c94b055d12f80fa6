"""Foreign text in messages, and the readers of foreign JSON, YAML and safetensors headers."""

import time

import pytest
import yaml

from rlora_trl.files.card_text import check_card_text
from rlora_trl.reading import (
    AdapterCheckError,
    first_few,
    parse_json,
    parse_yaml,
    printable,
    read_safetensors_header,
    shorten,
    split_json_list,
)


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


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: [1, -2, 0x1F, 010, 1_000]", {"a": [1, -2, 31, 8, 1000]}),
        ("a: [1.5, .5, 1.0e+3, 1e5, -.inf]", {"a": [1.5, 0.5, 1000.0, "1e5", float("-inf")]}),
        ("a: [yes, No, TRUE, null, ~, '']", {"a": [True, False, True, None, None, ""]}),
        ("a: [2001-01-01, 1:30, '5', \"\\u00e9\"]", {"a": ["2001-01-01", "1:30", "5", "é"]}),
        ("a: {b: {}, c: []}\nd: |\n  x\n  y", {"a": {"b": {}, "c": []}, "d": "x\ny"}),
        ("a: " + "9" * 100_000, {"a": "9" * 100_000}),
        ("a: 1" + ":1" * 50_000, {"a": "1" + ":1" * 50_000}),
    ],
)
def test_yaml_of_plain_values(text, value):
    assert parse_yaml(text, "x") == value


@pytest.mark.parametrize(
    "text", ["1", "-1", "0b11", "017", "1.", "-2.50", ".NaN", "+.INF", "on", "y", "08", "0x", "_1"]
)
def test_yaml_scalars_are_those_of_pyyaml(text):
    assert repr(parse_yaml(f"[{text}]", "x")) == repr(yaml.safe_load(f"[{text}]"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: &x 1", "anchor"),
        ("a: *x", "alias"),
        ("a: !!int ''", "tag"),
        ("a: !!timestamp x", "tag"),
        ("a: 1\na: 2", "'a' occurs twice"),
        ("1: x", "key '1' is not a text"),
        ("<<: {a: 1}", "key '<<'"),
        ("? [a]\n: b", "list or mapping is a key"),
        ("a: " + "[" * 33 + "]" * 33, "nested more than 32 deep"),
        ("{" * 100_000, "nested|nesting|key"),
        ("- 1\n" * 300_000, "more than 250000 values"),
        ("a: [" + "{}," * 300_000 + "]", "more than 250000 values"),
        ("a\n--- b", "second document"),
        ("a: [", "did not find"),
        ("a: \0", "unacceptable character"),
        ("a: \ud800", "surrogates"),
        ('a: "\\ud800"', "Unicode|surrogates"),
        ('a: "\\UFFFFFFFF"', "Unicode|chr"),
    ],
    ids=lambda value: value[:12].encode("unicode_escape").decode(),
)
def test_yaml_of_strangers(text, problem):
    start = time.process_time()
    with pytest.raises(AdapterCheckError, match=f"(?s)^x, line .*{problem}"):
        parse_yaml(text, "x")
    assert time.process_time() - start < 5


def test_a_line_of_yaml_is_that_of_its_source():
    with pytest.raises(AdapterCheckError, match="x, line 12,"):
        parse_yaml("a: 1\nb: &c 2", "x", first_line=11)


# JSON


def test_elements_of_a_list_in_json():
    elements = [b'{"a": "],\\"[{"}', b" [1, 2]", b' "\\\\"', b" null "]
    assert list(split_json_list(b" [" + b",".join(elements) + b"] ", "x")) == elements
    assert list(split_json_list(b"[ ]", "x")) == []


@pytest.mark.parametrize("data", [b"", b"{}", b"[1", b"[1]]", b"[1] 2", b'["', b'"a"', b"x[1]", b"[\xff"])
def test_what_is_not_a_list_in_json(data):
    with pytest.raises(AdapterCheckError, match="x is not a list"):
        list(split_json_list(data, "x"))


def test_json_with_many_keys_is_refused_before_it_is_parsed():
    data = b"{" + b",".join(b'"%d":1' % index for index in range(600_000)) + b"}"
    with pytest.raises(AdapterCheckError, match="more than 1000000 elements"):
        parse_json(data, "x")


def test_a_tensor_without_elements_has_a_sensible_shape(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(AdapterCheckError, match="a must have.*dimensions of at most"):
        read_safetensors_header(path)


# Metadata of cards


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ("self: x", "`self`"),
        ("ignore_metadata_errors: true", "`ignore_metadata_errors`"),
        ("tags: 5", "`tags` must be a list"),
        ("model-index: [{name: x, results: [{source: text}]}]", "`source` of a result"),
        ("model-index: [{name: x, results: [{source: {name: x}}]}]", "`source` of a result"),
        ("[x]", "must be a mapping"),
    ],
)
def test_metadata_that_huggingface_hub_cannot_hold(metadata, problem):
    with pytest.raises(AdapterCheckError, match=f"card has metadata that can't be read.*{problem}"):
        check_card_text(f"---\n{metadata}\n---\n")


def test_metadata_of_unexpected_types_is_left_to_its_readers():
    text = "---\nmodel-index: 5\ndatasets: {a: 1}\ntags: rlora\n---\ntext"
    assert check_card_text(text) == {"model-index": 5, "datasets": {"a": 1}, "tags": "rlora"}
    assert check_card_text("no metadata") == {} and check_card_text("---\n\n---\n") == {}
