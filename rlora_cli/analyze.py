"""`rlora analyze`: how similar the heads are, and which ones each task uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .loading import find_adapter, load_adapter, load_rows, local_record, note_saved
from .output import note, print_json, print_table, print_text, results_only


if TYPE_CHECKING:
    import torch

    from rlora_trl.files.head_weights import HeadWeights


def analyze(
    adapter: options.Adapter,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Measure the head weights of each task on these rows: a JSON-lines, Parquet or CSV file, a folder, "
            "or a dataset on the Hub.",
        ),
    ] = None,
    split: options.Split = None,
    task_column: options.TaskColumn = None,
    max_rows: options.Limit = 64,
    batch_size: options.BatchSize = 16,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FOLDER",
            help="Draw figures/head_similarity.png and figures/routing.png in this folder.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE",
            help="Write an HTML page: head weights by task and layer, similarity of the heads by layer and over "
            "training, effective rank of the delta. One file that loads nothing from elsewhere.",
        ),
    ] = None,
    base: options.Base = None,
    dtype: options.Dtype = "auto",
    load_in_4bit: options.LoadIn4Bit = False,
    revision: options.Revision = None,
    save: Annotated[
        bool, typer.Option("--save", help="Record the head weights in the adapter's folder, for its card and push.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Show how similar the heads of an adapter are, and which ones each task uses.

    Similarity is the cosine between head matrices: 1 for identical heads, 0 for heads that have nothing in common.
    Only measuring on data loads the base model.
    """
    if save and data is None:
        raise typer.BadParameter("`--save` records head weights, which are measured on data. Add `--data`.")
    with results_only():
        from rlora_trl.analysis.heads import head_similarities, mean_similarity
        from rlora_trl.analysis.measuring import measure_head_weights

        checked, measured = find_adapter(adapter, revision), None
        record = local_record(checked, adapter) if save else None

        # Head weights, measured or recorded in training.
        if data is not None:
            rows = load_rows(checked, data, split, task_column)
            loaded = load_adapter(checked, base=base, dtype=dtype, load_in_4bit=load_in_4bit)
            measured = measure_head_weights(
                loaded.model, loaded.tokenizer, rows, batch_size=batch_size, max_rows=max_rows
            )
        if record is not None:
            note_saved(replace(record, mixtures=measured).save(checked.folder))
        weights = measured or (checked.record.mixtures if checked.record else None)

        similarities = head_similarities(checked.folder) if checked.config.num_heads > 1 else {}
        figures = _draw(output, similarities, weights) if output is not None else []
        if report is not None:
            from rlora_trl.analysis import write_report

            report.parent.mkdir(parents=True, exist_ok=True)
            write_report(checked.folder, report, head_weights=weights, name=adapter)
    if as_json:
        print_json(
            {
                "adapter": adapter,
                "similarities": similarities,
                "mean_similarity": mean_similarity(similarities) if similarities else None,
                "mixtures": weights.to_dict() if weights else None,
                "figures": figures,
                "report": report,
            }
        )
        return

    _show_similarities(similarities)
    if weights is not None:
        print_text("")
        _show_weights(weights)
    for figure in figures:
        note(f"Drew {figure}")
    if report is not None:
        note(f"Wrote {report}")


def _draw(output: Path, similarities: dict[str, torch.Tensor], weights: HeadWeights | None) -> list[str]:
    from rlora_trl.analysis.figures import plot_head_similarity, plot_routing

    folder = output / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figures = []
    if similarities:
        plot_head_similarity(similarities, folder / "head_similarity.png")
        figures.append(str(folder / "head_similarity.png"))
    if weights is not None:
        plot_routing(weights, folder / "routing.png")
        figures.append(str(folder / "routing.png"))
    return figures


def _show_similarities(similarities: dict[str, torch.Tensor]) -> None:
    if not similarities:
        print_text("The adapter has one head: there is nothing to compare.")
        return

    kinds: dict[str, list[torch.Tensor]] = {}
    for layer, matrix in similarities.items():
        kinds.setdefault(layer.rsplit(".", 1)[-1], []).append(matrix)
    if len(kinds) > 1:
        kinds["mean of layers"] = list(similarities.values())

    rows = []
    for kind, matrices in kinds.items():
        pairs = _between_heads(matrices)
        rows.append([kind, len(matrices), pairs.mean().item(), pairs.min().item(), pairs.max().item()])
    print_table(["projection", "layers", "mean", "least", "most"], rows, title="Cosine between heads")


def _between_heads(matrices: list[torch.Tensor]) -> torch.Tensor:
    """The cosines of different heads in matrices `[N, N]`."""
    import torch

    stacked = torch.stack(matrices)  # [L, N, N]
    return stacked[:, ~torch.eye(stacked.shape[1], dtype=torch.bool)]  # [L, N * (N - 1)]


def _show_weights(weights: HeadWeights) -> None:
    rows: list[list[Any]] = []
    for task, by_layer in weights.weights.items():
        means = by_layer.mean(0).tolist()  # [N]
        rows.append([task, weights.tokens.get(task), *(f"{value:.3f}" for value in means)])
    heads = [f"head {number}" for number in range(1, len(rows[0]) - 1)]
    print_table(["task", "tokens", *heads], rows, title="Mean weight of each head, over layers")
