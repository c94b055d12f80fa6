"""`rlora analyze`: how alike the heads are, and which ones each task uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .loading import find_adapter, load_adapter, load_rows, local_record, say_saved
from .options import (
    AdapterArgument,
    BaseOption,
    BatchSizeOption,
    Command,
    DtypeOption,
    JsonOption,
    LimitOption,
    LoadIn4BitOption,
    RevisionOption,
    SplitOption,
    TaskColumnOption,
    help_of,
)
from .output import note, print_json, print_table, print_text, results_only


if TYPE_CHECKING:
    import torch

    from rlora_trl.files.head_weights import HeadWeights


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("analyze", cls=Command, help=help_of(analyze))(analyze)


def analyze(
    adapter: AdapterArgument,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Measure which heads each task uses on these rows: a JSON-lines, Parquet or CSV file, a folder, or "
            "a data set on the Hub.",
            show_default=False,
        ),
    ] = None,
    split: SplitOption = None,
    task_column: TaskColumnOption = None,
    limit: LimitOption = 64,
    batch_size: BatchSizeOption = 16,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FOLDER",
            help="Draw the figures figures/head_similarity.png and figures/routing.png in this folder.",
            show_default=False,
        ),
    ] = None,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    load_in_4bit: LoadIn4BitOption = False,
    revision: RevisionOption = None,
    save: Annotated[
        bool, typer.Option("--save", help="Record the mixtures in the adapter's folder, for its card and its push.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show how alike the heads of an adapter are, and which ones each task uses.

    The similarity is the cosine between head matrices: 1 for heads that are copies of each other, 0 for heads that
    have learned independent things. It needs no base model; measuring on data does.
    """
    if save and data is None:
        raise typer.BadParameter("`--save` records mixtures, which are measured on data. Add `--data`.")
    with results_only():
        from rlora_trl.analysis.heads import head_similarities

        checked, mixtures = find_adapter(adapter, revision), None
        record = local_record(checked, adapter) if save else None
        if data is not None:
            from rlora_trl.analysis.measuring import measure_head_weights

            rows = load_rows(checked, data, split, task_column)
            loaded = load_adapter(checked, base=base, dtype=dtype, load_in_4bit=load_in_4bit)
            mixtures = measure_head_weights(
                loaded.model, loaded.tokenizer, rows, batch_size=batch_size, max_rows=limit
            )
        similarities = head_similarities(checked.folder) if checked.config.num_heads > 1 else {}
        if record is not None:
            say_saved(replace(record, mixtures=mixtures).save(checked.folder))
        known = mixtures or (checked.record.mixtures if checked.record else None)
        figures = _draw(output, similarities, known) if output is not None else []
    if not as_json:
        _show(similarities, known)
        for figure in figures:
            note(f"Drew {figure}")
        return
    print_json(
        {
            "adapter": adapter,
            "similarities": similarities,
            "mean_similarity": _overall(similarities),
            "mixtures": known.to_dict() if known else None,
            "figures": figures,
        }
    )


def _draw(output: Path, similarities: dict[str, torch.Tensor], mixtures: HeadWeights | None) -> list[str]:
    from rlora_trl.analysis.figures import plot_head_similarity, plot_routing

    folder = output / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    if similarities:
        plot_head_similarity(similarities, folder / "head_similarity.png")
        drawn.append(str(folder / "head_similarity.png"))
    if mixtures is not None:
        plot_routing(mixtures, folder / "routing.png")
        drawn.append(str(folder / "routing.png"))
    return drawn


def _between(matrix: torch.Tensor) -> list[float]:
    """Cosines of all pairs of different heads."""
    heads = len(matrix)
    return [float(matrix[i][j]) for i in range(heads) for j in range(i + 1, heads)]


def _overall(similarities: dict[str, torch.Tensor]) -> float | None:
    values = [value for matrix in similarities.values() for value in _between(matrix)]
    return sum(values) / len(values) if values else None


def _show(similarities: dict[str, torch.Tensor], mixtures: HeadWeights | None) -> None:
    if not similarities:
        print_text("The adapter has one head: there is nothing to compare.")
    else:
        kinds: dict[str, list[torch.Tensor]] = {}
        for layer, matrix in similarities.items():
            kinds.setdefault(layer.rsplit(".", 1)[-1], []).append(matrix)
        rows = []
        for kind, matrices in kinds.items():
            values = [value for matrix in matrices for value in _between(matrix)]
            rows.append([kind, len(matrices), sum(values) / len(values), min(values), max(values)])
        if len(rows) > 1:
            everything = [value for matrix in similarities.values() for value in _between(matrix)]
            rows.append(
                ["mean of layers", len(similarities), _overall(similarities), min(everything), max(everything)]
            )
        print_table(["projection", "layers", "mean", "least", "most"], rows, title="Cosine between heads")
    if mixtures is not None:
        print_text("")
        _show_mixtures(mixtures)


def _show_mixtures(mixtures: HeadWeights) -> None:
    heads = len(next(iter(mixtures.weights.values()))[0])
    rows: list[list[Any]] = []
    for task, weights in mixtures.weights.items():
        means = weights.mean(0).tolist()
        rows.append([task, mixtures.tokens.get(task), *(f"{value:.3f}" for value in means)])
    columns = ["task", "tokens", *(f"head {index}" for index in range(1, heads + 1))]
    print_table(columns, rows, title="Mean weight of each head, over layers")
