"""`convert_adapter`: reads an adapter of other code, asks for what its files lack, and writes R-LoRA."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from ..files.checks import check_adapter
from ..files.layout import WEIGHTS_NAME
from ..files.record import AdapterRecord, TaskRecord
from ..reading import shorten
from ..tuner import RLoraConfig
from .authors import convert_authors, is_multi_head
from .plain_lora import convert_lora
from .report import FORMATS, ConversionReport, SourceFormat
from .source import Converted, Source, read_source, read_weights


_LOADED = "what the authors' own code computes when it loads these files on the original base model"


def convert_adapter(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    source_format: SourceFormat | None = None,
    use_rslora: bool | None = None,
    initial_values: str | os.PathLike | None = None,
    ignore_offset: bool = False,
    tasks: Sequence[str] | None = None,
    base_model: str | None = None,
) -> ConversionReport:
    """
    Convert an adapter of the authors' code of R-LoRA or HydraLoRA, or plain LoRA of PEFT, into an R-LoRA adapter.

    The tensors of the source are copied without a change, 16 bits into 32. Plain LoRA becomes one head with
    `router="uniform"`, which is the same function; [`export_lora`] converts it back. The authors' adapters keep their
    heads and routers. Files are read as those of a stranger: pickles run no code, and all sizes are checked.

    R-LoRA's code does not save two things that define what its adapter computed in training, so that they must be
    passed: whether the scaling was `lora_alpha / sqrt(r)`, and the initial values, whose delta it has subtracted from
    the base weights.

    Args:
        source (`str`):
            Folder with `adapter_config.json` and `adapter_model.bin` or `adapter_model.safetensors`.
        output_dir (`str`):
            Folder to write, which must not exist or be empty.
        source_format (`str`, *optional*):
            `"lora"`, `"hydralora"` or `"r-lora"`. Required for the last two, whose files can't be told apart.
        use_rslora (`bool`, *optional*):
            Whether the adapter was trained with the scaling `lora_alpha / sqrt(r)`. Required for `"r-lora"`: true if
            `--rank_stablization True` was set, as in the authors' script. Others have it in their files.
        initial_values (`str`, *optional*):
            For `"r-lora"`: folder or weights file of the same adapter, saved by the authors' code before the first
            step. Its delta is subtracted, as in training, and saved with the adapter.
        ignore_offset (`bool`, *optional*, defaults to `False`):
            For `"r-lora"` without `initial_values`: subtract nothing. The result is what the authors' own code
            computes when it loads the files, which is not the function in training, unless the heads started at zero
            or the base is the one that training changed.
        tasks (`Sequence[str]`, *optional*):
            Names of the tasks that the adapter was trained on.
        base_model (`str`, *optional*):
            Name or folder of its base model. Defaults to the one that its configuration names.

    Returns:
        [`ConversionReport`]: The facts about the conversion.

    Raises:
        AdapterCheckError: If a file is missing, damaged or hostile, or has something that R-LoRA can't represent.
        TypeError: If `tasks` is not a list of names.
        ValueError: If an argument is missing or does not fit the source, or the output folder is not empty. Nothing
            is written then.
    """
    # Everything that needs no tensors is checked first.
    target = _check_target(Path(output_dir))
    names = RLoraConfig(tasks=tasks).tasks  # type: ignore[arg-type]
    given = {"base_model_name_or_path": base_model, "tasks": names}
    adapter = read_source(source)
    found = _find_format(adapter, source_format)
    _check_arguments(adapter, found, use_rslora, initial_values, ignore_offset)

    if found == "lora":
        converted = convert_lora(adapter, given)
    else:
        initial = None if initial_values is None else read_weights(initial_values)
        converted = convert_authors(adapter, found, given, use_rslora=bool(use_rslora), initial=initial)
    report = _report(converted, found, output_dir, ignore_offset)
    _write(converted, report, target)
    return report


def _check_target(target: Path) -> Path:
    """The folder to write as an absolute path. Its parents are created."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`output_dir` {str(target)!r} exists, and is not an empty folder. Name another one.")
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _find_format(source: Source, stated: SourceFormat | None) -> SourceFormat:
    """The format of a source, as far as its files show it."""
    if stated is not None and stated not in FORMATS:
        raise ValueError(
            f"`source_format` must be one of {', '.join(map(repr, FORMATS))}, got {shorten(stated)}. Leave it out for "
            "plain LoRA."
        )
    if not is_multi_head(source):
        if stated in (None, "lora"):
            return "lora"
        raise ValueError(
            f"`source_format={stated!r}` does not fit {source.weights.path}, which has no `lora_route` and `lora_B0`. "
            "Leave it out for plain LoRA."
        )
    if stated is None or stated == "lora":
        raise ValueError(
            f"{source.weights.path} is of the authors' code of HydraLoRA or of R-LoRA (`lora_B0`, `lora_route`). Both "
            "write the same names, but R-LoRA's has changed the base weights in training. Pass "
            "`source_format='hydralora'` or `source_format='r-lora'`."
        )
    return stated


def _check_arguments(
    source: Source,
    source_format: SourceFormat,
    use_rslora: bool | None,
    initial_values: str | os.PathLike | None,
    ignore_offset: bool,
) -> None:
    """Ask for what the files lack, and refuse what contradicts them."""
    if source_format != "r-lora":
        if initial_values is not None or ignore_offset:
            name = "ignore_offset" if ignore_offset else "initial_values"
            raise ValueError(
                f"`{name}` belongs to `source_format='r-lora'`: {source_format} starts from heads of zeros, and has "
                "no initial delta. Leave it out."
            )
        stated = source_format == "lora" and bool(source.fields.get("use_rslora"))
        if use_rslora not in (None, stated):
            where = "its configuration says" if source_format == "lora" else "the authors' code of HydraLoRA has"
            raise ValueError(
                f"`use_rslora={use_rslora}` contradicts the source: {where} the scaling "
                f"{'lora_alpha / sqrt(r)' if stated else 'lora_alpha / r'}. Leave it out."
            )
        return

    if use_rslora is None:
        raise ValueError(
            "R-LoRA's code does not save its scaling. Pass `use_rslora=True` if it was trained with "
            "`--rank_stablization True`, as in the authors' script (the scaling is lora_alpha / sqrt(r)), else "
            "`use_rslora=False` (lora_alpha / r), which is also what the code computes when it loads the files again."
        )
    if (initial_values is not None) == ignore_offset:
        raise ValueError(
            "R-LoRA's code subtracts the initial delta from the base weights in training, and saves neither these nor "
            "the initial values. Pass `initial_values`, the adapter as the code saves it before the first step with "
            f"the same settings and seed, or `ignore_offset=True` for {_LOADED}; not both."
        )


def _report(
    converted: Converted, source_format: SourceFormat, path: str | os.PathLike, ignore_offset: bool
) -> ConversionReport:
    config = converted.config
    warnings = []
    if ignore_offset:
        warnings.append(
            f"No initial delta is subtracted: the adapter computes {_LOADED}, with the scaling that was passed. In "
            "training the outputs were others, unless the heads started at zero."
        )
    if config.saved_embeddings:
        warnings.append(
            f"The adapter holds {', '.join(config.saved_embeddings)} as a whole, which replace those of the base "
            "model."
        )
    if not config.base_model_name_or_path:
        warnings.append(
            "The adapter names no base model, so that it can only be loaded on a base that you pass. Set `base_model`."
        )
    return ConversionReport(
        path=os.fspath(path),
        source_format=source_format,
        layers=sum(name.endswith(".rlora_adapters.A") for name in converted.tensors),
        num_heads=config.num_heads,
        r=config.r,
        use_rslora=config.use_rslora,
        scaling=config.scaling(),
        router=config.router,
        offset="ignored" if ignore_offset else "initial values" if config.init_weights == "rlora" else "none",
        base_model=config.base_model_name_or_path,
        tasks=tuple(config.tasks or ()),
        warnings=tuple(warnings),
    )


def _write(converted: Converted, report: ConversionReport, target: Path) -> None:
    """Write the adapter beside its folder, check it as that of a stranger, and move it."""
    record = AdapterRecord(
        tasks=[TaskRecord(name=name) for name in report.tasks],
        hyperparameters={"converted_from": report.source_format, "converted_offset": report.offset},
    )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        stage = Path(scratch) / "adapter"
        stage.mkdir()
        save_file(converted.tensors, stage / WEIGHTS_NAME, metadata={"format": "pt"})
        converted.config.save_pretrained(str(stage))
        record.save(stage)
        check_adapter(stage)
        stage.replace(target)
