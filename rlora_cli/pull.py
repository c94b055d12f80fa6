"""`rlora pull`: download an adapter and check it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .loading import refuse_missing_folder
from .output import note, print_facts, print_json, results_only


if TYPE_CHECKING:
    from rlora_trl.files.checks import CheckedAdapter

_SCRATCH = ".rlora-pull-"  # start of the name of a folder that is being copied


def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="user/name, or a folder to check.")],
    revision: options.Revision = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FOLDER", help="Copy the adapter into this folder.")
    ] = None,
    exports: Annotated[bool, typer.Option("--exports", help="Also download its plain-LoRA exports.")] = False,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Refuse an adapter of another base model.")
    ] = None,
    local_files_only: Annotated[bool, typer.Option("--offline", help="Use only the cache.")] = False,
    verify: Annotated[
        Path | None,
        typer.Option("--verify", metavar="KEY", help="Refuse an adapter that this public key (PEM) has not signed."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Download an adapter from the Hub into the cache and check it. Nothing in it is executed.

    Prints the folder, which PEFT and transformers can load. Use `--output` to get a copy.
    """
    with results_only():
        from rlora_trl.hub.pull import pull_checked

        refuse_missing_folder(repo)
        checked = pull_checked(
            repo,
            revision=revision,
            exports=exports,
            base_model=base_model,
            local_files_only=local_files_only,
            verify=verify,
        )
        folder = checked.folder if output is None else _copy(checked, output, exports)
    facts = {**_facts(checked, folder), "signed_by": None if verify is None else str(verify)}
    if as_json:
        print_json(facts)
        return
    print_facts(
        {
            "Repository": facts["repo_id"],
            "Commit": facts["commit"],
            "Folder": facts["folder"],
            "Base model": facts["base_model"],
            "Tasks": ", ".join(facts["tasks"]),
            "Adapter": f"{facts['num_heads']} heads of rank {facts['r']}, router {facts['router']}",
            "Checked": f"{facts['layers']} layers, {facts['parameters']:,} parameters, all finite",
            "Digest": facts["digest"],
            "Signature": None if verify is None else f"by the key in {verify}",
        }
    )
    # PEFT's class for other models needs the base model.
    causal = checked.config.task_type == "CAUSAL_LM"
    name, base = ("AutoPeftModelForCausalLM", "") if causal else ("PeftModel", "base, ")
    note(
        "\nTo load it:\n\n"
        "    import rlora_trl\n"
        f"    from peft import {name}\n"
        f"    model = {name}.from_pretrained({base}{str(folder)!r})"
    )


def _facts(checked: CheckedAdapter, folder: Path) -> dict[str, Any]:
    # In the cache, `models--user--name/snapshots/<commit>`.
    cached = checked.folder.parent.name == "snapshots"
    parts = checked.folder.parent.parent.name.split("--", 2) if cached else []
    config = checked.config
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
    Copy the files of an adapter, following links into the cache. A target with the same adapter is not changed.

    Files get their names when all of them are copied, so that a full disk or an interruption leaves none that is cut
    off. A target that has only some of the files, all whole, gets the others.

    Raises:
        FileExistsError: If the target is a file, or a folder with other files.
        OSError: If the files can't be written, as on a full disk. Those that were copied are removed.
    """
    import shutil
    from tempfile import mkdtemp

    from rlora_trl.files.layout import FileKind, classify, published_files

    names = [name for name in published_files(checked.folder) if exports or classify(name) is not FileKind.EXPORT]
    if target.is_file():
        raise FileExistsError(f"{target} is a file. Name a new folder with `--output`.")
    missing = _missing(checked.folder, target, names)
    if not missing:
        note(f"{target} has this adapter already. Nothing was copied.")
        return target

    # In the target, which may be a mount point or the current directory, and so can't be replaced itself.
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    scratch = Path(mkdtemp(prefix=_SCRATCH, dir=target))
    try:
        for name in missing:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checked.folder / name, scratch / name)
        for name in missing:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).replace(target / name)
    except OSError as error:
        raise OSError(
            error.errno,
            f"The adapter can't be copied into {target}: {error.strerror}. What was copied is removed. Make room, or "
            "name another folder with `--output`",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if is_new and not any(target.iterdir()):
            target.rmdir()
    return target


def _missing(source: Path, target: Path, names: list[str]) -> list[str]:
    """
    Files of an adapter that a target lacks. What an earlier copy left when it was killed is removed.

    Raises:
        FileExistsError: If the target has other files than those of this adapter.
    """
    import filecmp
    import shutil

    from rlora_trl.files.layout import CONFIG_NAME, WEIGHTS_NAME, adapter_files

    if not target.exists():
        return names
    for leftover in target.glob(f"{_SCRATCH}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    missing = [name for name in names if not (target / name).exists()]

    # Files may have been added to a whole adapter. Otherwise all must be what an earlier copy of this one left.
    compared = {CONFIG_NAME, WEIGHTS_NAME}
    if missing:
        tops = {name.split("/")[0] for name in names}
        compared = {*adapter_files(target), *(path.name for path in target.iterdir() if path.name not in tops)}
    same, _, _ = filecmp.cmpfiles(source, target, compared & {*names}, shallow=False)
    if len(same) < len(compared):
        raise FileExistsError(f"{target} is not empty, and has other files. Name a new folder with `--output`.")
    return missing
