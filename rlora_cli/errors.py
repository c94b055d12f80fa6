"""What goes wrong, told in a sentence: users' errors and the Hub's without a traceback, ours with one."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback

from .output import stderr_console


DEBUG_VARIABLE = "RLORA_DEBUG"
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

# Messages of the library name arguments of functions; what these are called on the command line.
_TRANSLATIONS = (
    (r"Pass `data=.*\)`\.$", "Add `--data` to measure them, or say how to mix the heads with `--weights`."),
    (r"Rows of `data\[(.*?)\]`", r"Rows of task \1 in `--data`"),
    (r"got `task=None`", "none is given"),
    (r"`task=(.*?)`", r"task \1"),
    (r"Set `task` to", "Set `--task` to"),
    (r"give weights in `routing`", "give weights with `--weights`"),
    (r"leave `data` out", "leave `--data` out"),
    (r"`data` has no rows", "`--data` has no rows"),
    (r"`output_dir` ", "OUTPUT "),
    (r" \(`merge=False`\)", ", without `--merge`"),
    (r"`max_rows`", "`--limit`"),
    (r"one of these in `metric`", "one of these with `--metric`"),
    (r"`zoo\.search\(\)`", "`rlora zoo search`"),
    (r"`Manifest\.pin`", "`rlora zoo pin`"),
    (r"Hub as `base_model`", "Hub with `--base-model`"),
    (r"a commit in `revision`", "a commit with `--revision`"),
    (r"`routing`", "`--weights`"),
)
_REJECTED_TOKEN = re.compile(r"invalid (credentials|user token|username or password)", re.IGNORECASE)


class _NotAboutKernels(logging.Filter):
    """All that a library logs, but for faster kernels that it would have liked to download."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")


def quieten_libraries() -> None:
    """Leave out remarks of libraries that users can do nothing about, before the libraries are imported."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_NotAboutKernels())


def report(error: BaseException, *, debug: bool = False, translated: bool = False) -> int:
    """
    Tell an error on stderr.

    Args:
        error (`BaseException`): What was raised.
        debug (`bool`, *optional*, defaults to `False`): Show where, too. So does `RLORA_DEBUG=1`.
        translated (`bool`, *optional*, defaults to `False`): Name options of commands where the library names its
            arguments. Those of training have one name in both.

    Returns:
        `int`: The exit code.
    """
    debug = debug or os.environ.get(DEBUG_VARIABLE, "").lower() in ("1", "true", "yes", "on")
    console = stderr_console()
    if isinstance(error, KeyboardInterrupt):
        _show_traceback(error, debug)
        console.print("Interrupted.", style="bold red")
        return INTERRUPTED
    message = explain(error)
    if translated and message is not None:
        message = translate(message)
    _show_traceback(error, debug or message is None)
    if message is None:
        message = (
            f"{type(error).__name__}, which should not happen. Please report the lines above together with the output "
            "of `rlora env`."
        )
    console.print("Error:", style="bold red", end=" ")
    console.print(message, markup=False, highlight=False, soft_wrap=not console.is_terminal)
    return 1


def _show_traceback(error: BaseException, wanted: bool) -> None:
    if wanted:
        sys.stderr.write("".join(traceback.format_exception(error)))


def explain(error: BaseException) -> str | None:
    """The message for an error that users or the Hub cause; `None` for what is a bug."""
    name = type(error).__name__
    if name == "OutOfMemoryError":  # torch's, which need not be imported to be recognized
        return "The device has too little memory. Lower `--batch-size`, or add `--load-in-4bit`."
    message = _explain_hub(error)
    if message is not None:
        return message
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"There is no file or folder {error.filename}."
    expected = (ValueError, TypeError, OSError, ImportError, NotImplementedError)
    # Libraries' own errors about files that users name; some derive from `Exception` alone.
    told = ("YAMLError", "DatasetsError", "SafetensorError", "EntryNotFoundError", "HTTPError")
    if isinstance(error, expected) or any(base.__name__ in told for base in type(error).__mro__):
        cause = error.__cause__ if name == "DatasetGenerationError" and error.__cause__ else error
        return str(cause).strip() or name
    return None


def translate(message: str) -> str:
    """A message of the library in words of the command line: `--data`, where it speaks of the argument `data`."""
    for pattern, words in _TRANSLATIONS:
        message = re.sub(pattern, words, message)
    return message


def _explain_hub(error: BaseException) -> str | None:
    """The message for an error of huggingface_hub's, which was imported if there is one."""
    if "huggingface_hub" not in sys.modules:
        return None
    from huggingface_hub import constants, errors

    repository = getattr(error, "repo_id", None) or "The repository"
    if isinstance(error, errors.GatedRepoError):
        return f"{repository} is gated. Ask for access on its page, then log in with `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError) and not _REJECTED_TOKEN.search(str(error)):
        return (
            f"{repository} is not on the Hub, or it is private. Check the name; if it is private, log in with "
            "`hf auth login`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no such revision. Check `--revision`."
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "You are not logged in. Run `hf auth login`, or set HF_TOKEN."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "This needs the Hub, and HF_HUB_OFFLINE=1 does not allow it. Unset it."
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"It is not in the cache, and the Hub can't be asked: {_one_line(error)}"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else None
        if status == 401 and _REJECTED_TOKEN.search(f"{error} {error.server_message or ''}"):
            return "The Hub rejected your token. Log in again with `hf auth login`, or correct HF_TOKEN."
        remedy = {
            401: " Log in with `hf auth login`.",
            403: " Use a token that may do this: `hf auth login`.",
            429: " Wait a few minutes.",
        }.get(status or 0, "")
        return f"The Hub refused: {_one_line(error)}{remedy}"
    if isinstance(error, getattr(errors, "HTTPError", ())) or _is_connection_error(error):
        return f"The Hub at {constants.ENDPOINT} can't be reached: {_one_line(error) or type(error).__name__}"
    return None


def _is_connection_error(error: BaseException) -> bool:
    # Of httpx or requests, whichever huggingface_hub uses; neither is a dependency of ours.
    return any(base.__name__ in ("TransportError", "RequestException") for base in type(error).__mro__)


def _one_line(error: BaseException) -> str:
    # httpx explains each status with a link to an encyclopedia.
    return " ".join(re.sub(r"For more information check: \S+", "", str(error)).split())
