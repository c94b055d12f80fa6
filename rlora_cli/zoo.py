"""`rlora zoo`: published adapters, by their cards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import options
from .options import Command, Group
from .output import note, percent, print_facts, print_json, print_table, print_text, results_only, shorten


if TYPE_CHECKING:
    from rlora_trl.zoo import AdapterInfo


class ZooGroup(Group):
    """The commands of the zoo, and what replaces those of earlier versions."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in ("pin", "install"):
            ctx.fail(
                f"`rlora zoo {args[0]}` is gone, as are manifests of adapters. Pull each adapter at its commit: "
                "`rlora pull REPO --revision SHA`."
            )
        return super().resolve_command(ctx, args)


app = typer.Typer(help="Find and compare published adapters.", no_args_is_help=True, cls=ZooGroup)


@app.command(cls=Command)
def search(
    base_model: Annotated[str | None, typer.Option("--base-model", help="Only adapters of this base model.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="Only adapters trained on this task.")] = None,
    author: Annotated[str | None, typer.Option("--author", help="Only adapters of this user or organization.")] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="Maximum number of results.")] = 20,
    sort: Annotated[
        Literal["downloads", "updated", "accuracy"],
        typer.Option("--sort", metavar="ORDER", help="Order of the results: downloads, updated or accuracy."),
    ] = "downloads",
    as_json: options.Json = False,
) -> None:
    """Search the Hub for R-LoRA adapters."""
    with results_only():
        from rlora_trl.zoo import search as search_zoo

        results = search_zoo(base_model=base_model, task=task, author=author, limit=limit, sort=sort)
    if as_json:
        print_json([info.to_dict() for info in results])
        return
    if not results:
        note("No adapter was found.")
        return
    columns = ["repository", "base model", "tasks", "accuracy, %", "r", "heads", "downloads", "updated"]
    rows = [_result_row(info) for info in results]
    if any(info.private for info in results):
        columns.append("visible to")
        rows = [[*row, "owners" if info.private else "all"] for row, info in zip(rows, results, strict=True)]
    print_table(columns, rows)


def _result_row(info: AdapterInfo) -> list[Any]:
    accuracy = percent(info.mean("accuracy"))
    settings = [info.r, info.num_heads, info.downloads]
    return [info.repo_id, info.base_model, shorten(info.tasks), accuracy, *settings, _updated(info)]


def _updated(info: AdapterInfo) -> str | None:
    return info.last_modified.date().isoformat() if info.last_modified else None


@app.command(cls=Command)
def compare(
    repo_ids: options.Repositories,
    metric: Annotated[str, typer.Option("--metric", help="Metric to compare.")] = "accuracy",
    as_json: options.Json = False,
) -> None:
    """Compare published adapters by task, with the metrics in their cards."""
    with results_only():
        from rlora_trl.zoo import compare as compare_zoo

        comparison = compare_zoo(repo_ids, metric=metric)
    if as_json:
        print_json(comparison.to_dict())
        return
    print_table([metric, *comparison.names], comparison.cells)


@app.command(cls=Command)
def show(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="user/name.")],
    revision: options.Revision = None,
    as_json: options.Json = False,
) -> None:
    """Show the facts in the card of an adapter."""
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
            "Updated": _updated(info),
            "Exports": ", ".join(info.exports),
        }
    )
    if info.tasks:
        print_text("")
        _show_metrics(info)


def _show_metrics(info: AdapterInfo) -> None:
    from rlora_trl.zoo.compare import BASE_METRIC, Comparison, format_metric

    names = list(dict.fromkeys(name for values in info.metrics.values() for name in values))
    rows = [
        [task, *(format_metric(name, info.metrics.get(task, {}).get(name)) for name in names)] for task in info.tasks
    ]
    columns = ["task", *names]
    if BASE_METRIC in names:
        columns.append("gain")
        comparison = Comparison((info,), info.tasks)
        for row in rows:
            gain = comparison.gain(row[0], info)
            row.append("-" if gain is None else f"{100 * gain:+.1f}")
    print_table(columns, rows)
