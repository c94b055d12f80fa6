"""`rlora pull`: fetch an adapter and check it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import JsonOption, RevisionOption, help_of
from .output import print_facts, print_json, results_only


if TYPE_CHECKING:
    from ..hub.checks import CheckedAdapter


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("pull", help=help_of(pull))(pull)


def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="user/name, or a folder to check.", show_default=False)],
    revision: RevisionOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FOLDER", help="Copy the adapter into this folder.", show_default=False),
    ] = None,
    exports: Annotated[bool, typer.Option("--exports", help="Fetch its plain-LoRA exports, too.")] = False,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="Refuse an adapter of another base model.", show_default=False),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use the cache alone.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch an adapter from the Hub into the cache and check it: nothing in it is executed.

    Prints the folder, which PEFT and transformers load. Add `--output` to have it in a place of your own.
    """
    with results_only():
        from ..hub.pull import pull_checked

        checked = pull_checked(
            repo, revision=revision, exports=exports, base_model=base_model, local_files_only=offline
        )
        folder = checked.folder if output is None else _copy(checked.folder, output, exports)
    facts = _facts(checked, folder)
    if as_json:
        print_json({"repo_id": repo, **facts})
        return
    print_facts(
        {
            "Folder": facts["folder"],
            "Base model": facts["base_model"],
            "Tasks": ", ".join(facts["tasks"]) or None,
            "Adapter": f"{facts['num_heads']} heads of rank {facts['r']}, router {facts['router']}",
            "Checked": f"{facts['layers']} layers, {facts['parameters']:,} parameters, all finite",
            "Digest": facts["digest"],
        }
    )


def _facts(checked: CheckedAdapter, folder: Path) -> dict[str, Any]:
    config = checked.config
    return {
        "folder": str(folder),
        "base_model": checked.base_model,
        "base_model_revision": checked.base_model_revision,
        "tasks": list(config.tasks or ()),
        "r": config.r,
        "num_heads": config.num_heads,
        "router": config.router,
        "layers": len(checked.layers),
        "parameters": checked.num_parameters,
        "digest": checked.digest,
    }


def _copy(source: Path, target: Path, exports: bool) -> Path:
    """
    Copy what belongs to the adapter: not links into the cache, and nothing that was in the target is replaced.

    Raises:
        FileExistsError: If the target has something in it.
    """
    import shutil

    from ..hub.layout import FileKind, classify, published_files

    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty. Name a new folder with `--output`.")
    for name in published_files(source):
        if classify(name) is FileKind.EXPORT and not exports:
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return target
