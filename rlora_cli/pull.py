"""`rlora pull`: fetch an adapter and check it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .loading import refuse_missing_folder
from .options import Command, JsonOption, RevisionOption, help_of
from .output import note, print_facts, print_json, results_only


if TYPE_CHECKING:
    from rlora_trl.files.checks import CheckedAdapter


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("pull", cls=Command, help=help_of(pull))(pull)


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
        from rlora_trl.hub.pull import pull_checked

        refuse_missing_folder(repo)
        checked = pull_checked(
            repo, revision=revision, exports=exports, base_model=base_model, local_files_only=offline
        )
        folder = checked.folder if output is None else _copy(checked, output, exports)
    facts = _facts(checked, folder)
    if as_json:
        print_json(facts)
        return
    print_facts(
        {
            "Repository": facts["repo_id"],
            "Commit": facts["commit"],
            "Folder": facts["folder"],
            "Base model": facts["base_model"],
            "Tasks": ", ".join(facts["tasks"]) or None,
            "Adapter": f"{facts['num_heads']} heads of rank {facts['r']}, router {facts['router']}",
            "Checked": f"{facts['layers']} layers, {facts['parameters']:,} parameters, all finite",
            "Digest": facts["digest"],
        }
    )
    auto = "AutoPeftModelForCausalLM" if _generates(checked) else "AutoPeftModel"
    note(
        "\nTo load it:\n\n"
        "    import rlora_trl\n"
        f"    from peft import {auto}\n"
        f"    model = {auto}.from_pretrained({str(folder)!r})"
    )


def _generates(checked: CheckedAdapter) -> bool:
    """Whether the adapter belongs to a model that generates text."""
    return str(getattr(checked.config.task_type, "value", checked.config.task_type)) in ("None", "CAUSAL_LM")


def _facts(checked: CheckedAdapter, folder: Path) -> dict[str, Any]:
    config = checked.config
    # In the cache, `models--user--name/snapshots/<commit>`.
    cached = checked.folder.parent.name == "snapshots"
    parts = checked.folder.parent.parent.name.split("--", 2) if cached else []
    return {
        "repo_id": "/".join(parts[1:]) or None,
        "commit": checked.folder.name if cached else None,
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


def _copy(checked: CheckedAdapter, target: Path, exports: bool) -> Path:
    """
    Copy what belongs to the adapter: not links into the cache, and nothing that was in the target is replaced. A
    target that has this adapter already is left as it is.

    Raises:
        FileExistsError: If the target has something else in it.
    """
    import shutil

    from rlora_trl.files.layout import FileKind, classify, published_files

    source = checked.folder
    names = [name for name in published_files(source) if exports or classify(name) is not FileKind.EXPORT]
    if target.is_file():
        raise FileExistsError(f"{target} is a file. Name a new folder with `--output`.")
    if target.exists() and any(target.iterdir()):
        if not _has_adapter(target, checked, names):
            raise FileExistsError(f"{target} is not empty, and has something else in it. Name a new folder.")
        note(f"{target} has this adapter already: the digests are the same. Nothing was copied.")
        return target
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return target


def _has_adapter(folder: Path, checked: CheckedAdapter, names: list[str]) -> bool:
    """Whether a folder has all files of an adapter, with the same configuration and tensors."""
    import filecmp

    from rlora_trl.files.checks import adapter_digest
    from rlora_trl.files.layout import CONFIG_NAME, WEIGHTS_NAME

    if not all((folder / name).is_file() for name in names):
        return False
    same_config = filecmp.cmp(folder / CONFIG_NAME, checked.folder / CONFIG_NAME, shallow=False)
    return same_config and adapter_digest(folder / WEIGHTS_NAME) == checked.digest
