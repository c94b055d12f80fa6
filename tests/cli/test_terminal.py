"""What reaches a terminal: no foreign control characters, no secrets, and nothing that it can't show."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
from datetime import UTC, datetime

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError
from processes import RLORA, run

import rlora_trl.zoo
from rlora_cli import output, train_process
from rlora_cli.output import print_facts, print_json, print_table, print_text
from rlora_cli.terminal import GuardedStream, redact, shown
from rlora_trl.zoo import AdapterInfo, Comparison


HOSTILE = {
    "clear": "\x1b[2J\x1b[H",
    "hide": "\x1b[8msecret",
    "clipboard": "\x1b]52;c;ZWNobw==\x07",
    "link": "\x1b]8;;https://evil\x1b\\here\x1b]8;;\x1b\\",
    "bell": "\x07",
    "c1": "\x9b2J\x85",
    "return": "done\rError",
    "line": "one\nError: two",
    "reversed": "\u202egpj.exe\u2066",
    "separators": "\u2028\u2029\u200b\ufeff",
    "surrogate": "\udc80",
    "markup": "[link=https://evil]x[/link] [/bold] :warning:",
    "delete": "\x7f\x08\x0b\x0c\0\t",
}
# All control and format characters that are tried here, but the end of a line.
FORBIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
hostile = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)


@hostile
def test_values_are_escaped_in_all_forms(text, capsys):
    print_table([text, f"a {text}"], [[f"b {text}", 1], ["mean", 2]], title="Title")
    print_facts({f"c {text}": f"d {text}"})
    output.note(f"e {output.shown(text)}")
    captured = capsys.readouterr()
    assert not FORBIDDEN.search(captured.out + captured.err)
    assert captured.out.count("\n") == 5, "one line for each row"
    for prefix in "abcd":
        assert f"{prefix} {shown(text)}" in captured.out
    assert shown(text).isprintable() and f"e {shown(text)}" in captured.err


@hostile
def test_json_has_the_exact_text_and_no_control_characters(text, capsys):
    print_json({text: [text, {"a": text}]})
    written = capsys.readouterr().out
    assert written.isascii() and not FORBIDDEN.search(written)
    assert json.loads(written) == {text: [text, {"a": text}]}


@hostile
def test_cards_keep_only_their_line_ends(text, capsys):
    print_text(f"---\ntags:\n- {text}\n")
    lines = capsys.readouterr().out.split("\n")
    assert lines[:2] == ["---", "tags:"] and not any(map(FORBIDDEN.search, lines))
    assert lines[2:4] == ("- " + shown(text, keep="\n") + "\n").split("\n")[:2]


def _info(text):
    return AdapterInfo(
        repo_id=f"user/{text}",
        base_model=f"base {text}",
        tasks=(f"task {text}", text),
        metrics={f"task {text}": {"accuracy": 0.5, f"metric {text}": 0.25}},
        r=4,
        num_heads=3,
        router=f"router {text}",
        sha=text,
        digest=f"digest {text}",
        exports=(f"exports/{text}",),
        downloads=1,
        last_modified=datetime(2026, 1, 2, tzinfo=UTC),
    )


@pytest.mark.parametrize("words", [["search"], ["show", "user/x"], ["compare", "user/x"]], ids=lambda words: words[0])
@hostile
def test_the_zoo_shows_foreign_cards(rlora, monkeypatch, words, text):
    info = _info(text)
    monkeypatch.setattr(rlora_trl.zoo, "search", lambda **kwargs: [info])
    monkeypatch.setattr(rlora_trl.zoo, "show", lambda repo, revision: info)
    monkeypatch.setattr(rlora_trl.zoo, "compare", lambda repos, metric: Comparison((info,), info.tasks, metric))
    result = rlora("zoo", *words)
    assert result.exit_code == 0, result.output
    assert not FORBIDDEN.search(result.output) and shown(info.tasks[0]) in result.stdout
    result = rlora("zoo", *words, "--json")
    assert result.stdout.isascii() and not FORBIDDEN.search(result.output)
    assert json.dumps(info.tasks[0]) in result.stdout, "a parser gets the exact text"


# What libraries write


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def _through_guard(*writes, stream=None):
    stream = stream or io.StringIO()
    guard = GuardedStream(stream)
    for text in writes:
        guard.write(text)
    return stream.getvalue()


@hostile
def test_what_libraries_write_is_escaped(text):
    written = _through_guard(f"WARNING {text}\n")
    assert not FORBIDDEN.search(written)
    if "\t" not in text:
        assert written == f"WARNING {shown(text, keep=chr(10))}\n"


def test_colors_of_libraries_are_left_out_on_a_terminal():
    assert _through_guard("\x1b[1mLOAD\x1b[0m \x1b[8m\x1b[2J", stream=_Terminal()) == r"LOAD \x1b[2J"
    assert _through_guard("\x1b[1mLOAD") == r"\x1b[1mLOAD"


def test_progress_of_libraries_is_drawn():
    # tqdm, and the pipeline and the status line of huggingface_hub.
    bar = ["\r 50%|█████     | 1/2 [00:01]", "\x1b[A", "\n", "\x1b[3A", "\r\x1b[Kmodel.safetensors 3/7\n"]
    assert _through_guard(*bar) == "".join(bar)
    assert _through_guard("\r\x1b[K\x1b[90mwaiting\x1b[0m", stream=_Terminal()) == "\r\x1b[Kwaiting"
    hostile = _through_guard("\r 50%|\x1b[5A\x1b[2K\rall good|", "x\x1b[5A", "\x1b[5A\n")
    assert hostile == "\r 50%|\\x1b[5A\\x1b[2K\\rall good|x\\x1b[5A\\x1b[5A\n"


# Programs with a command that writes foreign text in all ways

PROGRAM = """
import logging, sys, warnings
import typer
from rlora_cli import app
from rlora_cli.options import Command
from rlora_cli.output import note, print_facts, print_table, print_text, results_only

foreign = sys.argv.pop()

@app.app.command("try", cls=Command)
def show():
    with results_only():
        print("printed", foreign)
    handler = logging.StreamHandler()
    logging.getLogger("library").addHandler(handler)
    logging.getLogger("library").warning("logged %s", foreign)
    warnings.warn("warned " + foreign)
    print_table(["name", "é"], [[foreign, 1]])
    print_facts({"Name": foreign})
    print_text("text " + foreign)
    note("note " + foreign)
    raise ValueError("raised " + foreign)

app.main()
"""
FOREIGN = "naïve 日本 \x1b[31mred \x1b[2J\x1b[8m\x1b]0;title\x07\x9b \u202e"


def _in_pipes(encoding):
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = run([sys.executable, "-c", PROGRAM, "try", FOREIGN], env=env, text=False)
    return done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_all_ways_to_a_pipe(encoding):
    code, stdout, stderr = _in_pipes(encoding)
    assert code == 1 and "Traceback" not in stderr
    assert not FORBIDDEN.search(stdout + stderr)
    expected = FOREIGN if encoding == "utf-8" else FOREIGN.encode(encoding, "backslashreplace").decode(encoding)
    assert stdout.count(shown(expected)) == 3
    for way in ("printed", "logged", "warned", "note", "raised"):
        assert f"{way} {shown(expected)}" in stderr
    assert stdout.split("\n")[0].index("é" if encoding != "ascii" else "\\xe9") > len(shown(expected))


def _on_terminal(command, env):
    """The exit code of a program on a terminal of its own, and all that it writes there."""
    parent, child = pty.openpty()
    written = bytearray()

    def read():
        while True:
            try:
                written.extend(os.read(parent, 10_000))
            except OSError:  # the program has ended
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", **env}
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=env)
    os.close(child)
    try:
        code = process.wait(60)
    finally:
        process.kill()
    reader.join(10)
    os.close(parent)
    return code, bytes(written)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_colors_on_a_terminal_are_ours(encoding):
    env = {"PYTHONIOENCODING": encoding, "NO_COLOR": "", "LINES": "50"}
    code, written = _on_terminal([sys.executable, "-c", PROGRAM, "try", FOREIGN], env)
    text = written.decode(encoding).replace("\r\n", "\n")
    assert code == 1 and "Traceback" not in text
    assert "\x1b[1;31mError:\x1b[0m" in text and "\x1b[1mName  \x1b[0m" in text
    ours = re.sub(r"\x1b\[(0|1|1;31)m", "", text)
    assert not FORBIDDEN.search(ours), "nothing else but our styles"
    assert ("───" in text) == (encoding == "utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize(
    "words",
    [["--help"], ["estimate", "--help"], ["zoo", "search", "--sort", "é\u202e"], ["é\x1b[2J"]],
)
def test_help_and_usage_in_other_encodings(encoding, words):
    env = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    done = run([*RLORA, *words], env=env, text=False)
    text = (done.stdout + done.stderr).decode(encoding)
    assert done.returncode == (0 if "--help" in words else 2), text
    assert "Usage: rlora" in text and "Traceback" not in text and not FORBIDDEN.search(text)


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_of_training_escapes_too(monkeypatch, capsys, fails):
    def run(arguments):
        print("printed \x1b[2J\u202e")
        if fails:
            raise ValueError("raised \x1b[2J")

    monkeypatch.setattr(train_process, "run", run)
    assert train_process.main() == fails
    captured = capsys.readouterr()
    assert captured.out == "printed \\x1b[2J\\u202e\n"
    assert captured.err == ("Error: raised \\x1b[2J\n" if fails else "")


# Secrets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at https://user:secret@host/api", "at https://***@host/api"),
        ("'http://secret@host:8080'", "'http://***@host:8080'"),
        ("https://user:se@cret@host", "https://***@host"),
        ("https://h/x?X-Amz-Signature=secret&X-Amz-Date=1", "https://h/x?X-Amz-Signature=***&X-Amz-Date=1"),
        ("https://h/x?a=1&token=secret", "https://h/x?a=1&token=***"),
        ("https://h/x?Expires=1&Policy=secret&Key-Pair-Id=secret", "https://h/x?Expires=1&Policy=***&Key-Pair-Id=***"),
        ("https://h/x?sv=1&sig=secret'", "https://h/x?sv=1&sig=***'"),
        ("token hf_" + "a" * 34, "token hf_***"),
        ("user/name@main, a@b, https://host/a@b", "user/name@main, a@b, https://host/a@b"),
        ("https://host/x?page=2&sort=key", "https://host/x?page=2&sort=key"),
    ],
)
def test_secrets_are_left_out(text, expected):
    assert redact(text) == expected


def test_the_password_of_the_endpoint_is_left_out_as_it_was_set(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://user:se/c'r et#@host")
    assert redact("https://user:se/c'r et#@host/api refused") == "https://***@host/api refused"


def test_long_text_takes_linear_time():
    for part in ("://a", "?a", "&token", "hf_a", "://" + "a" * 50, "\x1b[", "\r"):
        assert len(_through_guard(part * 100_000)) >= 100_000


def test_secrets_are_left_out_in_all_forms(capsys, monkeypatch):
    url = "https://user:secret@host/x?X-Amz-Signature=secret"
    print_json({url: [url]})
    print_table(["url"], [[url]])
    print_facts({"url": url})
    print_text(url)
    output.note(url)
    captured = capsys.readouterr()
    assert "secret" not in captured.out + captured.err + _through_guard(url)
    assert json.loads(captured.out[: captured.out.index("}") + 1])


def test_errors_do_not_show_the_password_of_the_endpoint(rlora, monkeypatch):
    endpoint = "http://user:secret@127.0.0.1:9"

    def search(**kwargs):
        raise HTTPError(f"[Errno 111] Connection refused: {endpoint}/api/models?token=secret")

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(rlora_trl.zoo, "search", search)
    result = rlora("--debug", "zoo", "search")
    assert result.exit_code == 1 and "The Hub at http://***@127.0.0.1:9 can't be reached" in result.stderr
    assert "Traceback" in result.stderr and "secret" not in result.output
