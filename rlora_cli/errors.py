"""Prints errors as messages. Only bugs get a traceback."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Mapping

from .output import stderr_console
from .terminal import as_message, shown


DEBUG_VARIABLE = "RLORA_DEBUG"
INTERRUPTED = 130  # 128 + SIGINT, as in shells

# `name` or `name=value` in a message of the library.
_ARGUMENT = re.compile(r"`(\w+)(?:=(['\"]?)([^`]*?)\2)?`")
# A package that a library lacks, and raises a `RuntimeError` for.
_NOT_INSTALLED = re.compile(r"\bto be installed\b|\bpip3? install\b")
_REJECTED_TOKEN = re.compile(r"invalid (credentials|user token|username or password)", re.IGNORECASE)


class _NotAboutKernels(logging.Filter):
    """Drops the note of bitsandbytes about optional kernels that it could not load."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")


def quieten_libraries() -> None:
    """Drop messages of libraries that users can't act on. Call it before the libraries are imported."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_NotAboutKernels())
    # PEFT 0.21 and TRL 1.16 read an attribute that transformers 5.23 renamed (no upstream issue as of these versions).
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    # The default of transformers, on a machine without an accelerator.
    warnings.filterwarnings("ignore", "'pin_memory' argument is set as true but no accelerator", UserWarning)


def report(error: BaseException, *, debug: bool = False, names: Mapping[str, str] | None = None) -> int:
    """
    Print an error on stderr.

    Args:
        error (`BaseException`): What was raised.
        debug (`bool`, *optional*, defaults to `False`): Print its traceback too. So does `RLORA_DEBUG=1`.
        names (`Mapping[str, str]`, *optional*): Options by the name of the library's argument. Messages that name an
            argument then name the option. A flag may have another one for `"name=False"`.

    Returns:
        `int`: The exit code.
    """
    debug = debug or os.environ.get(DEBUG_VARIABLE, "").lower() in ("1", "true", "yes", "on")
    interrupted = isinstance(error, KeyboardInterrupt)
    explained = None if interrupted else explain(error)
    console = stderr_console()
    if debug or (explained is None and not interrupted):
        console.file.write(shown("".join(traceback.format_exception(error)).expandtabs(4), keep="\n"))

    if interrupted:
        console.print("Interrupted.", style="bold red")
        return INTERRUPTED
    if explained is None:
        explained = (
            f"{type(error).__name__}, which is a bug. Please report the lines above together with the output of "
            "`rlora env`."
        )
    console.print("Error:", style="bold red", end=" ")
    text = as_message(name_options(explained, names or {}))
    console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)
    return 1


def name_options(message: str, names: Mapping[str, str]) -> str:
    """A message of the library with options for its arguments: `--data` for `data`, `--r 0` for `r=0`."""

    def option(match: re.Match[str]) -> str:
        name, _, value = match.groups()
        if name not in names:
            return match[0]
        if value == "False" and f"{name}=False" in names:
            return f"`{names[f'{name}=False']}`"
        if value == "None":
            return f"no `{names[name]}`"
        return f"`{names[name]}`" if value in (None, "True") else f"`{names[name]} {value}`"

    return _ARGUMENT.sub(option, message)


def explain(error: BaseException) -> str | None:
    """The message for an error that users or the Hub cause; `None` for a bug."""
    message = _explain_hub(error)
    if message is not None:
        return message
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"There is no file or folder {error.filename}."
    if isinstance(error, (ValueError, TypeError, OSError, ImportError, NotImplementedError)):
        return str(error).strip() or type(error).__name__

    # Errors of libraries that derive from `Exception` or `RuntimeError`.
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from safetensors import SafetensorError
    from torch import OutOfMemoryError
    from yaml import YAMLError

    if isinstance(error, OutOfMemoryError):
        return "The device is out of memory. Use a smaller batch, or add `--load-in-4bit`."
    if isinstance(error, RuntimeError) and _NOT_INSTALLED.search(str(error)):
        return str(error).strip()
    if isinstance(error, (YAMLError, DatasetsError, SafetensorError)):
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        return str(cause).strip() or type(error).__name__
    return None


def _explain_hub(error: BaseException) -> str | None:
    """The message for an error of huggingface_hub, which has been imported if it raised one."""
    if "huggingface_hub" not in sys.modules:
        return None
    from huggingface_hub import constants, errors

    repository = getattr(error, "repo_id", None) or "The repository"
    rejected = _REJECTED_TOKEN.search(f"{error} {getattr(error, 'server_message', None) or ''}")
    match error:
        case errors.GatedRepoError():
            return f"{repository} is gated. Ask for access on its page, then log in with `hf auth login`."
        case errors.RepositoryNotFoundError() if not rejected:
            return (
                f"{repository} is not on the Hub, or it is private. Check the name; if it is private, log in with "
                "`hf auth login`."
            )
        case errors.RevisionNotFoundError():
            return f"{repository} has no such revision. Check `--revision`."
        case errors.LocalTokenNotFoundError():
            return "You are not logged in. Run `hf auth login`, or set HF_TOKEN."
        case errors.OfflineModeIsEnabled():
            return "This needs the Hub, and HF_HUB_OFFLINE=1 does not allow it. Unset it."
        case errors.LocalEntryNotFoundError() if "is not in the cache" in str(error):
            return _one_line(error)
        case errors.LocalEntryNotFoundError():
            return f"The files are not in the cache, and the Hub can't be reached: {_one_line(error)}"
        case errors.HfHubHTTPError():
            return _explain_status(error.response.status_code if error.response is not None else 0, error, rejected)
        case errors.EntryNotFoundError():
            return _one_line(error)
        case errors.HTTPError():
            return f"The Hub at {constants.ENDPOINT} can't be reached: {_one_line(error) or type(error).__name__}"
    return None


def _explain_status(status: int, error: BaseException, rejected: re.Match[str] | None) -> str:
    if status == 401 and rejected:
        return "The Hub rejected your token. Log in again with `hf auth login`, or correct HF_TOKEN."
    remedies = {
        401: " Log in with `hf auth login`.",
        403: " Use a token with permission to do this: `hf auth login`.",
        429: " Wait a few minutes.",
    }
    return f"The Hub refused: {_one_line(error)}{remedies.get(status, '')}"


def _one_line(error: BaseException) -> str:
    # httpx appends a link for each status.
    return " ".join(re.sub(r"For more information check: \S+", "", str(error)).split())
