"""The part of the trainer that saves and resumes: what is on disk is whole, and a resumed run is the same run."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer

from ..files.layout import WEIGHTS_NAME
from ..tuner import MultiHeadAdapter
from ..tuner.bnb_cpu import kept_quantized
from .resuming import (
    INSTEAD,
    PROBE_FILE,
    STATE_FILE,
    check_files,
    check_settings,
    check_strategy,
    compare_tensors,
    find_checkpoint,
    list_checkpoints,
    list_files,
    make_probe,
    read_state,
    same_loss,
    step_of,
)
from .run_settings import RunSettings, check_run, describe_data
from .saving import (
    STAGING,
    FullTensors,
    adapter_folder,
    check_saved,
    flush_to_disk,
    full_disk_error,
    gather_tensors,
    move_files,
    move_folder,
    restore_set_aside,
)


logger = get_logger(__name__)


class _OnTrainBegin(TrainerCallback):
    """Runs the checks of a resumed run when all is loaded and nothing has changed yet."""

    def __init__(self, trainer: CheckpointTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._begin_attempt()
        self.trainer._check_resumed()


class CheckpointTrainer(SFTTrainer):
    """
    The part of `RLoraSFTTrainer` that saves and resumes.

    - A save is written beside its place, checked there against the model, and moved into place when it is whole. A
      folder called `checkpoint-<step>` is a whole checkpoint, whenever the process ended.
    - All of an adapter is saved under every strategy: DDP, DeepSpeed ZeRO 1 to 3, FSDP2.
    - A resumed run is compared with its checkpoint: the adapter's settings before anything is loaded; its tensors, and
      the loss on a few rows of data that the checkpoint keeps, before the first step.
    """

    def _set_up_checkpoints(self) -> None:
        self._stage: Path | None = None  # while a checkpoint is written
        self._digests: dict[str, str] = {}
        self._full_tensors: FullTensors | None = None
        self._probe: dict[str, torch.Tensor] | None = None
        self._saw_batch = self._is_checked = False
        self._resumed_from: Path | None = None
        self._resumed_state: dict[str, Any] = {}
        self._run_settings = RunSettings()
        self.add_callback(_OnTrainBegin(self))
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            # Its flat parameters join what is frozen with what trains, in one dtype.
            raise ValueError(
                "R-LoRA trains with FSDP2, and FSDP1 was asked for. Set `fsdp_version: 2` in the accelerate "
                'configuration (see deepspeed_configs/fsdp2.yaml), or `fsdp_config={"version": 2}`.'
            )

    @property
    def _is_deepspeed_or_fsdp(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the adapter with its record and card; see `Trainer.save_model`.

        To be called on all ranks under DeepSpeed and FSDP. Files that are there are replaced when all of the new ones
        are written and checked.

        Raises:
            RuntimeError: If what was written lacks something that the model has, or is not finite.
            OSError: If there is no space left; what was saved before is as it was.
        """
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        on_all_ranks = self._stage is not None or self._is_deepspeed_or_fsdp
        with self._together(on_all_ranks), self._staged(folder) as stage:
            if self._is_deepspeed_or_fsdp:
                # What they make of it by themselves depends on their settings, and lacks what is frozen.
                state_dict = self._gather_adapters()
                if self.args.should_save:
                    self._save(str(stage), state_dict=state_dict)
            else:
                super().save_model(str(stage), _internal_call=True)
            if self.args.should_save:
                self._digests = check_saved(stage, self._tensors_to_save(), self._describe_strategy())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @contextmanager
    def _staged(self, folder: Path) -> Generator[Path, None, None]:
        """A folder to write in, whose files are moved into `folder` when all went well."""
        if self._stage is not None:  # the whole checkpoint is
            yield folder
            return
        stage = folder / STAGING / "model"
        writes = self.args.should_save
        if writes:
            shutil.rmtree(stage, ignore_errors=True)
        with self._explained(folder, "the adapter"):
            try:
                yield stage
                if writes:
                    flush_to_disk(stage)
                    move_files(stage, folder)
            finally:
                if writes:
                    shutil.rmtree(folder / STAGING, ignore_errors=True)

    @contextmanager
    def _together(self, on_all_ranks: bool = True) -> Generator[None, None, None]:
        """Make an error of one process one of all, so that none waits for another that has given up."""
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        if on_all_ranks and self.accelerator.num_processes > 1:
            told = gather_object([None if own is None else f"{type(own).__name__}: {own}"])
            first = next((text for text in told if text is not None), None)
            if own is None and first is not None:
                raise RuntimeError(f"Another process failed. {first}")
        if own is not None:
            raise own

    @contextmanager
    def _explained(self, folder: Path, what: str) -> Generator[None, None, None]:
        try:
            yield
        except Exception as error:
            full = full_disk_error(error, folder, f"{what} in {str(folder)!r}")
            if full is None:
                raise
            raise full from error

    def _tensors_to_save(self) -> FullTensors:
        model = self._peft_model()
        if self._full_tensors is None or list(self._full_tensors.files) != list(model.peft_config):
            self._full_tensors = FullTensors(model)
        return self._full_tensors

    def _peft_model(self) -> PeftModel:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _gather_adapters(self, *, keep: bool | None = None) -> dict[str, torch.Tensor]:
        """All tensors of the adapters in whole, by their names in the model, on the ranks that keep them."""
        names = self._tensors_to_save().names
        if self.accelerator.num_processes > 1:
            names = broadcast_object_list([names])[0]  # all must gather the same
        keep = self.args.should_save if keep is None else keep
        return gather_tensors(self._peft_model(), names, keep=keep)

    def _describe_strategy(self) -> str:
        """How training is spread, with the setting that says so; and so how the optimizer's state is divided."""
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
        if writes:
            shutil.rmtree(stage / name, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with self._explained(root, name):
            try:
                # DeepSpeed and FSDP have collectives of their own in there, which an error must not wait beside.
                with self._together(not self._is_deepspeed_or_fsdp), self._writing_to(stage):
                    super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # all have written their part
                state = self._collect_state(root, stage)
                with self._together():
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
        kept = {newest.name, *([Path(best).name] if best is not None else [])}
        # By age, as `Trainer` does: the folder may have checkpoints of an earlier and longer run.
        checkpoints = sorted(list_checkpoints(root), key=lambda path: (path.stat().st_mtime_ns, step_of(path)))
        limit = self.args.save_total_limit
        surplus = 0 if not limit or limit < 1 else len(checkpoints) - max(limit, len(kept))
        for checkpoint in [path for path in checkpoints if path.name not in kept][: max(surplus, 0)]:
            # Out of its name first: what is called a checkpoint is whole.
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

    def _collect_state(self, root: Path, stage: Path) -> dict[str, Any]:
        """What is recorded with a checkpoint, as JSON. On all ranks."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == stage:
            self.state.best_model_checkpoint = str(root / Path(best).name)  # where it will lie
        state = {
            **self._checkpoint_state(),
            "adapters": self._digests,
            "strategy": self._describe_strategy(),
            "processes": self.accelerator.num_processes,
        }
        loss = self._probe_loss()
        return state if loss is None else {**state, "probe_loss": loss}

    def _complete_checkpoint(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Write what is recorded into a checkpoint that has all else, and all of it to the disk."""
        self.state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))
        if "probe_loss" in state and self._probe is not None:
            save_file(self._probe, checkpoint / PROBE_FILE)
        text = json.dumps({**state, "files": list_files(checkpoint)})
        (checkpoint / STATE_FILE).write_text(text, encoding="utf-8")
        flush_to_disk(checkpoint)

    def _checkpoint_state(self) -> dict[str, Any]:
        """What else a resumed run needs to know, as JSON. Called on all ranks."""
        return {"runs": self._run_settings.parts}

    def _load_state(self, state: dict[str, Any]) -> None:
        """Take up what `_checkpoint_state` gave, or nothing of it for a run that starts anew."""

    # The probe: a few rows, on which a resumed run shows that it is the same

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._probe is None and not self._saw_batch:
            self._probe = make_probe(inputs)
        self._saw_batch = True
        return super().training_step(model, inputs, *args, **kwargs)

    def _probe_loss(self) -> float | None:
        """The loss on the probe, in eval mode. To be called on all ranks, which take that of the first."""
        if self.accelerator.num_processes > 1:
            self._probe = broadcast_object_list([self._probe])[0]
        if self._probe is None:
            return None
        with self._evaluating() as model:
            loss, _, _ = self.prediction_step(model, dict(self._probe), prediction_loss_only=True)
        value = float(loss) if math.isfinite(float(loss)) else None
        return broadcast_object_list([value])[0] if self.accelerator.num_processes > 1 else value

    @contextmanager
    def _evaluating(self) -> Generator[nn.Module, None, None]:
        """The model in eval mode, for passes that leave no trace in the metrics or the base weights."""
        model, was_training = self.model_wrapped, self.model.training
        metrics, self._metrics["eval"] = self._metrics["eval"], defaultdict(list)
        model.eval()
        try:
            with kept_quantized(self.model):
                yield model
        finally:
            self._metrics["eval"] = metrics
            model.train(was_training)

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        with self._together():
            checkpoint = self._choose_checkpoint(resume_from_checkpoint)
        self._resumed_from, self._probe, self._saw_batch, self._is_checked = checkpoint, None, False, False
        self._resumed_state = {} if checkpoint is None else read_state(checkpoint)
        try:
            return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        finally:
            self._resumed_from = None

    def _begin_attempt(self) -> None:
        """
        Take up what a checkpoint has, or nothing, when steps are about to begin.

        With `auto_find_batch_size` they begin again with smaller batches when memory did not suffice, and what was
        counted in the attempt before is dropped.
        """
        self._load_state(self._resumed_state)
        step = 0 if self._resumed_from is None else step_of(self._resumed_from)
        earlier = self._resumed_state.get("runs")
        # `Trainer` keeps the number that it has found beside the arguments.
        found = self.state.train_batch_size if self.args.auto_find_batch_size else None
        self._run_settings.begin(step, self.args, self._describe_data(), earlier, batch_size=found)

    def _describe_data(self) -> Any:
        """What shows whether the training data are those of a checkpoint; see [`describe_data`]."""
        return describe_data(self.train_dataset)

    def _choose_checkpoint(self, given: str | bool | None) -> Path | None:
        """
        The checkpoint to go on from, whose files and settings have been checked.

        Raises:
            ValueError: If there is none, it is damaged, or its adapter is another one.
        """
        with self._together():
            if self.args.should_save:
                restore_set_aside(Path(self.args.output_dir))
        if given is None or given is False:
            return None
        if given is True:
            checkpoint = self._newest_of_all()
        else:
            checkpoint = Path(given)
            check_files(checkpoint)
        universal = False
        if self.is_deepspeed_enabled:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            universal = bool((config.get("checkpoint") or {}).get("load_universal"))
        if not universal:
            check_strategy(checkpoint, self._describe_strategy(), self.accelerator.num_processes)
        name = self.model.active_adapter
        check_settings(checkpoint, self.model.peft_config[name], name)
        check_run(checkpoint, self.args, self._describe_data())
        return checkpoint

    def _newest_of_all(self) -> Path:
        """The newest checkpoint that is whole; of nodes with disks of their own, the newest that all of them have."""
        found: Path | None = None
        with self._together():
            found = find_checkpoint(self.args.output_dir)
        assert found is not None
        if self.accelerator.num_processes == 1:
            return found
        newest = min((found.with_name(name) for name in gather_object([found.name])), key=step_of)
        if newest != found:
            check_files(newest)
        return newest

    def _load_best_model(self) -> None:
        # transformers looks for the adapter in the checkpoint's root, where one of another name than "default" is not
        # (transformers#36201, open as of 5.23).
        best = self.state.best_model_checkpoint
        if best is None or self._is_deepspeed_or_fsdp:
            super()._load_best_model()
            return
        self.state.best_model_checkpoint = str(adapter_folder(best, self.model.active_adapter))
        try:
            super()._load_best_model()
        finally:
            self.state.best_model_checkpoint = best

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self._resumed_from is not None and self.state.global_step >= self.state.max_steps:
            # It had ended when it was saved; `Trainer` would train one step more before it looks (no upstream issue as
            # of transformers 5.23).
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _check_resumed(self) -> None:
        """
        See that what trains is what the checkpoint holds. On all ranks.

        Raises:
            ValueError: If tensors, or the loss on the probe, are not those of the checkpoint.
        """
        checkpoint = self._resumed_from
        if checkpoint is None or self._is_checked:  # `auto_find_batch_size` begins again, with what it has
            return
        self._is_checked = True
        self._restore_anchors(checkpoint)
        state = read_state(checkpoint)
        problem = self._compare_with(checkpoint)
        if problem is None and "probe_loss" in state and (checkpoint / PROBE_FILE).is_file():
            self._probe = load_file(checkpoint / PROBE_FILE)
            found = self._probe_loss()
            if found is None or not same_loss(state["probe_loss"], found):
                told = "not finite" if found is None else f"{found:.4f}"
                problem = (
                    f"the loss on the rows kept in {PROBE_FILE} is {told} and was {state['probe_loss']:.4f}. The "
                    "adapter is the same, so the base model is another, or the adapter is not applied"
                )
        if problem is not None:
            raise ValueError(f"The resumed run is not that of {str(checkpoint)!r}: {problem}. {INSTEAD}")

    def _compare_with(self, checkpoint: Path) -> str | None:
        """What differs between the tensors in training and the files, or `None`. On all ranks."""
        gathered = self._gather_adapters(keep=self.is_world_process_zero())
        told: list[str | None] = [None]
        if self.is_world_process_zero():
            name = self.model.active_adapter
            expected = load_file(adapter_folder(checkpoint, name) / WEIGHTS_NAME)
            entries = self._tensors_to_save().files[name]
            found = {saved: gathered[entry.name] for saved, entry in entries.items() if entry.name in gathered}
            made_by_peft = {saved for saved, entry in entries.items() if entry.name is None}
            told[0] = compare_tensors(
                {saved: tensor for saved, tensor in expected.items() if saved not in made_by_peft}, found, checkpoint
            )
        return broadcast_object_list(told)[0] if self.accelerator.num_processes > 1 else told[0]

    def _restore_anchors(self, checkpoint: Path) -> None:
        """
        Take anchors from the adapter's file where the strategy's own state lacks them.

        transformers has DeepSpeed leave out what is frozen (since transformers#27825), and anchors are.
        """
        if not self.is_deepspeed_enabled:
            return
        import deepspeed

        saved = load_file(adapter_folder(checkpoint, self.model.active_adapter) / WEIGHTS_NAME)
        parameters = dict(self._peft_model().named_parameters())
        for file_name, entry in self._tensors_to_save().files[self.model.active_adapter].items():
            if entry.name is None or entry.name.rsplit(".", 1)[-1] not in MultiHeadAdapter.anchor_names:
                continue
            parameter = parameters[entry.name]
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
                if parameter.numel():
                    with torch.no_grad():
                        parameter.copy_(saved[file_name])
