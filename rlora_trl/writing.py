"""Writes text files as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """
    Write a file in UTF-8 atomically: a reader sees the old file or the new one, also after a full disk or a kill.

    Args:
        path (`str` or `Path`): The file, in an existing folder. Where it is a link, the link is replaced.
        text (`str`): Its contents. Line ends are written as they are.

    Raises:
        OSError: If it can't be written; the error names the file, which is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except OSError as error:
        # An error of a full disk comes from the write, which does not know the name.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
