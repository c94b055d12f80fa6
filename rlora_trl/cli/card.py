"""`rlora card`: the model card that a push would write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .loading import refuse_missing_folder
from .options import Command, JsonOption, help_of
from .output import note, print_json, print_text, results_only


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("card", cls=Command, help=help_of(show_card))(show_card)


def show_card(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder of an adapter.", show_default=False)],
    write: Annotated[bool, typer.Option("--write", help="Write it as README.md into the folder.")] = False,
    repo: Annotated[
        str | None, typer.Option("--repo", metavar="REPO", help="Name on the Hub to use in it.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the model card of an adapter, made from its configuration and its record.

    What was written into the card by hand stays.
    """
    with results_only():
        from ..hub.card import render_card
        from ..hub.checks import check_adapter
        from ..hub.layout import CARD_NAME, EXPORTS, FileKind, classify, published_files

        if not Path(folder).is_dir():
            refuse_missing_folder("./" + folder)
        checked = check_adapter(folder)
        path = Path(folder) / CARD_NAME
        files = published_files(folder)
        card = render_card(
            checked.config,
            checked.record,
            repo_id=repo,
            digest=checked.digest,
            num_parameters=checked.num_parameters,
            figures=[name for name in files if classify(name) is FileKind.FIGURE],
            exports=sorted({"/".join(name.split("/")[:2]) for name in files if name.startswith(f"{EXPORTS}/")}),
            existing=path.read_text(encoding="utf-8") if path.is_file() else None,
        )
        if write:
            card.save(path)
    if as_json:
        print_json({"metadata": card.data.to_dict(), "text": card.text, "written": str(path) if write else None})
    elif write:
        note(f"Wrote {path}")
    else:
        print_text(str(card))
