"""`rlora card`: the model card that a push would write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .loading import refuse_missing_folder
from .output import note, print_json, print_text, results_only


if TYPE_CHECKING:
    from rlora_trl.files.checks import CheckedAdapter


def show_card(
    folder: options.AdapterFolder,
    write: Annotated[bool, typer.Option("--write", help="Write the card as README.md into the folder.")] = False,
    repo: Annotated[str | None, typer.Option("--repo", metavar="REPO", help="Repository to name in the card.")] = None,
    as_json: options.Json = False,
) -> None:
    """Show the model card of an adapter, rendered from its configuration and its record.

    Text that you added to the card by hand is kept.
    """
    with results_only():
        from rlora_trl.files.checks import check_adapter
        from rlora_trl.files.layout import CARD_NAME, FileKind, classify, published_files
        from rlora_trl.files.record import AdapterRecord
        from rlora_trl.hub.card import render_card
        from rlora_trl.writing import write_text

        refuse_missing_folder(folder, local=True)
        checked = check_adapter(folder)
        path = Path(folder) / CARD_NAME
        files = published_files(folder)
        record = checked.record or AdapterRecord()
        card = render_card(
            checked.config,
            replace(record, exports=_exports_in(files, checked)),
            repo_id=repo,
            digest=checked.digest,
            num_parameters=checked.num_parameters,
            figures=[name for name in files if classify(name) is FileKind.FIGURE],
            existing=path.read_text(encoding="utf-8") if path.is_file() else None,
        )
        if write:
            write_text(path, str(card))
    if as_json:
        print_json({"metadata": card.data.to_dict(), "text": card.text, "written": str(path) if write else None})
    elif write:
        note(f"Wrote {path}")
    else:
        print_text(str(card))


def _exports_in(files: Sequence[str], checked: CheckedAdapter) -> list[dict[str, Any]]:
    """
    The plain-LoRA exports in the folder of an adapter, in the form of a record.

    Args:
        files (`Sequence[str]`): Paths in the folder.
        checked ([`CheckedAdapter`]): The adapter. Recorded exports that are not in the folder, as after a download
            without exports, are left out.
    """
    from rlora_trl.files.layout import CONFIG_NAME, EXPORTS, WEIGHTS_NAME, task_slug

    recorded = {} if checked.record is None else {str(export["path"]): export for export in checked.record.exports}
    names = [*(checked.config.tasks or ()), *(task.name for task in (checked.record.tasks if checked.record else ()))]
    tasks = {f"{EXPORTS}/{task_slug(name)}": name for name in names}

    exports = []
    for name in files:
        path, _, file = name.rpartition("/")
        # A merged model has no adapter that PEFT could load.
        if file == WEIGHTS_NAME and path.startswith(f"{EXPORTS}/") and f"{path}/{CONFIG_NAME}" in files:
            unrecorded = {"path": path, **({"task": tasks[path]} if path in tasks else {})}
            exports.append(recorded.get(path, unrecorded))
    return exports
