"""How adapters are named: where they are, and what they are called on a model."""

from __future__ import annotations

import os
import re
from collections.abc import Collection


def split_revision(place: str) -> tuple[str, str | None]:
    """
    Part `"user/name@revision"`.

    Args:
        place (`str`): A repository, with a revision or without, or a folder, whose name may have the character in it.

    Returns:
        `tuple[str, str | None]`: The repository or folder, and the revision if there is one.
    """
    if os.path.isdir(place):
        return place, None
    repo_id, _, revision = place.partition("@")
    return repo_id, revision or None


def adapter_name(repo_id: str, taken: Collection[str] = ()) -> str:
    """
    What to call an adapter on a model: the last part of its repository's name, numbered if that is taken.

    Args:
        repo_id (`str`): Repository or folder.
        taken (`Collection[str]`, *optional*): Names of other adapters.
    """
    # PyTorch separates the names of modules by dots.
    plain = re.sub(r"[^\w-]", "_", repo_id.rstrip("/").rsplit("/", 1)[-1])
    name, count = plain, 2
    while name in taken:
        name, count = f"{plain}_{count}", count + 1
    return name


def is_adapter_name(name: object) -> bool:
    """Whether PEFT can name an adapter so."""
    return isinstance(name, str) and re.fullmatch(r"[\w-]+", name) is not None
