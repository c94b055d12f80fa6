"""Publishing an adapter: collects the files of a push; `hub.commit` makes the commit.

The module imports both `hub` and `export`, which do not import each other.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from safetensors import SafetensorError
from transformers.utils import logging

from .analysis import head_similarities, plot_head_similarity, plot_routing
from .analysis.heads import MAX_COSINES
from .export import export_lora
from .export.loading import load_adapted
from .files.card_text import check_card
from .files.checks import WEIGHTS_LIMIT, AdapterCheckError, CheckedAdapter, check_adapter
from .files.config import CONFIG_LIMIT, read_config
from .files.layout import CARD_NAME, CONFIG_NAME, EXPORTS, FIGURES, FileKind, classify, published_files, task_slug
from .files.names import hub_name
from .files.record import AdapterRecord, TaskRecord, find_record
from .files.signatures import check_private_key
from .hub.card_reading import read_card, read_card_info
from .hub.commit import HEAD_SIMILARITY_FIGURE, ROUTING_FIGURE, Publication, commit_adapter
from .reading import check_regular_file, first_few, read_json, shorten
from .tuner.bnb_cpu import kept_quantized


logger = logging.get_logger(__name__)

Rows: TypeAlias = Sequence[Mapping[str, Any]]
_Source: TypeAlias = PeftModel | CheckedAdapter | str | os.PathLike


def push_adapter(
    adapter: _Source,
    repo_id: str,
    *,
    tasks: Sequence[str] | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    exports: Sequence[str] | None = None,
    base_model: str | None = None,
    tokenizer: Any = None,
    license: str | None = None,
    datasets: Sequence[str] | None = None,
    tags: Sequence[str] | None = None,
    commit_message: str | None = None,
    adapter_name: str | None = None,
    export_from: PeftModel | None = None,
    export_data: Mapping[str, Rows] | None = None,
    sign: str | os.PathLike | None = None,
) -> CommitInfo:
    """
    Publish an adapter on the Hub: weights, configuration, card, figures and exports in one commit.

    The card of the repository is updated; hand-written text in it stays. Other files of a training folder, such as
    checkpoints and training arguments, are not uploaded. After an interruption, repeat the call: files that were
    uploaded are not transferred a second time.

    Args:
        adapter (`PeftModel`, `str` or [`CheckedAdapter`]):
            A model with an R-LoRA adapter, or a folder that `save_pretrained` or the trainer wrote. A copy of the
            folder is checked and published; if [`check_adapter`] has checked the folder before, its tensors must still
            be the same.
        repo_id (`str`):
            `"user/name"` or `"organization/name"`, created if missing.
        tasks (`Sequence[str]`, *optional*):
            Names of the tasks, for an adapter without them in its configuration.
        metrics (`Mapping[str, Mapping[str, float]]`, *optional*):
            Metrics by task, such as `{"sst2": {"accuracy": 0.91}}`, added to those that training recorded.
        private (`bool`, *optional*), token (`str` or `bool`, *optional*):
            As in `huggingface_hub.create_repo`.
        revision (`str`, *optional*):
            Branch to commit to, created if missing. Defaults to the main one.
        create_pr (`bool`, *optional*, defaults to `False`):
            Open a pull request with the commit instead.
        exports (`Sequence[str]`, *optional*):
            Tasks to publish as plain LoRA adapters too, in `exports/<task>`; see [`export_lora`].
        base_model (`str`, *optional*):
            Hub name of the base model, required if the adapter was trained on a local folder.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Published with the adapter. Defaults to the one in the folder, if any.
        license (`str`, *optional*), datasets (`Sequence[str]`, *optional*), tags (`Sequence[str]`, *optional*):
            Metadata of the card, as in `huggingface_hub.ModelCardData`.
        commit_message (`str`, *optional*):
            Title of the commit. Defaults to `"Upload R-LoRA adapter"`.
        adapter_name (`str`, *optional*):
            The adapter of a model to publish. Defaults to the active one.
        export_from (`PeftModel`, *optional*):
            The adapter of the folder, loaded on its base model. Without it, exports load the base model.
        export_data (`Mapping[str, Sequence[Mapping]]`, *optional*):
            Rows by task, as for [`score_tasks`], on which the exports are compared with the adapter. With a model, it
            requires `tokenizer`.
        sign (`str`, *optional*):
            File with a private key (PEM, elliptic curve) to sign the adapter with; needs the extra `sign`. A push
            without it removes the signature of an earlier one, which its files would not match.

    Returns:
        `CommitInfo`: The commit; the head of the branch if nothing has changed.

    Raises:
        AdapterCheckError: If the adapter is damaged, incomplete, not finite or has changed since it was checked (then
            nothing was published), or the contents that the Hub lists differ from those of the push.
        ValueError: If the base model is a local folder and `base_model` is missing, a task is unknown, or `sign` has
            no such key.
        FileNotFoundError: If the folder has no adapter.
        OSError: If the temporary folder has no room for a copy of the adapter. Nothing was published.
        ConnectionError: If the adapter was published, but its files could not be listed for comparison.
        HfHubHTTPError: If the Hub refuses the commit, or transient errors persist after a few attempts.
    """
    if sign is not None:
        check_private_key(sign)
    api = HfApi(token=token)
    with _scratch_folder() as scratch:
        folder = scratch / "adapter"

        # A copy, which training can't change during the upload.
        record, card = _stage_files(adapter, folder, adapter_name)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

        # Facts from the caller, then the only pass over the weights.
        config = _complete_config(folder, base_model, tasks)
        record = _complete_record(record, config, metrics or {})
        checked = _check_staged(adapter, folder)

        # Exports and figures.
        if exports:
            _check_export_tasks(exports, record, checked, export_data)
            model = adapter if isinstance(adapter, PeftModel) else export_from
            options = {"token": token, "data": export_data, "tokenizer": tokenizer}
            made = _stage_exports(model, adapter_name, folder, exports, record, repo_id, **options)
            record = replace(record, exports=made)
        _stage_figures(checked, record)

        # The repository, and the commit.
        record = _with_base_license(api, record)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        publication = Publication(
            checked, record, card, license=license, datasets=datasets or (), tags=tags or (), sign=sign
        )
        message = commit_message or "Upload R-LoRA adapter"
        return commit_adapter(api, repo_id, publication, message=message, revision=revision, create_pr=create_pr)


@contextmanager
def _scratch_folder() -> Generator[Path, None, None]:
    """A temporary folder, and a remedy where it has no room."""
    with tempfile.TemporaryDirectory(prefix="rlora-push-") as scratch:
        try:
            yield Path(scratch)
        except (OSError, SafetensorError) as error:
            # safetensors has the number in its message only.
            number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
            code = int(number[1]) if number else getattr(error, "errno", None)
            if code not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                code,
                f"{os.strerror(code)}: the folder for temporary files has no room for a copy of the adapter. Nothing "
                "was published. Free some space, or set `TMPDIR` to a folder on another disk",
                scratch,
            ) from error


def _stage_files(adapter: _Source, folder: Path, adapter_name: str | None) -> tuple[AdapterRecord | None, str | None]:
    """
    Copy or save the files of an adapter into a new folder, without exports, record and card.

    Returns:
        `tuple`: The record and the local card, `None` for those that are missing.
    """
    folder.mkdir(parents=True)
    if isinstance(adapter, PeftModel):
        return _save_model(adapter, folder, adapter_name), None
    source = Path(adapter.folder if isinstance(adapter, CheckedAdapter) else adapter)
    if not (source / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"{source} has no {CONFIG_NAME}: it is not the folder of an adapter. Pass a folder that `save_model` or "
            "`save_pretrained` wrote, or the model."
        )

    # Of a local card, the text by hand is published.
    card = None
    if (source / CARD_NAME).is_file():
        check_card(source / CARD_NAME)
        card = read_card(source / CARD_NAME)

    for path in published_files(source):
        # Record, card and signature are written at the commit; exports are made for this push, or kept on the Hub.
        if classify(path) not in (FileKind.EXPORT, FileKind.RECORD, FileKind.CARD, FileKind.SIGNATURE):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            check_regular_file(source / path, WEIGHTS_LIMIT)
            shutil.copyfile(source / path, folder / path)
    return AdapterRecord.load(source), card


def _save_model(model: PeftModel, folder: Path, adapter_name: str | None) -> AdapterRecord | None:
    name = adapter_name or model.active_adapter
    if name not in model.peft_config:
        raise ValueError(f"The model has no adapter {name!r}; it has {first_few(model.peft_config, 10)}.")
    record = find_record(model.peft_config[name])
    with kept_quantized(model):
        model.save_pretrained(str(folder), selected_adapters=[name])
    if name != "default":  # PEFT puts adapters of other names into a subfolder
        for path in (folder / name).iterdir():
            shutil.move(path, folder / path.name)
        (folder / name).rmdir()
    (folder / CARD_NAME).unlink(missing_ok=True)  # PEFT's
    return record


def _complete_config(folder: Path, base_model: str | None, tasks: Sequence[str] | None) -> dict[str, Any]:
    """Write the public name of the base model, and missing tasks, into the configuration."""
    path = folder / CONFIG_NAME
    read_config(path)  # which may be a stranger's
    config = read_json(path, limit=CONFIG_LIMIT)
    recorded = config.get("base_model_name_or_path")
    name = base_model or recorded
    if hub_name(name) is None:
        what = f"the local folder {name!r}, which others can't load" if name else "missing from its configuration"
        raise ValueError(
            f"The adapter's base model is {what}. Pass its name on the Hub as `base_model`, for example "
            "`organization/name`."
        )

    completed = dict(config)
    if name != recorded:
        completed |= {"base_model_name_or_path": name, "revision": None}
    if tasks is not None and not config.get("tasks"):
        completed["tasks"] = list(tasks)
    if completed != config:
        path.write_text(json.dumps(completed, indent=2, sort_keys=True), encoding="utf-8")
    # Tasks that the configuration lacks go into the record only.
    names = [*(completed.get("tasks") or ()), *(tasks or ())]
    return {**completed, "tasks": list(dict.fromkeys(names))}


def _complete_record(
    record: AdapterRecord | None, config: Mapping[str, Any], metrics: Mapping[str, Mapping[str, float]]
) -> AdapterRecord:
    """The record with the base model and all tasks of the configuration, and the caller's metrics."""
    record = record or AdapterRecord()
    name = config["base_model_name_or_path"]
    if record.base_model != name:
        record = replace(record, base_model=name, base_model_revision=None)

    tasks = {task.name: task for task in record.tasks}
    for task in config["tasks"]:
        tasks.setdefault(task, TaskRecord(task))
    for task, values in metrics.items():
        if task not in tasks:
            raise ValueError(
                f"`metrics` has a task {shorten(task)}, and the adapter's are {first_few(tasks, 10) or '(none)'}. Add "
                "it to `tasks`."
            )
        floats = {metric: float(value) for metric, value in values.items()}
        intervals = {name: bounds for name, bounds in tasks[task].intervals.items() if name not in floats}
        tasks[task] = replace(tasks[task], metrics={**tasks[task].metrics, **floats}, intervals=intervals)
    # Exports in the record of a pulled adapter belong to the repository that it was pulled from.
    return replace(record, tasks=list(tasks.values()), exports=[])


def _check_staged(adapter: _Source, folder: Path) -> CheckedAdapter:
    """Check the copy, which nothing else writes into: the folder may have changed since it was checked or listed."""
    checked = check_adapter(folder)
    if isinstance(adapter, CheckedAdapter) and checked.sha256 != adapter.sha256:
        raise AdapterCheckError(
            f"The weights in {adapter.folder} have changed since they were checked: their digest was "
            f"{adapter.digest}, and is {checked.digest}. Nothing was published. Check the folder again."
        )
    return checked


def _check_export_tasks(
    tasks: Sequence[str], record: AdapterRecord, checked: CheckedAdapter, data: Mapping[str, Rows] | None
) -> None:
    """Refuse unknown tasks, and those without head weights, before a model is loaded."""
    names = {task.name for task in record.tasks}
    unknown = [task for task in tasks if task not in names]
    if unknown:
        raise ValueError(
            f"`exports` names {first_few(map(repr, unknown))}, and the adapter's tasks are "
            f"{first_few(names, 10) or '(none)'}. Use these names."
        )
    measured = set(record.mixtures.weights if record.mixtures is not None else ()) | set(data or ())
    lacking = [task for task in tasks if task not in measured]
    if lacking and checked.config.router in ("softmax", "top_k") and checked.config.num_heads > 1:
        raise ValueError(
            f"`exports` needs the mean head weights for {first_few(map(repr, lacking))}, which training did not "
            "record. Pass rows to measure them on: `export_data={task: rows}` and `tokenizer`."
        )


def _stage_exports(
    model: PeftModel | None,
    adapter_name: str | None,
    folder: Path,
    tasks: Sequence[str],
    record: AdapterRecord,
    repo_id: str,
    *,
    token: str | bool | None,
    data: Mapping[str, Rows] | None,
    tokenizer: Any,
) -> list[dict[str, Any]]:
    """
    Export tasks as plain LoRA adapters into the folder.

    Returns:
        `list[dict]`: The entries for the record; see [`AdapterRecord`].
    """
    source: Any = model
    name = adapter_name or ("default" if model is None else model.active_adapter)
    if model is None:
        source, own_tokenizer = load_adapted(str(folder), name, token=token)
        tokenizer = tokenizer if tokenizer is not None else own_tokenizer

    made = []
    with _public_base(source, name, record.base_model):
        for task in tasks:
            path = f"{EXPORTS}/{task_slug(task)}"
            report = export_lora(
                source,
                folder / path,
                adapter_name=name,
                task=task,
                routing=record.mixtures,
                data={task: data[task]} if data and task in data else None,
                tokenizer=tokenizer,
                published_as=(repo_id, path) if "/" in repo_id else None,  # else the Hub adds the user's name
            )
            made.append(
                {
                    "task": task,
                    "path": path,
                    "rank": report.rank,
                    "exact": report.exact,
                    "kl": report.kl,
                    "accuracy": report.accuracy_export,
                    "accuracy_dynamic": report.accuracy_dynamic,
                    "rows": report.rows,
                }
            )
    return made


@contextmanager
def _public_base(model: PeftModel, adapter_name: str, base_model: str | None) -> Generator[None, None, None]:
    """Set the public name of the base in an adapter's configuration, which exports copy."""
    config = model.peft_config[adapter_name]
    before, config.base_model_name_or_path = config.base_model_name_or_path, base_model
    try:
        yield
    finally:
        config.base_model_name_or_path = before


def _stage_figures(checked: CheckedAdapter, record: AdapterRecord) -> None:
    """Draw the figures of the card, if matplotlib is installed."""
    if find_spec("matplotlib") is None:
        logger.info("The card gets no figures, as matplotlib is not installed.")
        return
    (checked.folder / FIGURES).mkdir(exist_ok=True)
    if checked.config.num_heads**2 * len(checked.layers) > MAX_COSINES:
        logger.warning("The card gets no figure of the similarity of heads, of which there are too many.")
    elif checked.config.num_heads > 1:
        plot_head_similarity(head_similarities(checked.folder), checked.folder / HEAD_SIMILARITY_FIGURE)
    if record.mixtures is not None:
        plot_routing(record.mixtures, checked.folder / ROUTING_FIGURE)


def _with_base_license(api: HfApi, record: AdapterRecord) -> AdapterRecord:
    """The record with the license of the base model, from one request to the Hub."""
    if record.base_model is None or record.base_model_license is not None:
        return record
    try:
        info = read_card_info(api.model_info(record.base_model).card_data)
    # Besides its own errors, the client raises any kind on the metadata of a stranger's card.
    except Exception as error:
        logger.info(f"The license of {record.base_model} is unknown: {shorten(str(error), 300)}")
        return record
    return replace(record, base_model_license=info.get("license"))
