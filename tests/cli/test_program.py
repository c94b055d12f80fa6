"""The program itself: how fast it starts, what it does with errors, and where its output goes."""

import json
import logging
import os
import re
import subprocess
import sys
import time
import types

import pytest
import typer
from huggingface_hub import errors as hub_errors
from processes import RLORA
from typer.testing import CliRunner

from rlora_cli.app import ReportingGroup
from rlora_cli.errors import quieten_libraries
from rlora_cli.output import plain, print_facts, print_json, print_table, results_only
from rlora_trl import __version__
from rlora_trl.files.reading import AdapterCheckError


COMMANDS = (
    *("train", "eval", "analyze", "estimate", "export", "card", "push", "pull", "env"),
    *("zoo", "zoo search", "zoo compare", "zoo show", "zoo install", "zoo pin"),
)
HEAVY = ("torch", "transformers", "peft", "datasets", "trl", "accelerate", "matplotlib")
ALL_HELP = f"""
import sys
import rlora_cli
for words in {["", *COMMANDS]!r}:
    sys.argv = ["rlora", *words.split(), "--help"]
    try:
        rlora_cli.main()
    except SystemExit as end:
        assert not end.code, words
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""


def test_help_of_all_commands_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", ALL_HELP], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr
    assert done.stdout.count("Usage: rlora") == 1 + len(COMMANDS)


def test_help_is_quick():
    # Half a second on a free core; with PyTorch it would be several.
    def seconds():
        start = time.perf_counter()
        done = subprocess.run([*RLORA, "--help"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "Usage: rlora" in done.stdout, done.stderr
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 2.5


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(rlora, command):
    result = rlora(*command.split(), "-h")
    assert result.exit_code == 0
    assert f"rlora {command}" in result.stdout
    assert "<bool>" not in result.stdout


def test_version(rlora):
    assert rlora("--version").stdout == f"rlora-trl {__version__}\n"


def test_wrong_usage_is_told_with_the_usage(rlora):
    result = rlora("eval", "folder")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Missing option '--data'" in result.stderr and "Usage: rlora eval" in result.stderr
    assert rlora("evaluate").exit_code == 2


def _response(status):
    return types.SimpleNamespace(headers={}, status_code=status, request=None, url="https://hub/api/models/user/x")


def _hub_error(name, status, text="told by the Hub"):
    error = getattr(hub_errors, name)(text, response=_response(status))
    error.repo_id = "user/x"
    return error


def _raise(error, words=(), **settings):
    app = typer.Typer(cls=ReportingGroup, pretty_exceptions_enable=False)

    @app.callback()
    def root(debug: bool = False):
        pass

    @app.command()
    def fail():
        raise error

    return CliRunner().invoke(app, [*words, "fail"], **settings)


EXPECTED = [
    (ValueError("`r` must be at least 1."), "Error: `r` must be at least 1.\n"),
    (TypeError("of another kind"), "Error: of another kind\n"),
    (AdapterCheckError("it is damaged"), "Error: it is damaged\n"),
    (ImportError("Run `pip install x[y]`."), "Error: Run `pip install x[y]`.\n"),
    (FileNotFoundError(2, "No such file", "a.yaml"), "Error: There is no file or folder a.yaml.\n"),
    (PermissionError(13, "Permission denied", "b"), "Error: [Errno 13] Permission denied: 'b'\n"),
    (_hub_error("RepositoryNotFoundError", 404), "Error: user/x is not on the Hub, or it is private."),
    (_hub_error("GatedRepoError", 403), "Error: user/x is gated. Ask for access"),
    (_hub_error("RevisionNotFoundError", 404), "Error: user/x has no such revision."),
    (_hub_error("HfHubHTTPError", 401), "Error: The Hub refused: told by the Hub Log in with `hf auth login`.\n"),
    (_hub_error("HfHubHTTPError", 401, "Invalid user token."), "Error: The Hub rejected your token. Log in again"),
    (ValueError("Name one of these in `metric`."), "Error: Name one of these with `--metric`.\n"),
    (ValueError("Search for some with `zoo.search()`."), "Error: Search for some with `rlora zoo search`.\n"),
    (
        ValueError("Give its name on the Hub as `base_model`."),
        "Error: Give its name on the Hub with `--base-model`.\n",
    ),
    (ValueError("`output_dir` 'a' is a file."), "Error: OUTPUT 'a' is a file.\n"),
    (_hub_error("HfHubHTTPError", 500, "down\n\nAgain."), "Error: The Hub refused: down Again.\n"),
    (hub_errors.LocalTokenNotFoundError(), "Error: You are not logged in."),
    (hub_errors.OfflineModeIsEnabled(), "Error: This needs the Hub, and HF_HUB_OFFLINE=1 does not allow it."),
    (hub_errors.LocalEntryNotFoundError("no x"), "Error: It is not in the cache, and the Hub can't be asked: no x\n"),
    (hub_errors.HTTPError("refused"), "can't be reached: refused\n"),
]


@pytest.mark.parametrize("error, message", EXPECTED, ids=[type(error).__name__ for error, _ in EXPECTED])
def test_errors_of_users_are_one_message(error, message):
    result = _raise(error)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_interruption():
    result = _raise(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")


def test_bugs_keep_their_traceback():
    result = _raise(KeyError("lost"))
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "KeyError: 'lost'" in result.stderr
    assert "`rlora env`" in result.stderr


@pytest.mark.parametrize(
    "settings", [{"words": ["--debug"]}, {"env": {"RLORA_DEBUG": "1"}}], ids=["option", "variable"]
)
def test_debug_shows_where(settings):
    result = _raise(ValueError("wrong"), **settings)
    assert "Traceback" in result.stderr and result.stderr.endswith("Error: wrong\n")


def test_errors_of_libraries_about_files():
    import yaml

    try:
        yaml.safe_load("a: [")
    except yaml.YAMLError as error:
        assert "Traceback" not in _raise(error).stderr


def test_tables_in_a_pipe_are_plain_and_whole(capsys):
    long = "user/" + "x" * 150
    print_table(["repository", "rows", "accuracy, %"], [[long, 12345, "7.1"], ["mean", None, "10.0"]], title="Title")
    print_facts({"Name": long, "Left out": None, "Rows": 3})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Title"
    assert lines[1].split() == ["repository", "rows", "accuracy,", "%"]
    assert lines[2].split() == [long, "12,345", "7.1"]
    assert lines[2].index("7.1") == lines[3].index("10.0") + 1  # numbers end below each other
    assert lines[4:] == [f"Name  {long}", "Rows  3"]
    assert not any("\x1b" in line or line != line.rstrip() for line in lines)


def test_tables_in_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # how rich is told of a terminal
    monkeypatch.setenv("COLUMNS", "40")
    long = "user/" + "x" * 50
    print_table(["task", "rows"], [["same", 7]])
    print_table(["repository", "tasks", "r"], [[long, "one, two", 4], ["user/short", "one", 5]])
    print_facts({"Folder": "/" + "y" * 60, "Tasks": "sst2, " * 10})
    text = capsys.readouterr().out
    assert "\x1b[1m  tasks  \x1b[0mone, two\n" in text, "only labels are bold"
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert lines[:3] == ["task   rows", "───────────", "same      7"]
    # Too wide for a table: a few lines for each row, and what may be copied stays whole.
    assert lines[3:6] == [long, "  tasks  one, two", "  r      4"]
    assert lines[6:10] == ["", "user/short", "  tasks  one", "  r      5"]
    assert lines[10] == "Folder  /" + "y" * 60
    assert all(len(line) <= 40 for line in lines[11:]) and len(lines) > 12


def test_only_results_go_to_stdout(capsys):
    with results_only():
        print("what a library prints")
    print_json({"value": 1})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"value": 1}
    assert captured.err == "what a library prints\n"


def test_only_the_remark_about_a_missing_kernel_is_left_out(caplog):
    quieten_libraries()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no kernels")
    logger.warning("Something else")
    assert [record.getMessage() for record in caplog.records] == ["Something else"]


def test_values_as_json():
    import torch

    assert plain({"a": float("nan"), "b": torch.ones(2), "c": ("x",), 4: None}) == {
        **{"a": None, "b": [1.0, 1.0], "c": ["x"], "4": None}
    }


def test_env_tells_no_paths(rlora, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = rlora("env", "--json")
    facts = json.loads(result.stdout)
    assert facts["rlora_trl"] == __version__
    assert facts["Kernels"] in ("PyTorch", "Triton")
    text = rlora("env").stdout
    assert f"- rlora_trl: {__version__}" in text
    for secret in ("hf_secret", os.getcwd(), os.path.expanduser("~/"), os.uname().nodename):
        assert secret not in text + result.stdout
