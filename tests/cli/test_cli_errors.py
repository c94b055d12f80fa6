"""Errors of commands: messages, exit codes and tracebacks."""

import logging
import types
import warnings
from typing import Annotated

import pytest
import torch
import typer
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from typer.testing import CliRunner

from rlora_cli.errors import quieten_libraries
from rlora_cli.options import Command
from rlora_trl.reading import AdapterCheckError


def _response(status):
    return types.SimpleNamespace(headers={}, status_code=status, request=None, url="https://hub/api/models/user/x")


def _hub_error(name, status, text="said by the Hub"):
    error = getattr(hub_errors, name)(text, response=_response(status))
    error.repo_id = "user/x"
    return error


def _raise(error, words=(), **settings):
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.callback()
    def root(debug: bool = False):
        pass

    @app.command(cls=Command)
    def fail(
        output_dir: Annotated[str, typer.Argument(metavar="OUTPUT")] = "out",
        routing: Annotated[str, typer.Option("--weights")] = "",
        num_gpus: int = 1,
        merge: bool = False,
        use_rslora: bool | None = None,
    ):
        raise error

    return CliRunner().invoke(app, [*words, "fail"], **settings)


EXPECTED = [
    (ValueError("`r` must be at least 1."), "Error: `r` must be at least 1.\n"),
    (TypeError("of another kind"), "Error: of another kind\n"),
    (AdapterCheckError("it is damaged"), "Error: it is damaged\n"),
    (ImportError("Run `pip install x[y]`."), "Error: Run `pip install x[y]`.\n"),
    (FileNotFoundError(2, "No such file", "a.yaml"), "Error: There is no file or folder a.yaml.\n"),
    (PermissionError(13, "Permission denied", "b"), "Error: [Errno 13] Permission denied: 'b'\n"),
    (torch.OutOfMemoryError("CUDA out of memory."), "Error: The device is out of memory. Use a smaller batch"),
    (SafetensorError("header too large"), "Error: header too large\n"),
    (_hub_error("RepositoryNotFoundError", 404), "Error: user/x is not on the Hub, or it is private."),
    (_hub_error("GatedRepoError", 403), "Error: user/x is gated. Ask for access"),
    (_hub_error("RevisionNotFoundError", 404), "Error: user/x has no such revision."),
    (_hub_error("HfHubHTTPError", 401), "Error: The Hub refused: said by the Hub Log in with `hf auth login`.\n"),
    (_hub_error("HfHubHTTPError", 401, "Invalid user token."), "Error: The Hub rejected your token. Log in again"),
    (ValueError("`output_dir` 'a' is a file."), "Error: `OUTPUT` 'a' is a file.\n"),
    (
        ValueError("got `num_gpus=2`, `routing=None`; use `merge=True` or `routing`, not `router='task'`."),
        "got `--num-gpus 2`, no `--weights`; use `--merge` or `--weights`, not `router='task'`.\n",
    ),
    (
        ValueError("Pass `use_rslora=True` or `use_rslora=False`."),
        "Error: Pass `--use-rslora` or `--no-use-rslora`.\n",
    ),
    (_hub_error("HfHubHTTPError", 500, "down\n\nAgain."), "Error: The Hub refused: down Again.\n"),
    (hub_errors.LocalTokenNotFoundError(), "Error: You are not logged in."),
    (hub_errors.OfflineModeIsEnabled(), "Error: This needs the Hub, and HF_HUB_OFFLINE=1 does not allow it."),
    (
        hub_errors.LocalEntryNotFoundError("no x"),
        "Error: The files are not in the cache, and the Hub can't be reached: no x\n",
    ),
    (
        RuntimeError("WandbCallback requires wandb to be installed. Run `pip install wandb`."),
        "Error: WandbCallback requires wandb to be installed. Run `pip install wandb`.\n",
    ),
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


def test_later_lines_of_a_message_do_not_look_like_messages():
    assert _raise(ValueError("one\nError: two\n  three")).stderr == "Error: one\n  Error: two\n    three\n"


def test_messages_end():
    stderr = _raise(ValueError("x" * 1_000_000)).stderr
    assert len(stderr) < 11_000 and stderr.endswith("x... and 990,000 more characters\n")
    assert "secret" not in _raise(ValueError("x" * 9_980 + " http://user:secret@host")).stderr


class PanicException(BaseException):
    """As libraries in Rust raise it, which is no `Exception`."""


def test_panics_are_reported_too():
    result = _raise(PanicException("\x1b[2J"))
    assert result.exit_code == 1 and "Error: PanicException, which is a bug." in result.stderr
    assert "PanicException: \\x1b[2J" in result.stderr and "\x1b" not in result.stderr


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


def test_warnings_of_libraries_that_users_cannot_act_on_are_left_out():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quieten_libraries()
        warnings.warn(
            "`is_gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1
        )
        warnings.warn(
            "'pin_memory' argument is set as true but no accelerator is found, then", UserWarning, stacklevel=1
        )
        warnings.warn("`something` is deprecated", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["`something` is deprecated"]


def test_only_the_remark_about_a_missing_kernel_is_left_out(caplog):
    quieten_libraries()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no kernels")
    logger.warning("Something else")
    assert [record.getMessage() for record in caplog.records] == ["Something else"]
