"""Publishing an adapter: everything in one commit, checked before and read back after."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from peft import PeftModel
from transformers.utils import logging

from ..analysis import head_similarities, plot_head_similarity, plot_routing
from ..files.card_text import check_card, check_card_text
from ..files.checks import AdapterCheckError, CheckedAdapter, adapter_digest, check_adapter
from ..files.layout import (
    CARD_NAME,
    CONFIG_NAME,
    EXPORTS,
    FIGURES,
    PICKLED_WEIGHTS_NAME,
    RECORD_NAME,
    WEIGHTS_NAME,
    FileKind,
    classify,
    is_training_leftover,
    published_files,
    task_slug,
)
from ..files.record import AdapterRecord, TaskRecord, find_record, hub_name
from ..tuner.bnb_cpu import kept_quantized
from .card import hand_written, read_card, render_card
from .pull import is_same_file
from .tokenizers import changed_tokenizer_files


logger = logging.get_logger(__name__)

Rows: TypeAlias = Sequence[Mapping[str, Any]]

# Status codes of transient errors of the Hub, after which `create_commit` does not retry (no upstream issue as of
# huggingface_hub 2.4).
_TRANSIENT = (500, 502, 503, 504)
_CONFLICT = (409, 412)
_ATTEMPTS = 4
_FIGURE_NAMES = ("head_similarity.png", "routing.png")
# Keys in the card's block `rlora`.
_TEXT, _LOCAL_TEXT = "text", "local_text"


def push_adapter(
    adapter: PeftModel | str | os.PathLike,
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
) -> CommitInfo:
    """
    Publish an adapter on the Hub: weights, configuration, card, figures and exports in one commit.

    The card of the repository is updated: what was written into it by hand stays. Nothing else of a training folder is
    uploaded, neither checkpoints nor training arguments. After an interruption the same call can be made again; files
    that are there already are not transferred twice.

    Args:
        adapter (`PeftModel` or `str`):
            A model with an R-LoRA adapter, or a folder that `save_pretrained` or the trainer wrote.
        repo_id (`str`):
            `"user/name"` or `"organization/name"`; made if it is not there.
        tasks (`Sequence[str]`, *optional*):
            Names of the tasks, for an adapter that does not know them.
        metrics (`Mapping[str, Mapping[str, float]]`, *optional*):
            By task, metrics such as `{"accuracy": 0.91}`, added to those that training recorded.
        private (`bool`, *optional*), token (`str` or `bool`, *optional*):
            As in `huggingface_hub.create_repo`.
        revision (`str`, *optional*):
            Branch to commit to, made if it is not there. Defaults to the main one.
        create_pr (`bool`, *optional*, defaults to `False`):
            Open a pull request with the commit instead.
        exports (`Sequence[str]`, *optional*):
            Tasks to publish as plain LoRA adapters too, in `exports/<task>`; see [`export_lora`].
        base_model (`str`, *optional*):
            Hub name of the base model, where the adapter was trained on a local folder.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Published with the adapter if it is not the base model's. By default that of the folder.
        license (`str`, *optional*), datasets (`Sequence[str]`, *optional*), tags (`Sequence[str]`, *optional*):
            Metadata of the card, as `huggingface_hub.ModelCardData` has them.
        commit_message (`str`, *optional*):
            Title of the commit.
        adapter_name (`str`, *optional*):
            Which adapter of a model to publish. Defaults to the active one.
        export_from (`PeftModel`, *optional*):
            The adapter of the folder as a model, so that exports need not load the base model again.
        export_data (`Mapping[str, Sequence[Mapping]]`, *optional*):
            Rows by task, as for [`score_tasks`], to measure on what the exports lose; with a model, it needs
            `tokenizer`.

    Returns:
        `CommitInfo`: The commit, or the one that has all this already.

    Raises:
        AdapterCheckError: If the adapter is damaged, incomplete or not finite. Nothing was published.
        ValueError: If the base model is a local folder and `base_model` is not given, or a task is not known.
        HfHubHTTPError: What the Hub answered, after a few attempts where it was the Hub's trouble.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="rlora-push-") as scratch:
        staged = Path(scratch) / "adapter"
        stage_adapter(
            adapter, staged, base_model=base_model, tokenizer=tokenizer, adapter_name=adapter_name, token=token
        )
        record = _look_up_licenses(api, _staged_record(staged, tasks, metrics))
        record.save(staged)
        checked = check_adapter(staged)
        if exports:
            model = adapter if isinstance(adapter, PeftModel) else export_from
            name = adapter_name or ("default" if model is None else model.active_adapter)
            source = str(staged) if model is None else model
            measuring = {"data": export_data, "tokenizer": tokenizer}
            _stage_exports(source, staged, exports, record, name, repo_id=repo_id, token=token, **measuring)
            checked = check_adapter(staged)
        _stage_figures(staged, checked)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        facts = {"license": license, "datasets": datasets or (), "tags": tags or ()}
        push = _Push(api, repo_id, revision, create_pr, staged, checked, facts)
        commit = push.run(commit_message or "Upload R-LoRA adapter")
        _read_back(api, repo_id, commit.oid, checked.digest)
    return commit


def stage_adapter(
    adapter: PeftModel | str | os.PathLike,
    folder: Path,
    *,
    base_model: str | None = None,
    tokenizer: Any = None,
    adapter_name: str | None = None,
    token: str | bool | None = None,
) -> None:
    """
    Write what a push would publish of an adapter, without card, figures and exports, into a new folder.

    Args:
        adapter (`PeftModel` or `str`): A model or a folder.
        folder (`Path`): Where to.
        base_model (`str`, *optional*): Hub name of the base model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The tokenizer to publish if it is not the base model's.
        adapter_name (`str`, *optional*): Which adapter of a model.
        token (`str` or `bool`, *optional*): To read the base model's tokenizer.

    Raises:
        ValueError: If the base model is a local folder and `base_model` is not given.
        FileNotFoundError: If the folder has no adapter.
    """
    folder.mkdir(parents=True)
    if isinstance(adapter, PeftModel):
        local_base = _save_model(adapter, folder, adapter_name)
    else:
        local_base = _copy_folder(adapter, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    kept = changed_tokenizer_files(folder, base_model or local_base, token)
    for path in published_files(folder):
        if classify(path) is FileKind.TOKENIZER and path not in kept:
            (folder / path).unlink()
    _name_base_model(folder, base_model)


def _copy_folder(source: str | os.PathLike, folder: Path) -> str | None:
    source = Path(source)
    if not (source / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"{source} has no {CONFIG_NAME}: it is not the folder of an adapter. Pass the folder that `save_model` or "
            "`save_pretrained` wrote, or the model."
        )
    for path in published_files(source):
        if classify(path) is FileKind.EXPORT:
            continue  # made anew, or kept on the Hub while the weights are the same
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, folder / path)
    return json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("base_model_name_or_path")


def _save_model(model: PeftModel, folder: Path, adapter_name: str | None) -> str | None:
    name = adapter_name or model.active_adapter
    if name not in model.peft_config:
        raise ValueError(f"The model has no adapter {name!r}; it has {', '.join(sorted(model.peft_config))}.")
    record = find_record(model.peft_config[name])
    with kept_quantized(model):
        model.save_pretrained(str(folder), selected_adapters=[name])
    if name != "default":  # PEFT puts adapters of other names into a folder of their own
        for path in (folder / name).iterdir():
            shutil.move(path, folder / path.name)
        (folder / name).rmdir()
    (folder / CARD_NAME).unlink(missing_ok=True)  # PEFT's, which knows less than ours
    if record is not None:
        record.save(folder)
    return model.peft_config[name].base_model_name_or_path


def _name_base_model(folder: Path, base_model: str | None) -> None:
    """Put the name that others know the base model by into the configuration and the record."""
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    name = base_model or config.get("base_model_name_or_path")
    if hub_name(name) is None:
        what = f"the local folder {name!r}, which nobody else can load" if name else "not named in its configuration"
        raise ValueError(
            f"The adapter's base model is {what}. Give its name on the "
            "Hub as `base_model`, for example `organization/name`."
        )
    if name != config.get("base_model_name_or_path"):
        config |= {"base_model_name_or_path": name, "revision": None}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    record = AdapterRecord.load(folder)
    if record is not None and record.base_model != name:
        replace(record, base_model=name, base_model_revision=None).save(folder)


def _staged_record(
    folder: Path, tasks: Sequence[str] | None, metrics: Mapping[str, Mapping[str, float]] | None
) -> AdapterRecord:
    """The record of the adapter, with what the caller adds to it."""
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    record = AdapterRecord.load(folder) or AdapterRecord(base_model=config.get("base_model_name_or_path"))
    known = {task.name: task for task in record.tasks}
    for name in [*(config.get("tasks") or ()), *(tasks or ())]:
        known.setdefault(name, TaskRecord(name))
    if tasks is not None and not config.get("tasks"):
        config["tasks"] = list(tasks)
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    for name, values in (metrics or {}).items():
        if name not in known:
            listed = ", ".join(known) or "(none)"
            raise ValueError(f"`metrics` has a task {name!r}, and the adapter's are {listed}. Name it in `tasks` too.")
        task = known[name]
        known[name] = replace(task, metrics={**task.metrics, **{key: float(value) for key, value in values.items()}})
    # Exports are made for this push, or kept where they are in the repository. A record that was pulled names those of
    # the repository that it came from.
    return replace(record, tasks=list(known.values()), exports=[])


def _stage_exports(
    source: PeftModel | str,
    folder: Path,
    tasks: Sequence[str],
    record: AdapterRecord,
    adapter_name: str,
    *,
    repo_id: str,
    token: str | bool | None,
    data: Mapping[str, Rows] | None,
    tokenizer: Any,
) -> None:
    from ..export import export_lora  # knows transformers' models, which a push of files does without

    _check_export_tasks(tasks, record, folder, data)
    told = []
    with _public_base(source, adapter_name, record.base_model):
        for task in tasks:
            path = f"{EXPORTS}/{task_slug(task)}"
            measured = {"data": {task: data[task]}, "tokenizer": tokenizer} if data and task in data else {}
            options = {
                "adapter_name": adapter_name,
                "task": task,
                "routing": record.mixtures,
                "token": token,
                **measured,
            }
            published_as = (repo_id, path) if "/" in repo_id else None  # else the Hub adds the user's name
            report = export_lora(source, folder / path, published_as=published_as, **options)
            facts = {"kl": report.kl, "accuracy": report.accuracy_export, "accuracy_dynamic": report.accuracy_dynamic}
            facts |= {"rank": report.rank, "exact": report.exact, "rows": report.rows}
            told.append({"task": task, "path": path, **facts})
    replace(record, exports=told).save(folder)


def _check_export_tasks(
    tasks: Sequence[str], record: AdapterRecord, folder: Path, data: Mapping[str, Rows] | None
) -> None:
    known = [task.name for task in record.tasks]
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise ValueError(
            f"`exports` names {', '.join(map(repr, unknown))}, and the adapter's tasks are "
            f"{', '.join(known) or '(none)'}. Use these names."
        )
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    measured = set(record.mixtures.weights if record.mixtures is not None else ()) | set(data or ())
    lacking = [task for task in tasks if task not in measured]
    if lacking and config.get("router") in ("softmax", "top_k") and config.get("num_heads", 1) > 1:
        raise ValueError(
            f"`exports` needs the mean weights of the heads for {', '.join(map(repr, lacking))}, which training did "
            "not record. Pass rows to measure them on, `export_data={task: rows}` and `tokenizer`."
        )


@contextmanager
def _public_base(source: PeftModel | str, adapter_name: str, base_model: str | None) -> Generator[None, None, None]:
    """Have a model's adapter name its base as others know it, for the exports that are made of it."""
    if isinstance(source, str):
        yield
        return
    config = source.peft_config[adapter_name]
    before, config.base_model_name_or_path = config.base_model_name_or_path, base_model
    try:
        yield
    finally:
        config.base_model_name_or_path = before


def _stage_figures(folder: Path, checked: CheckedAdapter) -> None:
    """Draw what there is to draw, where matplotlib is installed."""
    figures = folder / FIGURES
    figures.mkdir(exist_ok=True)
    try:
        if checked.config.num_heads > 1:
            plot_head_similarity(head_similarities(folder), figures / _FIGURE_NAMES[0])
        if checked.record is not None and checked.record.mixtures is not None:
            plot_routing(checked.record.mixtures, figures / _FIGURE_NAMES[1])
    except ImportError as error:
        logger.info(f"The card gets no figures: {error}")


def _look_up_licenses(api: HfApi, record: AdapterRecord) -> AdapterRecord:
    """The record with the licenses that the Hub tells of the base model and of the data."""

    def license_of(look_up: Callable[[str], Any], name: str | None) -> str | None:
        if name is None:
            return None
        try:
            card = look_up(name).card_data
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            logger.info(f"The license of {name} is not known: {error}")
            return None
        told = card.get("license") if card is not None else None
        return told if isinstance(told, str) else None

    datasets = {task.dataset for task in record.tasks if task.dataset and task.license is None}
    licenses = {name: license_of(api.dataset_info, name) for name in datasets}
    tasks = [replace(task, license=task.license or licenses.get(task.dataset or "")) for task in record.tasks]
    base = record.base_model_license or license_of(api.model_info, record.base_model)
    return replace(record, tasks=tasks, base_model_license=base)


@dataclass(frozen=True)
class _Remote:
    """What a repository has at the commit that a push is put onto."""

    files: frozenset[str]
    card: str | None = None
    digest: Any = None  # of its tensors, as the card says
    # Digests of the hand-written text at the last push: of the card that was published, of the one in the folder.
    texts: tuple[Any, Any] = (None, None)
    record: AdapterRecord | None = None


def _merge_texts(local: str | None, remote: str | None, texts: tuple[Any, Any]) -> str | None:
    """
    The card to go on with, of the one in the folder and the one in the repository.

    Where only one of the two has changed by hand since the last push, that is the one. Where both have, what the local
    one has beyond the other is put below it.

    Args:
        local (`str`, *optional*), remote (`str`, *optional*): The cards.
        texts: Digests of the hand-written text at the last push: of the published card, of the local one.
    """
    published, before = texts
    if remote is None or local is None or not hand_written(local).strip():
        return remote if remote is not None else local
    if _text_digest(local) in (published, before, _text_digest(remote)):
        return remote
    metadata = REGEX_YAML_BLOCK.search(remote)
    if _text_digest(remote) == published and metadata is not None:
        own = REGEX_YAML_BLOCK.search(local)
        return metadata.group(0) + (local if own is None else local[own.end() :])
    there = _paragraphs(hand_written(remote))
    added = [paragraph for paragraph in _paragraphs(hand_written(local)) if paragraph not in there]
    return "\n\n".join([remote.rstrip(), *added]) + "\n"


def _paragraphs(text: str) -> list[str]:
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return [paragraph.strip("\n") for paragraph in re.split(r"\n{2,}", lines) if paragraph.strip()]


def _text_digest(card: str) -> str:
    return hashlib.sha256("\n\n".join(_paragraphs(hand_written(card))).encode()).hexdigest()[:16]


class _Push:
    """One push: what is in the repository, what should be, and the attempts to get there."""

    def __init__(
        self,
        api: HfApi,
        repo_id: str,
        revision: str | None,
        create_pr: bool,
        folder: Path,
        checked: CheckedAdapter,
        facts: Mapping[str, Any],
    ) -> None:
        self.api, self.repo_id, self.revision, self.create_pr = api, repo_id, revision, create_pr
        self.folder, self.checked, self.facts = folder, checked, facts
        self.local_card = read_card(folder / CARD_NAME)
        assert checked.record is not None  # it was staged
        self.record = checked.record

    def run(self, message: str) -> CommitInfo:
        """Commit, and again where the Hub failed or the branch moved meanwhile."""
        for attempt in range(1, _ATTEMPTS + 1):
            head = None
            try:
                head = self._head(self.revision)
                return self._commit(head, message)
            except HTTPError as error:
                # Without an answer the connection broke, perhaps after the Hub had made the commit.
                status = getattr(getattr(error, "response", None), "status_code", None)
                transient = status is None or status in _TRANSIENT
                landed = self._landed_if_known(head, message) if transient and head is not None else None
                if landed is not None:
                    return landed
                if attempt == _ATTEMPTS or not (transient or status in _CONFLICT):
                    _explain_failure(error)
                    raise
                logger.warning(f"Attempt {attempt} of {_ATTEMPTS} to commit to {self.repo_id} failed: {error}")
                if transient:
                    time.sleep(0.25 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _head(self, revision: str | None) -> str:
        commit = self.api.model_info(self.repo_id, revision=revision).sha
        assert commit is not None  # only listings leave it out
        return commit

    def _commit(self, head: str, message: str) -> CommitInfo:
        remote = self._look(head)
        kept = self._kept_exports(remote)
        replace(self.record, exports=[*self.record.exports, *kept]).save(self.folder)
        self._write_card(remote)
        files = published_files(self.folder)
        outdated = self._outdated(remote, [export["path"] for export in kept])
        return self.api.create_commit(
            self.repo_id,
            [CommitOperationAdd(path, str(self.folder / path)) for path in files]
            + [CommitOperationDelete(path) for path in sorted(outdated - set(files))],
            commit_message=message,
            revision=self.revision,
            create_pr=self.create_pr,
            # The card was made from this head: put onto another, it could take back what somebody wrote meanwhile.
            parent_commit=head,
        )

    def _look(self, head: str) -> _Remote:
        """Read what the repository has."""
        files = frozenset(self.api.list_repo_files(self.repo_id, revision=head))
        if CARD_NAME not in files:
            return _Remote(files)
        with tempfile.TemporaryDirectory() as scratch:
            for path in files & {CARD_NAME, RECORD_NAME}:
                self._download(head, path, scratch)
            text = read_card(Path(scratch, CARD_NAME)) or ""
            try:
                record = AdapterRecord.load(scratch)
            except ValueError as error:
                logger.warning(f"The record in {self.repo_id} is replaced, as it can't be read: {error}")
                record = None
        block = check_card_text(text, f"The card of {self.repo_id}").data.to_dict().get("rlora")
        block = block if isinstance(block, Mapping) else {}
        return _Remote(files, text, block.get("digest"), (block.get(_TEXT), block.get(_LOCAL_TEXT)), record)

    def _kept_exports(self, remote: _Remote) -> list[dict[str, Any]]:
        """Exports in the repository that were made of these very weights, and are not made anew."""
        if remote.record is None or remote.digest != self.checked.digest:
            return []
        anew = {export["path"] for export in self.record.exports}
        found = [export for export in remote.record.exports if export["path"] not in anew]
        return [export for export in found if f"{export['path']}/{WEIGHTS_NAME}" in remote.files]

    def _outdated(self, remote: _Remote, kept: Sequence[str]) -> set[str]:
        """
        What earlier pushes have put there of other weights, and what a stock trainer has.

        Raises:
            AdapterCheckError: If the repository has files for which nobody could pull the adapter.
        """
        hostile = {path for path in remote.files if classify(path) is FileKind.HOSTILE}
        pickles = {path for path in hostile if is_training_leftover(path) or path == PICKLED_WEIGHTS_NAME}
        if hostile - pickles:
            raise AdapterCheckError(
                f"{self.repo_id} has {', '.join(sorted(hostile - pickles)[:5])}, which a loader might execute: "
                "`pull_adapter` would refuse the repository. Remove them, or push to another one."
            )
        if pickles:
            logger.warning(f"The pickles in {self.repo_id} are removed by this push: {', '.join(sorted(pickles))}")
        outdated = set(pickles)
        if remote.digest != self.checked.digest:
            outdated |= remote.files & {f"{FIGURES}/{name}" for name in _FIGURE_NAMES}
        made = [f"{export['path']}/" for export in (remote.record.exports if remote.record else ())]
        made = [path for path in made if path.rstrip("/") not in kept]
        return outdated | {
            path for path in remote.files if classify(path) is FileKind.EXPORT and path.startswith(tuple(made))
        }

    def _write_card(self, remote: _Remote) -> None:
        """Write the card that is in the repository, brought up to date; what was written by hand stays."""
        card = render_card(
            self.checked.config,
            AdapterRecord.load(self.folder),
            repo_id=self.repo_id,
            digest=self.checked.digest,
            num_parameters=self.checked.num_parameters,
            figures=[path for path in published_files(self.folder) if classify(path) is FileKind.FIGURE],
            existing=_merge_texts(self.local_card, remote.card, remote.texts),
            **self.facts,
        )
        # By which the next push can tell who has changed the text since.
        block: dict[str, Any] = vars(card.data)["rlora"]
        block[_TEXT] = _text_digest(str(card))
        local = remote.texts[1] if self.local_card is None else _text_digest(self.local_card)
        block |= {_LOCAL_TEXT: local} if local is not None else {}
        card.save(self.folder / CARD_NAME)
        check_card(self.folder / CARD_NAME)

    def _download(self, revision: str, path: str, folder: str) -> str:
        return self.api.hf_hub_download(self.repo_id, path, revision=revision, local_dir=folder)

    def _landed_if_known(self, head: str, message: str) -> CommitInfo | None:
        try:
            return self._landed(head, message)
        except HTTPError:
            if self.create_pr:
                raise  # another attempt might open a second pull request
            return None  # a commit that landed leaves nothing to commit the next time

    def _landed(self, head: str, message: str) -> CommitInfo | None:
        """The commit of an attempt that the Hub answered with an error, if it was made nevertheless."""
        if self.create_pr:
            numbers = [discussion.num for discussion in self.api.get_repo_discussions(self.repo_id)]
            revisions: list[str | None] = [f"refs/pr/{number}" for number in sorted(numbers, reverse=True)[:5]]
        else:
            revisions = [self.revision]
        for revision in revisions:
            commit = self._head(revision)
            if commit != head and self._is_published(commit):
                url = f"{self.api.endpoint}/{self.repo_id}"
                pr_url = f"{url}/discussions/{revision.rsplit('/', 1)[-1]}" if self.create_pr and revision else None
                return CommitInfo(
                    commit_url=f"{url}/commit/{commit}",
                    commit_message=message,
                    commit_description="",
                    oid=commit,
                    pr_url=pr_url,
                )
        return None

    def _is_published(self, commit: str) -> bool:
        """Whether a commit has all files of this push with the contents that they have here."""
        files = published_files(self.folder)
        entries = self.api.get_paths_info(self.repo_id, files, revision=commit)
        told = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        return all(path in told and is_same_file(self.folder / path, told[path]) for path in files)


def _explain_failure(error: HTTPError) -> None:
    text = "\nRun the same push again: files that were uploaded are not transferred a second time."
    if isinstance(error, HfHubHTTPError):
        error.append_to_message(f"\nNothing was published.{text}" if error.response is not None else text)
    else:
        error.args = (f"{error}. The connection to the Hub broke.{text}",)


def _read_back(api: HfApi, repo_id: str, commit: str, digest: str) -> None:
    """Compare the tensors that the Hub gives out with those that were to be published."""
    try:
        with tempfile.TemporaryDirectory(prefix="rlora-read-back-") as scratch:
            path = api.hf_hub_download(repo_id, WEIGHTS_NAME, revision=commit, local_dir=scratch, force_download=True)
            found = adapter_digest(path)
    except (HTTPError, OSError, ValueError) as error:
        raise ConnectionError(
            f"{repo_id} was published as commit {commit}, but could not be read back to compare it: {error}. Check it "
            f"with `pull_adapter({repo_id!r}, revision={commit!r})`."
        ) from error
    if found != digest:
        raise AdapterCheckError(
            f"{repo_id} at {commit} gives out tensors with the digest {found}, and {digest} was published. Push "
            "again; if it stays so, tell the operators of the Hub."
        )
