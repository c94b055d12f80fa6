"""The base class of the trainer: complete saves and checkpoints, and runs that resume from them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer

from ..files.layout import WEIGHTS_NAME
from ..reading import AdapterCheckError
from ..tuner import MultiHeadAdapter
from ..tuner.bnb_cpu import kept_quantized
from .locks import SAVING_LOCK, hold, sole_run
from .resuming import (
    FRESH_START_HINT,
    check_files,
    check_settings,
    check_strategy,
    describe_changed_values,
    find_checkpoint,
    list_checkpoints,
    list_files,
    step_of,
)
from .run_settings import RunSettings, check_run, describe_data
from .saving import (
    STAGING,
    FullTensors,
    adapter_folder,
    check_saved,
    explain_full_disk,
    flush_to_disk,
    gather_tensors,
    move_files,
    move_folder,
    restore_set_aside,
)
from .secrets import without_secrets
from .sharding import keep_adapters_wide
from .state_files import STATE_FILE, read_state
from .zero3 import gather_together


logger = get_logger(__name__)


# Names in the state of a checkpoint that are not from `kept_states`.
_RESERVED = frozenset({"runs", "adapters", "strategy", "processes", "files"})


class KeptState(NamedTuple):
    """
    State of a run that checkpoints store as JSON.

    Args:
        save (`Callable[[], Any]`): Returns the state. Called on all ranks, before anything is written.
        load (`Callable[[Any], None]`): Restores it; gets `None` for a fresh run, or if the checkpoint lacks it. Raises
            `ValueError` for a state that `save` can't have returned.
    """

    save: Callable[[], Any]
    load: Callable[[Any], None]


class _OnTrainBegin(TrainerCallback):
    """Calls the trainer when everything is loaded and prepared, before the first step."""

    def __init__(self, trainer: StagedCheckpoints) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        keep_adapters_wide(self.trainer.model)
        gather_together(self.trainer.model_wrapped)
        self.trainer._begin_attempt()
        self.trainer._check_resumed()


class StagedCheckpoints(SFTTrainer):
    """
    `SFTTrainer` with complete saves, and with checks that a resumed run continues the same run.

    - A save is written to a staging folder, checked there against the model, and moved into place when it is complete.
      A folder named `checkpoint-<step>` is a complete checkpoint, even if the process was killed.
    - An adapter is saved in full under every strategy: DDP, DeepSpeed ZeRO 1 to 3, FSDP2.
    - A resumed run is compared with its checkpoint: the adapter's settings, the base model and the settings of the run
      before anything is loaded, and the loaded tensors before the first step.

    Attributes:
        kept_states (`dict[str, KeptState]`): State that checkpoints store in addition to `Trainer`'s, by name.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.kept_states: dict[str, KeptState] = {}
        self._run_settings = RunSettings()
        self._stage: Path | None = None  # set while a checkpoint is written
        self._digests: dict[str, str] = {}
        self._full_tensors: FullTensors | None = None
        self._checked_resume: tuple[str | bool | None, Path | None] | None = None
        self._resumed_from: Path | None = None
        self._resumed_state: dict[str, Any] = {}
        self._is_checked = False
        self._base_commit: str | None = None  # of the base model, where it is known
        self._task_router_rate: float | None = None  # of routers by task, where the configuration has none
        super().__init__(*args, **kwargs)
        # Before callbacks of the user, which may run the model.
        self.callback_handler.callbacks.insert(0, _OnTrainBegin(self))
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            # FSDP1's flat parameters join frozen and trained ones in one dtype.
            raise ValueError(
                "FSDP1 is not supported; R-LoRA trains with FSDP2. Set `fsdp_version: 2` in the accelerate "
                'configuration (see deepspeed_configs/fsdp2.yaml), or `fsdp_config={"version": 2}`.'
            )

    @property
    def _is_deepspeed_or_fsdp(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    # Hooks for the trainer

    def _write_beside(self, folder: Path, destination: Path) -> None:
        """Write the other files of a save into `folder`, which is moved to `destination` later. Saving rank only."""

    def _describe_data(self) -> Any:
        """A fingerprint of the training data, to compare with a checkpoint; see [`describe_data`]."""
        return describe_data(self.train_dataset)

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the adapter with its record and card; see `Trainer.save_model`.

        Call it on all ranks under DeepSpeed and FSDP. Files of an earlier save are replaced only after all new files
        are written and checked.

        Raises:
            RuntimeError: If the written file lacks a tensor of the model, or a tensor is not finite.
            OSError: If the disk is full; earlier files are unchanged.
        """
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        on_all_ranks = self._stage is not None or self._is_deepspeed_or_fsdp
        with self._raise_on_all_ranks(on_all_ranks), self._staged(folder) as (stage, destination):
            with kept_quantized(self.model):
                self._save_tensors(stage)
            if self.args.should_save:
                self._write_beside(stage, destination)
                self._digests = check_saved(stage, self._tensors_to_save(), self._describe_strategy())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_tensors(self, folder: Path) -> None:
        if not self._is_deepspeed_or_fsdp:
            super().save_model(str(folder), _internal_call=True)
            return
        # Their own saves depend on their settings and lack frozen parameters.
        state_dict = self._gather_adapters()
        if self.args.should_save:
            self._save(str(folder), state_dict=state_dict)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        # `Trainer` pickles its arguments into the folder.
        full: Any = self.args  # type: ignore[has-type]
        self.args = without_secrets(full)
        try:
            super()._save(*args, **kwargs)
        finally:
            self.args = full

    @contextmanager
    def _staged(self, folder: Path) -> Generator[tuple[Path, Path], None, None]:
        """A folder to write to, and the destination that its files are moved to after success."""
        if self._stage is not None and folder.is_relative_to(self._stage):  # a checkpoint is staged as a whole
            yield folder, self._stage.parent / folder.relative_to(self._stage)
            return
        stage = folder / STAGING / "model"
        writes = self.args.should_save
        with self._sole_save(folder), explain_full_disk(folder, "the adapter"):
            if writes:
                shutil.rmtree(stage, ignore_errors=True)
            try:
                yield stage, folder
                if writes:
                    flush_to_disk(stage)
                    move_files(stage, folder)
            finally:
                if writes:
                    shutil.rmtree(folder / STAGING, ignore_errors=True)

    def _sole_save(self, folder: Path) -> AbstractContextManager[None]:
        """Wait until no other process saves into a folder, and let none."""
        return hold(folder / SAVING_LOCK, wait=True) if self.is_world_process_zero() else nullcontext()

    @contextmanager
    def _raise_on_all_ranks(self, on_all_ranks: bool = True) -> Generator[None, None, None]:
        """Raise an error of one process on all ranks, so that no rank waits for one that has failed."""
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        if on_all_ranks and self.accelerator.num_processes > 1:
            errors = gather_object([None if own is None else f"{type(own).__name__}: {own}"])
            first = next((text for text in errors if text is not None), None)
            if own is None and first is not None:
                raise RuntimeError(f"Another process failed. {first}")
        if own is not None:
            raise own

    def _tensors_to_save(self) -> FullTensors:
        model = self._peft_model()
        if self._full_tensors is None or list(self._full_tensors.files) != list(model.peft_config):
            self._full_tensors = FullTensors(model)
        return self._full_tensors

    def _adapter_folder(self, root: str | Path) -> Path:
        return adapter_folder(root, self.model.active_adapter)

    def _peft_model(self) -> PeftModel:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _gather_adapters(self, *, keep: bool | None = None) -> dict[str, torch.Tensor]:
        """The full tensors of all adapters, by name in the model; empty on ranks with `keep=False`."""
        names = self._tensors_to_save().names
        if self.accelerator.num_processes > 1:
            names = broadcast_object_list([names])[0]  # all must gather the same
        keep = self.args.should_save if keep is None else keep
        return gather_tensors(self._peft_model(), names, keep=keep)

    def _describe_strategy(self) -> str:
        """How training is distributed, and the setting for it. The optimizer state is sharded accordingly."""
        if self.is_deepspeed_enabled:
            stage = self.accelerator.state.deepspeed_plugin.zero_stage
            return f"DeepSpeed ZeRO-{stage} (`zero_optimization` in the DeepSpeed configuration)"
        return "FSDP2 (`fsdp_config`)" if self.is_fsdp_enabled else "whole weights in each process"

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._stage is None else str(self._stage)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        root = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        stage, writes = root / STAGING, self.args.should_save
        reserved = _RESERVED & set(self.kept_states)
        if reserved:
            raise ValueError(f"`kept_states` can't have the names {', '.join(sorted(reserved))}. Choose others.")
        state = {name: part.save() for name, part in self.kept_states.items()}

        with self._sole_save(root), explain_full_disk(root, name):
            try:
                if writes:
                    shutil.rmtree(stage / name, ignore_errors=True)
                self.accelerator.wait_for_everyone()
                # DeepSpeed and FSDP run their own collectives here; an error must not wait for other ranks meanwhile.
                with self._raise_on_all_ranks(not self._is_deepspeed_or_fsdp), self._writing_to(stage):
                    super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # all ranks have written their parts

                best = self.state.best_model_checkpoint
                if best is not None and Path(best).parent == stage:
                    self.state.best_model_checkpoint = str(root / Path(best).name)  # its destination
                with self._raise_on_all_ranks():
                    if writes:
                        self._complete_checkpoint(stage / name, state)
                        move_folder(stage / name, root / name)
                        self._rotate(root, root / name)
            finally:
                if writes:
                    shutil.rmtree(stage, ignore_errors=True)

    def _rotate(self, root: Path, newest: Path) -> None:
        """Remove the oldest checkpoints beyond `save_total_limit`, but neither the best nor the newest."""
        best = self.state.best_model_checkpoint
        keep = {newest.name, *([Path(best).name] if best is not None else [])}
        # By age, as `Trainer` does: the folder may have checkpoints of an earlier and longer run.
        checkpoints = sorted(list_checkpoints(root), key=lambda path: (path.stat().st_mtime_ns, step_of(path)))
        limit = self.args.save_total_limit
        surplus = 0 if not limit or limit < 1 else len(checkpoints) - max(limit, len(keep))
        for checkpoint in [path for path in checkpoints if path.name not in keep][: max(surplus, 0)]:
            # Renamed first, since any folder with that name must be a complete checkpoint.
            removed = root / STAGING / checkpoint.name
            removed.parent.mkdir(exist_ok=True)
            os.replace(checkpoint, removed)
        shutil.rmtree(root / STAGING, ignore_errors=True)

    @contextmanager
    def _writing_to(self, stage: Path) -> Generator[None, None, None]:
        self._stage = stage
        try:
            yield
        finally:
            self._stage = None

    def _complete_checkpoint(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Write the state file, the last one of a checkpoint, and flush all files to the disk."""
        self.state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))
        state = {
            **state,
            "runs": self._run_settings.parts,
            "adapters": self._digests,
            "strategy": self._describe_strategy(),
            "processes": self.accelerator.num_processes,
            "files": list_files(checkpoint),
        }
        (checkpoint / STATE_FILE).write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
        flush_to_disk(checkpoint)

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        is_trial = bool(args) or kwargs.get("trial") is not None  # it has a folder of its own
        with self._sole_run(is_trial):
            checked, self._checked_resume = self._checked_resume, None
            if checked is not None and checked[0] == resume_from_checkpoint:
                checkpoint = checked[1]
            else:
                with self._raise_on_all_ranks():
                    checkpoint = self._choose_checkpoint(resume_from_checkpoint)
            self._resumed_from, self._is_checked = checkpoint, False
            self._resumed_state = {} if checkpoint is None else read_state(checkpoint)
            try:
                return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            finally:
                self._resumed_from = None

    def check_resume(self, resume_from_checkpoint: str | bool | None) -> None:
        """
        Check already now what `train` checks before it resumes a run, so that nothing is computed in vain before it.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): As for the call of `train` that follows.

        Raises:
            ValueError: If there is no checkpoint, it is damaged or belongs to another adapter, base model or run, or
                another run trains into the folder.
        """
        with self._sole_run(), self._raise_on_all_ranks():
            self._checked_resume = (resume_from_checkpoint, self._choose_checkpoint(resume_from_checkpoint))

    @contextmanager
    def _sole_run(self, is_trial: bool = False) -> Generator[None, None, None]:
        """Refuse other runs with the same output folder meanwhile."""
        with ExitStack() as lock:
            with self._raise_on_all_ranks():
                if self.is_world_process_zero() and not is_trial:
                    lock.enter_context(sole_run(Path(self.args.output_dir)))
            yield

    def _begin_attempt(self) -> None:
        """
        Load the state of the checkpoint, or reset it, before the first step.

        With `auto_find_batch_size`, training restarts with smaller batches when it runs out of memory. The counts of
        the failed attempt are dropped.
        """
        for name, part in self.kept_states.items():
            try:
                part.load(self._resumed_state.get(name))
            except ValueError as error:
                if self._resumed_from is None:
                    raise
                raise AdapterCheckError(
                    f"{self._resumed_from}/{STATE_FILE} has a damaged part {name!r}: {error}. Resume from another "
                    "checkpoint."
                ) from error
        step = 0 if self._resumed_from is None else step_of(self._resumed_from)
        earlier = self._resumed_state.get("runs")
        # `Trainer` stores the batch size that it found in its state, not in the arguments.
        batch_size = self.state.train_batch_size if self.args.auto_find_batch_size else None
        self._run_settings.begin(step, self.args, self._describe_data(), earlier, batch_size, self._task_router_rate)

    def _choose_checkpoint(self, resume_from: str | bool | None) -> Path | None:
        """
        The checkpoint to resume from, whose files and settings have been checked.

        Raises:
            ValueError: If there is no checkpoint, or it is damaged or belongs to another adapter, base model or run.
        """
        with self._raise_on_all_ranks():
            if self.args.should_save:
                with self._sole_save(Path(self.args.output_dir)):
                    restore_set_aside(Path(self.args.output_dir))
        if resume_from is None or resume_from is False:
            return None
        if resume_from is True:
            checkpoint = self._newest_of_all()
        else:
            checkpoint = Path(resume_from)
            check_files(checkpoint)

        if not self._loads_universal():
            check_strategy(checkpoint, self._describe_strategy(), self.accelerator.num_processes)
        name = self.model.active_adapter
        check_settings(checkpoint, self.model.peft_config[name], name, self._base_commit)
        check_run(checkpoint, self.args, self._describe_data())
        return checkpoint

    def _loads_universal(self) -> bool:
        """Whether DeepSpeed loads a checkpoint that was converted for any number of processes."""
        if not self.is_deepspeed_enabled:
            return False
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        return bool((config.get("checkpoint") or {}).get("load_universal"))

    def _newest_of_all(self) -> Path:
        """The newest complete checkpoint; on nodes with separate disks, the newest one that all nodes have."""
        newest: Path | None = None
        with self._raise_on_all_ranks():
            newest = find_checkpoint(self.args.output_dir)
        assert newest is not None
        if self.accelerator.num_processes == 1:
            return newest
        shared = min((newest.with_name(name) for name in gather_object([newest.name])), key=step_of)
        if shared != newest:
            check_files(shared)
        return shared

    def _load_best_model(self) -> None:
        # transformers looks for the adapter in the checkpoint's root, but PEFT saves those with other names than
        # "default" in folders below (transformers#36201, open as of 5.23).
        best = self.state.best_model_checkpoint
        if best is None or self._is_deepspeed_or_fsdp:
            super()._load_best_model()
            return
        self.state.best_model_checkpoint = str(self._adapter_folder(best))
        try:
            super()._load_best_model()
        finally:
            self.state.best_model_checkpoint = best

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self._resumed_from is not None and self.state.global_step >= self.state.max_steps:
            # The checkpoint was saved at the end of the run. `Trainer` would train one more step before it checks (no
            # upstream issue as of transformers 5.23).
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _check_resumed(self) -> None:
        """
        Check that the tensors in training equal those of the checkpoint. Call it on all ranks.

        Raises:
            ValueError: If they differ.
        """
        checkpoint = self._resumed_from
        if checkpoint is None or self._is_checked:  # `auto_find_batch_size` restarts with loaded tensors
            return
        self._is_checked = True
        self._restore_anchors(checkpoint)
        difference = self._compare_with(checkpoint)
        if difference is not None:
            raise ValueError(
                f"The run was not resumed from {str(checkpoint)!r} correctly: {difference}. {FRESH_START_HINT}"
            )

    def _compare_with(self, checkpoint: Path) -> str | None:
        """How the tensors in training differ from the files, or `None`. Call it on all ranks."""
        gathered = self._gather_adapters(keep=self.is_world_process_zero())
        difference: list[str | None] = [None]
        if self.is_world_process_zero():
            name = self.model.active_adapter
            saved = load_file(adapter_folder(checkpoint, name) / WEIGHTS_NAME)
            entries = self._tensors_to_save().files[name]
            present = {
                file_name: gathered[entry.name] for file_name, entry in entries.items() if entry.name in gathered
            }
            made_by_peft = {file_name for file_name, entry in entries.items() if entry.name is None}
            expected = {file_name: tensor for file_name, tensor in saved.items() if file_name not in made_by_peft}
            difference[0] = describe_changed_values(expected, present, checkpoint)
        return broadcast_object_list(difference)[0] if self.accelerator.num_processes > 1 else difference[0]

    def _restore_anchors(self, checkpoint: Path) -> None:
        """
        Load anchors from the adapter's file if the state of the strategy lacks them.

        transformers has DeepSpeed leave out frozen parameters (since transformers#27825), as anchors are under ZeRO-1
        and 2. Checkpoints of ZeRO-3 have them only if they were buffers.
        """
        if not self.is_deepspeed_enabled:
            return
        import deepspeed

        saved = load_file(self._adapter_folder(checkpoint) / WEIGHTS_NAME)
        model = self._peft_model()
        tensors: dict[str, torch.Tensor] = dict(chain(model.named_parameters(), model.named_buffers()))
        for file_name, entry in self._tensors_to_save().files[self.model.active_adapter].items():
            if entry.name is None or entry.name.rsplit(".", 1)[-1] not in MultiHeadAdapter.anchor_names:
                continue
            anchor = tensors[entry.name]
            with deepspeed.zero.GatheredParameters([anchor], modifier_rank=0, enabled=hasattr(anchor, "ds_id")):
                if anchor.numel():
                    with torch.no_grad():
                        anchor.copy_(saved[file_name])
