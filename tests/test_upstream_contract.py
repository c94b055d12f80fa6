"""
What the package relies on inside PEFT, TRL, transformers and others, beyond their documented interfaces: one table.

Upstream renames and moves such things without notice, and many of them fail without an error: an override that nothing
calls any more, an attribute that is never set again. So each has a row below, which is checked against what is
installed; and an override, a private name, or an attribute that upstream sets too fails here until it has a row.
"""

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import tomllib
from functools import cache
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import NamedTuple

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from packaging.requirements import Requirement
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

import rlora_cli
import rlora_trl
from rlora_trl import RLoraSFTConfig, RLoraSFTTrainer
from rlora_trl.files import record


ROOT = Path(__file__).parent.parent
PACKAGES = (rlora_trl, rlora_cli)
# Whose classes are subclassed by overriding what they call themselves.
UPSTREAMS = ("transformers", "trl", "peft", "accelerate", "datasets", "huggingface_hub")
# Where the private methods that are overridden are called.
CALLERS = (
    *("transformers/trainer.py", "trl/trainer/sft_trainer.py", "trl/trainer/base_trainer.py", "peft/peft_model.py"),
    *("peft/tuners/tuners_utils.py", "peft/utils/save_and_load.py", "peft/utils/other.py"),
)


class Row(NamedTuple):
    """
    Something that the package relies on.

    Args:
        owner (`str`): `"module:Class"`, a module, or the file of a module, `"package/module.py"`, which is searched
            and not imported: for what is set on instances of others, and for packages that are optional.
        name (`str`): Attribute of the class or module, method, function, or attribute that the class sets on itself.
            In a file: any text. Alternatives are separated by `" | "`.
        parameters (`str`, *optional*): What is relied on of its parameters, as in a signature: names in these places,
            by keyword after `*`, with a default where that is relied on. Others may follow. `None` for no function, or
            where whatever comes is passed on.
        why (`str`): What it is needed for.
    """

    owner: str
    name: str
    parameters: str | None
    why: str


TRAINER, SFT, BASE = "transformers:Trainer", "trl:SFTTrainer", "trl.trainer.base_trainer:_BaseTrainer"
TUNER, LAYER = "peft.tuners.tuners_utils:BaseTuner", "peft.tuners.tuners_utils:BaseTunerLayer"
CALLBACK, ACCELERATOR = "transformers:TrainerCallback", "accelerate:Accelerator"
FSDP = "torch/distributed/fsdp/_fully_shard"
EVENT = "args, state, control"

# fmt: off
CONTRACT = [Row(*row) for row in (
    # The trainer: construction and data
    (SFT, "__init__", "model, args=None, data_collator=None, train_dataset=None, eval_dataset=None, *, quantization_config=None, peft_config=None", "five by position, the rest passed on"),
    (SFT, "_tag_names", None, "tags of cards"),
    (SFT, "_name", None, "name of the method on cards"),
    (BASE, "_paper", None, "paper on cards"),
    (SFT, "_prepare_dataset", "dataset, processing_class, args, packing, formatting_func, dataset_name", "tasks through packing"),
    ("trl", "pack_dataset", "dataset, seq_length, strategy, map_kwargs", "the last step of `_prepare_dataset`, with tasks"),
    (TRAINER, "_get_train_sampler", None, "mixing"),
    (TRAINER, "train_dataset", None, "prepared data without tasks that lost all rows"),
    (TRAINER, "eval_dataset", None, "the same of evaluation data"),
    (SFT, "_skip_prepare_dataset", None, "data that come prepared"),
    (SFT, "_is_vision_dataset", None, "data with pictures, which nothing prepares"),
    (SFT, "_total_train_tokens", None, "tokens of attempts that were given up"),
    ("accelerate.utils", "is_compiled_module", "module", "compiled models are refused"),
    (TRAINER, "_get_eval_sampler", "eval_dataset", "rows to measure heads on"),
    (TRAINER, "_get_dataloader", "dataset, description, batch_size, sampler_fn=None", "collator of tasks; loader to measure heads"),
    (TRAINER, "data_collator", None, "wrapped while a loader is made"),
    (TRAINER, "get_train_dataloader", "", "epochs of a mixture"),
    ("accelerate.data_loader:DataLoaderShard", "set_sampler", "sampler", "epochs of a resumed mixture"),
    (SFT, "_set_signature_columns_if_needed", "", "keep the column of tasks"),
    (SFT, "_signature_columns", None, "keep the column of tasks"),
    ("transformers:TrainingArguments", "train_sampling_strategy", None, "refused with mixing"),
    ("trl/trainer/sft_trainer.py", "param.data = param.data.to(torch.bfloat16)", None, "undone for adapters on a quantized base"),
    ("transformers/quantizers/quantizer_bnb_4bit.py", "is_loaded_in_4bit", None, "whether TRL has cast"),
    ("transformers/quantizers/quantizer_bnb_8bit.py", "is_loaded_in_8bit", None, "whether TRL has cast"),

    # The trainer: steps
    (TRAINER, "train", "resume_from_checkpoint=None", "resuming, first gradients"),
    (TRAINER, "get_batch_samples", None, "tokens of a step; runs that had ended"),
    (TRAINER, "get_tp_size", "", "ranks with the same batch"),
    (TRAINER, "current_gradient_accumulation_steps", None, "who divides the loss"),
    (TRAINER, "compute_loss_func", None, "who divides the loss"),
    (SFT, "compute_loss", "model, inputs, return_outputs=False, num_items_in_batch=None", "balance loss, counts by task"),
    ("trl.trainer.utils:FusedCausalLMOutput", "log_probs", None, "loss by task"),
    (SFT, "training_step", None, "what follows the backward pass"),
    (TRAINER, "create_optimizer", None, "learning rates of routers and heads"),
    (TRAINER, "control", None, "stop a resumed run that had ended; early stopping on means over tasks"),
    (SFT, "log", "logs", "losses by task, norms"),
    (SFT, "_metrics", None, "passes that leave no trace in the metrics"),
    (SFT, "evaluate", "eval_dataset=None, ignore_keys=None, metric_key_prefix='eval'", "metrics by task"),
    (TRAINER, "evaluation_loop", "dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix='eval'", "accuracy by task"),
    (SFT, "prediction_step", "model, inputs, prediction_loss_only", "use of heads"),
    (ACCELERATOR, "optimizer_step_was_skipped", None, "steps that DeepSpeed leaves out"),
    (ACCELERATOR, "parallelism_config", None, "balance losses are refused with it"),
    ("accelerate/utils/dataclasses.py", "mixed_precision_policy", None, "outputs that FSDP2 leaves in float32"),
    ("accelerate/utils/dataclasses.py", "activation_checkpointing", None, "seeds of dropout under recomputation"),

    # The trainer: saving, resuming, publishing
    (TRAINER, "save_model", "output_dir=None, _internal_call=False", "adapters of all strategies, staged"),
    (TRAINER, "_save", "output_dir=None, state_dict=None", "adapters of DeepSpeed and FSDP, with gathered tensors"),
    (TRAINER, "args", None, "pickled by `_save`, without secrets"),
    ("transformers:TrainingArguments", "to_dict", "", "reported without secrets"),
    (CALLBACK, "on_epoch_end", "args, state, control", "stopping by a signal"),
    (CALLBACK, "on_save", "args, state, control", "stopping by a signal"),
    (CALLBACK, "on_train_end", "args, state, control", "stopping by a signal"),
    (TRAINER, "_save_checkpoint", "model, trial", "staging, counts by task"),
    (SFT, "_save_checkpoint", "model, trial", "staging; TRL writes a card first"),
    (TRAINER, "_get_output_dir", "trial", "staging"),
    (TRAINER, "_load_best_model", "", "adapters of other names than the default"),
    ("transformers.trainer", "TRAINER_STATE_NAME", None, "state is written again after the move"),
    ("transformers:TrainerState", "save_to_json", "json_path", "state is written again after the move"),
    (SFT, "create_model_card", "model_name=None, dataset_name=None, tags=None", "the adapter's own card"),
    (TRAINER, "push_to_hub", "commit_message='End of training', blocking=True, token=None, revision=None", "one commit of an adapter"),
    (TRAINER, "_push_from_checkpoint", "checkpoint_folder", "adapters without the state of the optimizer"),
    (TRAINER, "_finish_current_push", "", "pushes wait for each other"),
    (TRAINER, "push_in_progress", None, "pushes wait for each other"),
    (TRAINER, "init_hf_repo", "*, token=None", "the repository's name"),
    ("transformers.utils:PushInProgress", "__init__", "jobs", "pushes wait for each other"),
    ("transformers.utils:PushInProgress", "jobs", None, "pushes wait for each other"),
    ("huggingface_hub:HfApi", "run_as_future", "fn", "pushes in the background"),
    ("huggingface_hub", "try_to_load_from_cache", "repo_id, filename, *, cache_dir=None, revision=None", "the commit of the base model; files in the cache"),
    ("huggingface_hub.file_download", "repo_folder_name", "*, repo_id, repo_type", "the folder of a repository in the cache"),
    ("huggingface_hub.file_download", "are_symlinks_supported", "cache_dir=None", "links to blobs of the cache"),
    ("huggingface_hub.utils", "build_hf_headers", "*, token=None, library_name=None, library_version=None", "requests with a limit"),
    ("huggingface_hub.utils", "hf_raise_for_status", "response", "requests with a limit"),
    ("huggingface_hub.hf_api", "BlobLfsInfo", "size, sha256, pointer_size", "listings of files"),
    ("datasets", "interleave_datasets", "datasets, probabilities=None, seed=None, *, stopping_strategy='first_exhausted'", "mixtures of streams"),
    ("datasets:Dataset", "__init__", "arrow_table, info=None, split=None, *, fingerprint=None", "columns of datasets with indices"),
    ("datasets:Dataset", "_indices", None, "places of rows of shuffled and selected data"),
    ("datasets:Dataset", "_fingerprint", None, "results that are cached, of such data"),
    ("datasets.table", "table_cast", "table, schema", "types of tasks, cast without slices"),
    ("datasets:DatasetInfo", "download_checksums", None, "the name of a dataset on the Hub"),

    # Callbacks and configurations
    (CALLBACK, "on_init_end", EVENT, "use of heads"),
    (CALLBACK, "on_train_begin", None, "checks of a resumed run"),
    (CALLBACK, "on_step_begin", EVENT, "router figures of other trainers"),
    (CALLBACK, "on_log", EVENT, "router figures of other trainers, which come as `logs`"),
    (CALLBACK, "on_step_end", EVENT, "use of heads"),
    (CALLBACK, "on_predict", EVENT + ", metrics", "use of heads"),
    (CALLBACK, "on_evaluate", EVENT, "use of heads"),
    ("transformers.trainer_callback:CallbackHandler", "on_evaluate", EVENT + ", metrics", "early stopping on means over tasks"),
    ("transformers.trainer_callback:CallbackHandler", "on_push_begin", EVENT, "as in `Trainer.push_to_hub`"),
    ("trl:SFTConfig", "__post_init__", "", "default of `bf16`, checks"),
    ("trl:SFTConfig", "__init__", "*, bf16=None", "unset is `None`"),
    # Transformers 5.17 has the older name only.
    ("transformers:TrainingArguments", "activation_checkpointing | gradient_checkpointing", None, "no warning of a name that the user did not set"),
    ("trl:SFTConfig", "bf16", None, "another default on a machine without an accelerator"),
    ("trl.trainer.sft_config:SFTConfig", "learning_rate", None, "another default, for adapters"),
    ("trl:ModelConfig", "__post_init__", "", "arguments of LoRA are refused"),
    ("trl:ModelConfig", "use_rslora", None, "another default"),
    ("trl:TrlParser", "set_defaults_with_config", None, "YAML files of `rlora train`"),
    ("trl.cli.accelerate_config", "resolve_accelerate_config_argument", "launch_args", "`--accelerate_config` of `rlora train`"),
    ("accelerate.commands.launch", "launch_command_parser", "", "arguments of `rlora train`"),
    ("accelerate.commands.launch", "launch_command", "args", "processes of `rlora train`"),
    ("accelerate.commands.config.config_args", "default_config_file", None, "defaults of `rlora train`"),
    ("argparse:ArgumentParser", "_actions", None, "names of the launcher's arguments"),

    # The tuner
    ("peft.mapping", "PEFT_TYPE_TO_CONFIG_MAPPING", None, "registration"),
    ("peft.mapping", "PEFT_TYPE_TO_TUNER_MAPPING", None, "registration"),
    ("peft.mapping", "PEFT_TYPE_TO_PREFIX_MAPPING", None, "registration"),
    ("peft:PeftConfig", "peft_type", None, "registration"),
    ("peft.config:PeftConfigMixin", "__post_init__", "", "checks"),
    ("peft.config:PeftConfigMixin", "save_pretrained", "save_directory", "announces what lies beside it"),
    ("peft.config:PeftConfigMixin", "from_pretrained", "pretrained_model_name_or_path, subfolder=None", "where an adapter comes from"),
    (TUNER, "__init__", None, "hooks of the tuner"),
    (TUNER, "inject_adapter", "model, adapter_name", "checks before, what was adapted after"),
    (TUNER, "_prepare_adapter_config", "peft_config, model_config", "default layers by architecture"),
    (TUNER, "_create_and_replace", "peft_config, adapter_name, target, target_name, parent, current_key", "layers"),
    (TUNER, "_inject_parameters", "peft_config, model, adapter_name, low_cpu_mem_usage", "weights of experts"),
    (TUNER, "_replace_module", "parent, child_name, new_module, child", "base layers without a weight"),
    (TUNER, "_cast_adapter_dtype", "adapter_name, autocast_adapter_dtype=True", "anchors that fit rounded weights"),
    (TUNER, "merge_adapter", "adapter_names=None, safe_merge=False", "routed adapters are refused"),
    (TUNER, "_unload_and_optionally_merge", "merge=True, *, adapter_names=None", "routed adapters are refused"),
    (TUNER, "delete_adapter", "adapter_name", "tensors packed ahead"),
    (TUNER, "forward", None, "`task_ids`"),
    (TUNER, "_remove_adapter_name_from_key", "key, adapter_name", "names of saved tensors"),
    (TUNER, "_remap_adapter_state_dict_for_load", "model, config, adapter_name, state_dict", "tensors are checked when loaded"),
    (TUNER, "_prepare_model", "peft_config, model", "layers and names are checked before anything changes"),
    ("peft.tuners.tuners_utils", "_maybe_include_all_linear_layers", None, "layers that are bypassed are left out of all-linear"),
    (TUNER, "prefix", None, "names of parameters"),
    (TUNER, "tuner_layer_cls", None, "which layers are the tuner's"),
    (TUNER, "target_module_mapping", None, "default layers by architecture"),
    ("peft/peft_model.py", "self.base_model._enable_peft_forward_hooks(", None, "tasks and adapters of a batch reach the layers"),
    ("peft/peft_model.py", "self.special_peft_forward_args = {", None, "`task_ids` are not passed on to the model's `generate`"),
    ("peft:PeftModelForCausalLM", "forward", "*, task_ids=None", "it keeps `task_ids` from the tuner, so a hook takes it"),
    ("torch.nn.modules.module", "register_module_module_registration_hook", "hook", "meet the `PeftModel`"),
    (LAYER, "get_base_layer", "", "experts, which the layer of a weight does not hold itself"),
    ("transformers/integrations/moe.py", "is_transposed", None, "which dimension of experts are inputs"),
    # Transformers 5.17 lacks the first.
    ("transformers/integrations/moe.py", "_is_expert_parallel | num_experts", None, "experts of other processes are refused"),
    ("transformers/integrations/moe.py", "_experts_implementation", None, "named in errors"),
    ("transformers:PreTrainedModel", "set_experts_implementation", "experts_implementation", "named in errors"),
    (LAYER, "adapter_layer_names", None, "what PEFT trains, moves, saves"),
    (LAYER, "other_param_names", None, "what PEFT deletes with an adapter"),
    (LAYER, "_freeze_non_trainable_peft_weights", "adapter_names=None", "anchors stay frozen"),
    (LAYER, "_move_adapter_to_device_of_base_layer", "adapter_name, device=None", "adapters keep float32"),
    (LAYER, "_get_base_layer_device_and_dtype", "base_layer", "where adapters go"),
    (LAYER, "_get_available_adapters", "", "run one adapter alone"),
    (LAYER, "_active_adapter", None, "run one adapter alone"),
    (LAYER, "_disable_adapters", None, "run one adapter alone"),
    (LAYER, "merged_adapters", None, "merging"),
    (LAYER, "set_adapter", "adapter_names, inference_mode=False", "scaling of adapters"),
    (LAYER, "get_base_weight", "", "4-bit weights on a CPU"),
    (LAYER, "set_base_weight", "weight_data", "merging"),
    (LAYER, "quantization_backend", None, "merging; bases without a gradient"),
    (LAYER, "merge", "safe_merge=False, adapter_names=None", "merging"),
    (LAYER, "unmerge", "", "merging"),
    (LAYER, "supports_lora_conversion", "adapter_name='default'", "routed adapters are not LoRA"),
    ("peft.tuners.tuners_utils", "_get_in_out_features", "module", "sizes of a layer, quantized or not"),
    ("peft.tuners.tuners_utils", "check_adapters_to_merge", "module, adapter_names=None", "merging"),
    ("peft.tuners.tuners_utils", "check_target_module_exists", "config, key", "which layers a file must have"),
    ("peft.utils", "resolve_quantization_backend", "base_layer", "quantized bases"),
    ("peft.utils", "get_quantization_kwargs", "model", "quantized bases"),
    ("peft.utils.quantization_utils:QuantizationBackend", "backend_name", None, "messages"),
    ("peft.utils.quantization_utils:QuantizationBackend", "supports_merge", None, "merging is refused"),
    ("peft/utils/other.py", "if self.disable_adapters or any(adapter not in self._adapters for adapter in self.active_adapters)", None, "modules that one of the adapters of a batch trains"),
    ("transformers:PreTrainedModel", "get_decoder", "", "which layers see rows of tokens, and which pictures"),
    ("peft.utils:AuxiliaryTrainingWrapper", "_get_available_adapters", "", "run one adapter alone"),
    ("trl/trainer/utils.py", "weight, bias = lm_head.weight, lm_head.bias", None, "rows of a head that train are refused"),
    ("peft", "get_peft_model_state_dict", "model, state_dict=None, adapter_name='default'", "what is saved of a model, by stand-ins"),

    # Accelerate, DeepSpeed and FSDP below the trainer
    (ACCELERATOR, "reduce", "tensor, reduction='sum'", "counts of all ranks"),
    (ACCELERATOR, "gather", "tensor", "shares of heads of all ranks"),
    (ACCELERATOR, "unwrap_model", "model, *, keep_torch_compile=True", "the model that is saved"),
    ("accelerate.utils", "gather_object", "object", "errors of all ranks"),
    ("accelerate.utils", "broadcast_object_list", "object_list", "what all ranks agree on"),
    ("accelerate.utils", "broadcast", "tensor", "anchors of the first rank"),
    ("accelerate:PartialState", "main_process_first", "", "packing is cached once"),
    ("accelerate/utils/dataclasses.py", "hf_ds_config", None, "dtype of DeepSpeed's engine"),
    (FSDP + "/_fsdp_param.py", "self._module_info", None, "which parameters are adapters'"),
    (FSDP.replace("/", ".") + "._fsdp_param:FSDPParam", "init_dtype_attrs", "mp_policy", "adapters in float32"),
    (FSDP + "/_fsdp_param_group.py", "self.fsdp_params", None, "adapters in float32"),
    (FSDP + "/_fsdp_param_group.py", "self.mp_policy", None, "adapters in float32"),
    (FSDP + "/_fsdp_state.py", "_fsdp_param_groups | _fsdp_param_group", None, "newer PyTorch has several"),
    (FSDP + "/_fsdp_state.py", "_fsdp_param_group", None, "PyTorch before it had several"),
    ("torch.distributed.fsdp:FSDPModule", "_get_fsdp_state", "", "adapters in float32"),
    ("torch.distributed.fsdp:FSDPModule", "reshard", "", "float32 values before saving"),
    ("peft.utils.transformers_weight_conversion", "convert_peft_config_for_transformers", "*, peft_config, model, conversions", "exports that PEFT would put elsewhere are refused"),
    ("torch.distributed.tensor", "DTensor", None, "sharded models are not exported"),
    ("torch/distributed/fsdp/_common_utils.py", "_fsdp_wrapped_module", None, "sharded models are not exported"),
    ("deepspeed/runtime/zero/partition_parameters.py", "ds_id", None, "sharded parameters"),
    ("deepspeed/runtime/zero/partition_parameters.py", "ds_status", None, "parameters that are whole for now"),
    ("deepspeed/runtime/zero/partition_parameters.py", "ds_tensor", None, "small parameters are gathered at once"),
    ("deepspeed/runtime/zero/partition_parameters.py", "ds_secondary_tensor", None, "which are gathered in another way"),
    ("deepspeed/runtime/zero/partition_parameters.py", "ds_quant_scale", None, "which are gathered in another way"),
    ("deepspeed/runtime/zero/partition_parameters.py", "param.all_gather_coalesced = all_gather_coalesced", None, "small parameters are gathered at once"),
    ("deepspeed/runtime/zero/stage3.py", "self.persistent_parameters[0].all_gather(self.persistent_parameters)", None, "small parameters are gathered at once"),
    ("deepspeed/runtime/zero/partition_parameters.py", "ds_shape", None, "shapes in whole"),
    ("deepspeed/runtime/zero/partition_parameters.py", "ds_numel", None, "sizes in whole"),
    ("deepspeed/runtime/zero/partition_parameters.py", "class GatheredParameters", None, "values in whole"),
    ("deepspeed/utils/mixed_precision_linkage.py", "_hp_mapping", None, "float32 values, ZeRO 1 and 2"),
    ("deepspeed/utils/tensor_fragment.py", "_z3_optimizer", None, "float32 values, ZeRO 3"),
    ("deepspeed/utils/tensor_fragment.py", "def safe_get_full_fp32_param(param)", None, "float32 values"),
    ("deepspeed/runtime/engine.py", "def fp16_enabled(self)", None, "steps that fp16 leaves out"),
    ("deepspeed/runtime/engine.py", "check_grad_overflow", None, "`nan_policy`"),
    ("deepspeed/runtime/zero/config.py", "compute_grad_norm", None, "`nan_policy`"),

    # PyTorch, Triton, bitsandbytes, typer
    ("torch.nn:Module", "_parameters", None, "look-ups that short steps feel"),
    ("torch.nn:Module", "_buffers", None, "stand-ins of tensors without values"),
    ("torch.nn:Module", "_modules", None, "look-ups that short steps feel"),
    ("torch.nn:Module", "_forward_hooks", None, "whose outputs may be written over"),
    ("torch.nn:Module", "_forward_pre_hooks", None, "whose outputs may be written over"),
    ("torch.nn:Module", "_backward_hooks", None, "whose weights may be joined"),
    ("torch.nn:Module", "_backward_pre_hooks", None, "whose weights may be joined"),
    ("torch.nn.modules.module", "_global_forward_hooks", None, "calls that hooks expect"),
    ("torch.nn.modules.module", "_global_forward_pre_hooks", None, "calls that hooks expect"),
    ("torch.nn.modules.module", "_global_backward_hooks", None, "calls that hooks expect"),
    ("torch.nn.modules.module", "_global_backward_pre_hooks", None, "calls that hooks expect"),
    ("torch:Tensor", "_version", None, "whether packed weights are stale"),
    ("torch", "_C", None, "those that follow"),
    ("torch._C", "_current_graph_task_id", None, "whether a forward pass is a recomputation"),
    ("torch._C", "_current_autograd_node", None, "which node asks for a recomputation"),
    ("torch._C", "_are_functorch_transforms_active", None, "whether `Function.apply` must look at its arguments"),
    ("torch._C", "_autograd", None, "the two that follow"),
    ("torch.autograd:Variable", "_execution_engine", None, "a call when a backward pass ends (`queue_callback`)"),
    ("torch._C._autograd", "_get_sequence_nr", None, "number of the next node, when the context of a batch is set"),
    # Torch 2.6 lacks the first; layers with the same input are not grouped there.
    ("torch._C._autograd", "_top_saved_tensors_default_hooks | _push_saved_tensors_default_hooks", None, "checkpointed regions, which groups of layers don't cross"),
    # Torch 2.6 has it in the classes of nodes, not yet in their common class.
    ("torch.autograd.function:BackwardCFunction", "_sequence_nr", None, "number of a node, which says when its pass ran"),
    ("torch.nn:Module", "_non_persistent_buffers_set", None, "buffers that are not saved"),
    ("accelerate/hooks.py", "_hf_hook", None, "device of layers that are offloaded"),
    ("collections/__init__.py", "_fields | _replace", None, "named tuples with other values"),
    ("torch:UntypedStorage", "_cdata", None, "storages by identity"),
    ("torch._subclasses.fake_tensor", "FakeTensor", None, "memory of a step"),
    ("torch._subclasses.fake_tensor", "FakeTensorMode", None, "memory of a step"),
    ("torch.utils._python_dispatch", "TorchDispatchMode", None, "memory of a step"),
    ("torch.utils._pytree", "tree_leaves", "tree", "memory of a step"),
    ("triton.runtime.jit:JITFunction", "run", None, "how kernels are launched; see tests/kernels/test_triton_ops.py"),
    ("bitsandbytes/functional.py", "packing_format_for_cpu = True", None, "4-bit weights in another order on some CPUs"),
    ("bitsandbytes/nn/modules.py", "support_avx512bf16_for_cpu", None, "4-bit weights in another order on some CPUs"),
    ("bitsandbytes.nn:Linear4bit", "_save_to_state_dict", "destination, prefix, keep_vars", "it puts 4-bit weights back in order"),
    ("transformers:PretrainedConfig", "_name_or_path", None, "name of the base model"),
    ("transformers:PretrainedConfig", "dtype", None, "dtype of the base model in records"),
    ("transformers/quantizers/base.py", "is_quantized", None, "merging into a quantized base"),
    ("transformers:PreTrainedModel", "base_model", None, "the model without its head, to measure heads"),
    ("transformers.integrations.peft:PeftAdapterMixin", "_hf_peft_config_loaded", None, "given models; bases to merge into"),
    ("transformers/core_model_loading.py", "_weight_conversions", None, "bases to merge into"),
    # The experimental layers for vLLM, which also refuse other releases
    ("vllm/lora/utils.py", "_all_lora_classes", None, "the layers are replaced by subclasses"),
    ("vllm/lora/layers/base_linear.py", "add_lora_linear", None, "layers call it with all slices"),
    ("vllm/lora/layers/row_parallel_linear.py", "add_expand", None, "fully sharded layers call it with complete first products"),
    ("vllm/lora/punica_wrapper/punica_gpu.py", "token_mapping_meta", None, "the slot of each token, on a GPU"),
    ("vllm/lora/ops/triton_ops/lora_kernel_metadata.py", "token_lora_mapping", None, "the slot of each token, on a GPU"),
    ("vllm/lora/punica_wrapper/punica_base.py", "token_lora_indices", None, "the slot of each token, on a CPU"),
)]
# fmt: on


# The rows hold


@pytest.mark.parametrize("row", CONTRACT, ids=lambda row: f"{row.owner}.{row.name}".replace(" | ", "-or-"))
def test_upstream_has(row):
    names = row.name.split(" | ")
    if row.owner.endswith(".py"):
        text = source(row.owner)
        if text is None:
            pytest.skip(f"{row.owner.split('/')[0]} is not installed")
        assert any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in names), gone(row)
        return
    module = row.owner.split(":")[0]
    if importlib.util.find_spec(module.split(".")[0]) is None:
        pytest.skip(f"{module} is not installed")
    owner = resolve(row.owner)
    assert owner is not None and any(has(owner, name) for name in names), gone(row)
    if row.parameters is not None:
        relied = inspect.signature(eval(f"lambda {row.parameters}: 0"))
        problems = differences(relied, signature_of(owner, names[0]))
        assert not problems, f"{row.owner}.{row.name}, needed for: {row.why}. Its parameters changed: {problems}"


def gone(row):
    return (
        f"{row.owner} has no {row.name!r} any more. It was needed for: {row.why}. Find what took its place and adapt "
        "the code, then this row."
    )


def has(owner, name):
    """Whether a class or module has a name, or instances of the class are given it."""
    if hasattr(owner, name):
        return True
    if not inspect.isclass(owner):
        return False
    return any(name in inspect.get_annotations(base) for base in owner.__mro__) or name in own_attributes(owner)


def own_attributes(cls):
    """Attributes that the methods of a class, or those around it in its module, set on `self`."""
    return set().union(*(assigned(base.__module__) for base in cls.__mro__ if base is not object))


@cache
def assigned(module):
    file = getattr(importlib.import_module(module), "__file__", None)
    text = Path(file).read_text(encoding="utf-8") if file and file.endswith(".py") else ""
    return frozenset(re.findall(r"\bself\.(\w+)(?:: [^=\n]+)? = ", text))


@cache
def source(path):
    """The text of a module's file, which is not imported; empty if there is none, `None` without its package."""
    top, _, rest = path.partition("/")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    file = Path(spec.submodule_search_locations[0], rest)
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def resolve(owner):
    """The class or module of a row, `None` if it is not there any more."""
    try:
        return pkgutil.resolve_name(owner)
    except (ImportError, AttributeError):
        return None


def signature_of(owner, name):
    """Without `self`."""
    found = inspect.signature(getattr(owner, name))
    if inspect.isclass(owner) and isinstance(inspect.getattr_static(owner, name), FunctionType):
        return found.replace(parameters=list(found.parameters.values())[1:])
    return found


POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def positional(signature):
    return [parameter for parameter in signature.parameters.values() if parameter.kind in POSITIONAL]


def differences(relied, actual):
    """What a function lacks of the parameters that are relied on."""
    problems = []
    places = [parameter.name for parameter in positional(actual)]
    for place, parameter in enumerate(positional(relied)):
        if places[place : place + 1] != [parameter.name]:
            problems.append(f"{parameter.name!r} is not number {place + 1} of ({', '.join(places)})")
    for parameter in relied.parameters.values():
        found = actual.parameters.get(parameter.name)
        if found is None:
            problems.append(f"no {parameter.name!r} in {actual}")
        elif parameter.default not in (inspect.Parameter.empty, found.default):
            problems.append(f"{parameter.name!r} is {found.default!r} by default, not {parameter.default!r}")
    return problems


# Nothing is without a row


def our_classes():
    """The classes of the package that have bases upstream, with these."""
    found = {}
    modules = [
        module for package in PACKAGES for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    for module in modules:
        # Plugins import their tool, whose interface tests/integrations compares with what is relied on.
        if "triton" in module.name or module.name.startswith("rlora_trl.integrations."):
            continue
        for cls in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(cls) and cls.__module__ == module.name:
                bases = [base for base in cls.__mro__ if base.__module__.split(".")[0] in UPSTREAMS]
                if bases:
                    found[cls] = bases
    return found


OURS = our_classes()
GENERATED = (
    "__module__",
    "__doc__",
    "__annotations__",
    "__dict__",
    "__weakref__",
    "__dataclass_fields__",
    "_abc_impl",
)


def overridden(cls, bases):
    """Names that a class of the package defines, or sets on itself, and a base upstream too; with that base."""
    is_dataclass = "__dataclass_fields__" in vars(cls)
    for name in vars(cls):
        if name == "_abc_impl" or (name.startswith("__") and name not in ("__init__", "__post_init__")):
            continue
        if name == "__init__" and is_dataclass:  # generated
            continue
        base = next((base for base in bases if name in vars(base)), None)
        if base is not None:
            yield name, base
    for name in sorted(set_on_self(cls)):
        base = next((base for base in bases if name in vars(base) or name in assigned(base.__module__)), None)
        if base is not None:
            yield name, base


@cache
def trees():
    """The syntax of all modules of the package, without annotations."""
    found = {}
    for path in (path for package in PACKAGES for path in sorted(Path(package.__file__).parent.rglob("*.py"))):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            for field in ("annotation", "returns"):
                if isinstance(getattr(node, field, None), ast.AST):
                    setattr(node, field, None)
        found[path.relative_to(ROOT).as_posix()] = tree
    return found


def is_self(node):
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def nodes_of(cls):
    tree = trees()[f"{cls.__module__.replace('.', '/')}.py"]
    body = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__), None)
    return [] if body is None else list(ast.walk(body))


def set_on_self(cls):
    return {node.attr for node in nodes_of(cls) if is_self(node)}


def has_row(name, bases):
    spelled = {f"{base.__module__}:{base.__qualname__}" for base in bases}
    for row in CONTRACT:
        if name in row.name.split(" | ") and not row.owner.endswith(".py") and ":" in row.owner:
            cls = resolve(row.owner)
            if cls is not None and f"{cls.__module__}:{cls.__qualname__}" in spelled:
                return True
    return False


def row_for(base, name):
    owner = f"{base.__module__}:{base.__qualname__}"
    parameters = "None"
    if isinstance(inspect.getattr_static(base, name, None), FunctionType):
        plain = [
            parameter.replace(annotation=inspect.Parameter.empty)
            for parameter in signature_of(base, name).parameters.values()
            if parameter.kind in (*POSITIONAL, inspect.Parameter.KEYWORD_ONLY)
        ]
        parameters = repr(str(inspect.Signature(plain))[1:-1])
    return f'    ("{owner}", "{name}", {parameters}, "<why>"),'


def test_overrides_have_rows():
    missing = [
        f"{cls.__module__}.{cls.__name__} overrides or sets `{name}`, which is {base.__module__}.{base.__name__}'s:\n"
        f"{row_for(base, name)}"
        for cls, bases in OURS.items()
        for name, base in overridden(cls, bases)
        if not has_row(name, bases)
    ]
    assert not missing, (
        "CONTRACT of tests/test_upstream_contract.py lacks rows. Add these, with the parameters that are relied on "
        "and the reason; or choose another name for an attribute of your own:\n" + "\n".join(missing)
    )


def private_names():
    """Private names that the package reads and does not define, with the first place of each."""
    defined, read = set(), {}
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif is_self(node):
                defined.add(node.attr)
            for name in names_read(node):
                read.setdefault(name, f"{path}:{node.lineno}")
    return {name: place for name, place in sorted(read.items()) if name not in defined}


def names_read(node):
    names = []
    if isinstance(node, ast.Attribute):
        names = [node.attr]
    elif isinstance(node, ast.ImportFrom) and not node.level:
        hidden = any(is_private(part) for part in (node.module or "").split("."))
        return [alias.name for alias in node.names if hidden or is_private(alias.name)]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
        names = [node.args[1].value] if isinstance(node.args[1], ast.Constant) else []
    return [name for name in names if is_private(name)]


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name != "_"


def test_private_names_have_rows():
    rows = {name for row in CONTRACT for name in re.findall(r"\w+", row.name)}
    missing = [
        f'{place} reads `{name}`:\n    ("<module:Class, or file.py>", "{name}", None, "<why>"),'
        for name, place in private_names().items()
        if name not in rows
    ]
    assert not missing, (
        "CONTRACT of tests/test_upstream_contract.py lacks rows for private names of others. Add these:\n"
        + "\n".join(missing)
    )


def test_every_row_is_once():
    rows = [(row.owner, row.name) for row in CONTRACT]
    assert not {row for row in rows if rows.count(row) > 1}


def test_every_row_is_needed():
    """A row whose name the package does not use any more says that it relies on something that it does not."""
    text = "\n".join((ROOT / path).read_text(encoding="utf-8") for path in trees())
    rows = [row for row in CONTRACT if not row.owner.endswith(".py") and row.name != "__init__"]
    unused = [
        f"{row.owner}.{row.name}"
        for row in rows
        if not any(re.search(rf"\b{name}\b", text) for name in row.name.split(" | "))
    ]
    assert not unused, f"The package does not use these any more, so remove their rows: {', '.join(unused)}"


def test_what_is_missing_is_named(monkeypatch):
    rows = [
        row for row in CONTRACT if row.name not in ("_get_output_dir", "_signature_columns", "_hp_mapping", "_actions")
    ]
    monkeypatch.setitem(globals(), "CONTRACT", rows)
    with pytest.raises(AssertionError) as missing:
        test_overrides_have_rows()
    text = str(missing.value)
    assert "StagedCheckpoints overrides or sets `_get_output_dir`, which is transformers.trainer.Trainer's:" in text
    assert """    ("transformers.trainer:Trainer", "_get_output_dir", 'trial', "<why>"),""" in text
    assert """    ("trl.trainer.sft_trainer:SFTTrainer", "_signature_columns", None, "<why>"),""" in text
    with pytest.raises(
        AssertionError, match="(?s)cli/train.py:[0-9]+ reads `_actions`.*saving.py:[0-9]+ reads `_hp_mapping`"
    ):
        test_private_names_have_rows()


@pytest.mark.parametrize(
    ("relied", "problem"),
    [
        ("a, b=1", None),
        ("a, *, c=2", None),
        ("", None),
        ("b", "'b' is not number 1 of (a, b)"),
        ("a, b, d", "no 'd'"),
        ("a, b=2", "'b' is 1 by default, not 2"),
        ("*, e", "no 'e'"),
    ],
)
def test_differences_of_parameters(relied, problem):
    found = differences(inspect.signature(eval(f"lambda {relied}: 0")), inspect.signature(lambda a, b=1, *, c=2: 0))
    assert problem in "; ".join(found) if problem else not found


# What is inherited, and read without an override, needs no row: it exists or not


def attributes_of(nodes, owner):
    """Names that are read of `self`, or read or set of `self.<owner>`."""
    dotted = "self" if owner is None else f"self.{owner}"
    return {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and (owner is not None or isinstance(node.ctx, ast.Load))
        and not node.attr.startswith("__")
        and ast.unparse(node.value) == dotted
    }


def test_inherited_names_exist():
    problems = []
    for cls in OURS:
        # With those of its subclasses, for classes that are mixed into others.
        around = {base for other in OURS if issubclass(other, cls) for base in other.__mro__}
        ours = {base for base in around if base.__module__.startswith("rlora_trl.")}
        theirs = around - ours
        own = set().union(*({*vars(base), *inspect.get_annotations(base), *set_on_self(base)} for base in ours))
        for name in sorted(attributes_of(nodes_of(cls), None) - own):
            if not any(has(base, name) for base in theirs):
                problems.append(f"{cls.__name__} reads `self.{name}`, which nothing upstream has")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("owner", "of"),
    {
        "args": RLoraSFTConfig,
        "state": TrainerState,
        "control": TrainerControl,
        "callback_handler": CallbackHandler,
        "accelerator": Accelerator,
        "accelerator.state": AcceleratorState,
    }.items(),
)
def test_names_of_the_trainers_objects_exist(owner, of):
    read = set().union(*(attributes_of(nodes_of(cls), owner) for cls in RLoraSFTTrainer.__mro__ if cls in OURS))
    assert read and not {name for name in read if not has(of, name)}


# Overrides are called, with what they take


def methods():
    for cls, bases in OURS.items():
        for name, base in overridden(cls, bases):
            if isinstance(vars(cls).get(name), FunctionType) and isinstance(vars(base).get(name), FunctionType):
                yield cls, name, base


def test_private_overrides_are_called():
    text = "\n".join(source(path) for path in CALLERS)
    dead = [
        f"{cls.__name__}.{name}"
        for cls, name, _ in methods()
        if is_private(name) and not re.search(rf"(?<!super\(\))\.{name}\b", text)
    ]
    assert not dead, f"Nothing upstream calls {', '.join(dead)} any more: what they do is lost. Find what is called."


def test_overrides_take_what_upstream_passes():
    for cls, name, base in methods():
        ours, theirs = signature_of(cls, name), signature_of(base, name)
        kinds = {parameter.kind for parameter in ours.parameters.values()}
        taken = [parameter.name for parameter in positional(ours)]
        for place, parameter in enumerate(positional(theirs)):
            where = f"{cls.__name__}.{name} does not take `{parameter.name}` of {base.__name__}.{name}"
            if inspect.Parameter.VAR_POSITIONAL not in kinds or place < len(taken):
                by_keyword = place >= len(taken) and inspect.Parameter.VAR_KEYWORD in kinds
                assert by_keyword or taken[place : place + 1] == [parameter.name], where
            assert parameter.name in ours.parameters or inspect.Parameter.VAR_KEYWORD in kinds, where


# What is mirrored agrees


def test_recorded_settings_exist():
    """`select_hyperparameters` leaves out what is not there, so a renamed field would vanish from records."""
    gone_fields = [name for name in record._HYPERPARAMETERS if not hasattr(RLoraSFTConfig, name)]
    annotated = {name for base in RLoraSFTConfig.__mro__ for name in inspect.get_annotations(base)}
    assert not set(gone_fields) - annotated


@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize("strategy", ["no", "steps", "epoch"])
def test_steps_that_log(tmp_path, strategy, first_step):
    """`_will_log` looks one step ahead of transformers' own decision."""
    args = RLoraSFTConfig(
        str(tmp_path), bf16=False, logging_strategy=strategy, logging_steps=3, logging_first_step=first_step
    )
    state = TrainerState(logging_steps=3, max_steps=12, num_train_epochs=2, save_steps=500, eval_steps=500)
    flow = DefaultFlowCallback()
    for step in range(12):
        state.global_step = step
        will_log = RLoraSFTTrainer._will_log(SimpleNamespace(args=args, state=state))
        state.global_step = step + 1
        control = flow.on_step_end(args, state, TrainerControl())
        if state.global_step in (6, 12):
            control = flow.on_epoch_end(args, state, control)
        assert will_log is control.should_log, step


# Versions


def pinned(name):
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_ceilings_stand_beside_floors():
    """What was tried lies within the bounds, and what is bounded above is what `make test-latest` frees."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = {found.name: found.specifier for found in map(Requirement, project["dependencies"])}
    capped = {name for name, specifier in requirements.items() if any(part.operator == "<" for part in specifier)}
    assert capped == {"torch", "transformers", "peft", "trl", "accelerate"}
    floors, tried = pinned("constraints-floors.txt"), pinned("constraints.txt")
    for name in capped:
        assert floors[name] in requirements[name] and tried[name] in requirements[name], name
        floor = next(part.version for part in requirements[name] if part.operator == ">=")
        assert floors[name] == floor or floors[name].startswith(f"{floor}."), name
    freed = re.search(r"^UPSTREAMS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert capped <= set(freed.group(1).split())
