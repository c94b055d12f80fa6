"""`rlora zoo`: published adapters, from what their cards say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .options import Command, Group, JsonOption, RevisionOption
from .output import note, percent, print_facts, print_json, print_table, results_only, shorten


app = typer.Typer(help="Find, compare and install published adapters.", no_args_is_help=True, cls=Group)


@app.command(cls=Command)
def search(
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Only adapters of this base model.", show_default=False)
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="Only adapters trained on this task.", show_default=False)
    ] = None,
    author: Annotated[
        str | None, typer.Option("--author", help="Only those of this user or organization.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="At most so many.")] = 20,
    sort: Annotated[
        Literal["downloads", "updated", "accuracy"],
        typer.Option("--sort", metavar="ORDER", help="downloads, updated or accuracy: which come first."),
    ] = "downloads",
    as_json: JsonOption = False,
) -> None:
    """Search the Hub for R-LoRA adapters."""
    with results_only():
        from rlora_trl.zoo import search as search_zoo

        found = search_zoo(base_model=base_model, task=task, author=author, limit=limit, sort=sort)
    if as_json:
        print_json([info.to_dict() for info in found])
    elif not found:
        note("No adapter was found.")
    else:
        columns = ["repository", "base model", "tasks", "accuracy, %", "r", "heads", "downloads", "updated"]
        rows = [_found_row(info) for info in found]
        if any(info.private for info in found):
            columns.append("visible to")
            rows = [[*row, "owners" if info.private else "all"] for row, info in zip(rows, found, strict=True)]
        print_table(columns, rows)


def _found_row(info: Any) -> list[Any]:
    updated = info.last_modified.date().isoformat() if info.last_modified else None
    accuracy = percent(info.mean("accuracy"))
    settings = [info.r, info.num_heads, info.downloads]
    return [info.repo_id, info.base_model, shorten(info.tasks), accuracy, *settings, updated]


@app.command(cls=Command)
def compare(
    repos: Annotated[
        list[str], typer.Argument(metavar="REPO...", help="user/name or user/name@revision.", show_default=False)
    ],
    metric: Annotated[str, typer.Option("--metric", help="What to compare.")] = "accuracy",
    as_json: JsonOption = False,
) -> None:
    """Compare published adapters by task, from what their cards say."""
    with results_only():
        from rlora_trl.zoo import compare as compare_zoo

        comparison = compare_zoo(repos, metric=metric)
    if as_json:
        print_json(comparison.to_dict())
        return
    print_table([metric, *comparison.names], comparison.cells)


@app.command(cls=Command)
def show(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="user/name.", show_default=False)],
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what the card of an adapter says."""
    with results_only():
        from rlora_trl.zoo import show as show_adapter

        info = show_adapter(repo, revision=revision)
    if as_json:
        print_json(info.to_dict())
        return
    print_facts(
        {
            "Repository": info.repo_id,
            "Visible to": "owners" if info.private else None,
            "Base model": info.base_model,
            "Adapter": f"{info.num_heads} heads of rank {info.r}, router {info.router}" if info.r else None,
            "Commit": info.sha,
            "Digest": info.digest,
            "Downloads": info.downloads,
            "Updated": info.last_modified.date().isoformat() if info.last_modified else None,
            "Exports": ", ".join(info.exports) or None,
        }
    )
    if info.tasks:
        typer.echo()
        _show_metrics(info)


def _show_metrics(info: Any) -> None:
    from rlora_trl.zoo.compare import BASE_METRIC, Comparison, format_metric

    names = list(dict.fromkeys(name for values in info.metrics.values() for name in values))
    comparison = Comparison((info,), info.tasks)
    rows = []
    for task in info.tasks:
        row = [task, *(format_metric(name, info.metrics.get(task, {}).get(name)) for name in names)]
        gain = comparison.gain(task, info)
        rows.append([*row, *(["-" if gain is None else f"{100 * gain:+.1f}"] if BASE_METRIC in names else [])])
    print_table(["task", *names, *(["gain"] if BASE_METRIC in names else [])], rows)


@app.command(cls=Command)
def pin(
    repos: Annotated[
        list[str], typer.Argument(metavar="REPO...", help="user/name or user/name@revision.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="Manifest to write.")] = Path("zoo.yaml"),
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="Refuse an adapter of another base model.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a manifest of adapters as they are now: each is fetched, checked, and pinned to its commit."""
    with results_only():
        from rlora_trl.zoo import Manifest

        manifest = Manifest.pin(repos, base_model=base_model)
        manifest.save(output)
    if as_json:
        print_json(manifest)
        return
    rows = [[adapter.name, adapter.repo_id, adapter.revision] for adapter in manifest.adapters]
    print_table(["adapter", "repository", "commit"], rows)
    note(f"Wrote {output}. `rlora zoo install {output}` fetches these.")


@app.command(cls=Command)
def install(
    manifest: Annotated[Path, typer.Argument(metavar="[MANIFEST]", help="File that pins adapters.")] = Path(
        "zoo.yaml"
    ),
    offline: Annotated[bool, typer.Option("--offline", help="Use the cache alone.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch and check all adapters that a manifest pins."""
    with results_only():
        from rlora_trl.zoo import Manifest

        folders = Manifest.load(manifest).install(local_files_only=offline)
    if as_json:
        print_json(folders)
    else:
        print_table(["adapter", "folder"], list(folders.items()))
