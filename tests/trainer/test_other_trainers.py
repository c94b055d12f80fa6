"""TRL's preference and RL trainers with an `RLoraConfig`, and what `RLoraCallback` adds to them."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from testing_utils import TINY_MODELS, build_tokenizer, perturb, random_ids
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from rlora_trl import MultiHeadAdapter, RLoraCallback, RLoraConfig, RLoraSFTTrainer


FIGURES = {"router_entropy", "head_load_max", "head_load_cv", "head_similarity"}
PAIRS = [{"prompt": f"w{i} Answer:", "chosen": " yes", "rejected": " no"} for i in range(16)]
PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]
COMMON = {"per_device_train_batch_size": 4, "report_to": [], "logging_steps": 1, "use_cpu": True, "bf16": False}
TASKS = ["first", "second"]


def build_llama():
    torch.manual_seed(1)
    return TINY_MODELS["llama"]()


def dpo(folder, model=None, peft_config=None, callback=True, **settings):
    arguments = DPOConfig(str(folder), **{**COMMON, "max_steps": 4, "learning_rate": 5e-3, **settings})
    trainer = DPOTrainer(
        build_llama() if model is None else model,
        args=arguments,
        train_dataset=Dataset.from_list(PAIRS),
        eval_dataset=Dataset.from_list(PAIRS[:4]),
        processing_class=build_tokenizer(),
        peft_config=peft_config,
    )
    if callback:
        trainer.add_callback(RLoraCallback(trainer))
    return trainer


def says_yes(completions, **kwargs):
    return [float(" yes" in completion) + 0.1 * len(set(completion.split())) for completion in completions]


class Recorded(GRPOTrainer):
    """Keeps the rollouts of each step, with the log-probabilities that the trainer computed for them."""

    def _generate_and_score_completions(self, inputs):
        self.rollouts = getattr(self, "rollouts", [])
        with torch.no_grad():
            weights = [p.clone() for p in self.model.parameters() if p.requires_grad]
        outputs = super()._generate_and_score_completions(inputs)
        self.rollouts.append((weights, dict(outputs)))
        return outputs


def grpo(folder, model=None, peft_config=None, callback=True, **settings):
    sizes = {"num_generations": 4, "max_completion_length": 6, "max_steps": 3, "learning_rate": 5e-3, "beta": 0.04}
    trainer = Recorded(
        build_llama() if model is None else model,
        says_yes,
        args=GRPOConfig(str(folder), **{**COMMON, **sizes, **settings}),
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=build_tokenizer(),
        peft_config=peft_config,
    )
    if callback:
        trainer.add_callback(RLoraCallback(trainer))
    return trainer


def adapters_of(model):
    return [module for module in model.modules() if isinstance(module, MultiHeadAdapter)]


def frozen(model):
    return {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def log_probs(model, rollout):
    """The log-probabilities of the completions, computed by hand."""
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
    mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    taken = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return taken[:, -rollout["completion_ids"].shape[1] :]


@pytest.mark.parametrize("make", [dpo, grpo])
def test_training_changes_the_adapter_only_and_logs_the_router(tmp_path, make):
    trainer = make(tmp_path, peft_config=RLoraConfig.paper())
    before = frozen(trainer.model)
    start = [adapter.A.detach().clone() for adapter in adapters_of(trainer.model)]
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(not torch.equal(a.A, old) for a, old in zip(adapters_of(trainer.model), start, strict=True))

    entries = logged(trainer)
    assert len(entries) == trainer.args.max_steps
    for entry in entries:
        assert set(entry) >= FIGURES
        assert 0.333 <= entry["head_load_max"] < 1 and 0 < entry["router_entropy"] <= 1.1
    # Heads start with equal weights and do not stay so.
    assert entries[0]["head_load_cv"] == pytest.approx(0.0, abs=1e-4) and entries[-1]["head_load_cv"] > 1e-4

    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(build_llama(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(random_ids()).logits, trainer.model.eval()(random_ids()).logits)


def test_preferences_are_learned_against_the_base_model(tmp_path):
    trainer = dpo(tmp_path, peft_config=RLoraConfig.paper(), max_steps=8)
    start = trainer.evaluate()
    # The policy is the reference at step 0.
    assert start["eval_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert start["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.6


def test_rollouts_use_the_adapter_and_the_reference_does_not(tmp_path):
    model = get_peft_model(build_llama(), RLoraConfig(task_type="CAUSAL_LM"))
    perturb(model, scale=1.0)
    base = build_llama().eval()
    # Greedy, so that the tokens show which model has drawn them; the second step trains on rollouts of the first.
    trainer = grpo(tmp_path, model, top_k=1, max_steps=2, steps_per_generation=2, disable_dropout=True)
    expected = {}
    tokenizer = build_tokenizer()
    for name, generator in {"adapter": trainer.model, "base": base}.items():
        batch = tokenizer([row["prompt"] for row in PROMPTS], return_tensors="pt")
        generated = generator.eval().generate(**batch, max_new_tokens=6, do_sample=False)
        prompts = [tuple(ids) for ids in batch["input_ids"].tolist()]
        completions = generated[:, batch["input_ids"].shape[1] :].tolist()
        expected[name] = dict(zip(prompts, completions, strict=True))
    trainer.model.train()
    trainer.train()

    _, rollout = trainer.rollouts[0]
    for prompt, completion, mask in zip(
        rollout["prompt_ids"].tolist(),
        rollout["completion_ids"].tolist(),
        rollout["completion_mask"].bool().tolist(),
        strict=True,
    ):
        drawn = [token for token, kept in zip(completion, mask, strict=True) if kept]
        assert (
            drawn == expected["adapter"][tuple(prompt)][: len(drawn)] != expected["base"][tuple(prompt)][: len(drawn)]
        )


def test_log_probabilities_of_rollouts(tmp_path):
    """Those of the policy come from the adapter, those of the reference from the base model."""
    trainer = grpo(tmp_path, peft_config=RLoraConfig.paper(), max_steps=4, num_iterations=2, disable_dropout=True)
    trainer.train()
    weights, rollout = trainer.rollouts[-1]
    mask = rollout["completion_mask"].bool()
    for parameter, value in zip([p for p in trainer.model.parameters() if p.requires_grad], weights, strict=True):
        parameter.data.copy_(value)
    policy, reference = log_probs(trainer.model, rollout), log_probs(build_llama(), rollout)
    torch.testing.assert_close(rollout["old_per_token_logps"][mask], policy[mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rollout["ref_per_token_logps"][mask], reference[mask], rtol=1e-4, atol=1e-4)
    assert (policy - reference)[mask].abs().max() > 1e-2


@pytest.mark.parametrize("make", [dpo, grpo])
def test_a_trained_adapter_is_its_own_reference(tmp_path, make):
    model = get_peft_model(build_llama(), RLoraConfig(task_type="CAUSAL_LM"))
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build_llama(), tmp_path / "adapter", is_trainable=True)
    trainer = make(tmp_path, loaded, disable_dropout=True)
    assert set(trainer.model.peft_config) == {"default", "ref"}
    reference = {n: p.clone() for n, p in trainer.model.named_parameters() if ".ref." in n}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert reference and all(torch.equal(after[name], value) for name, value in reference.items())
    if make is dpo:
        assert logged(trainer)[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    else:
        assert logged(trainer)[0]["kl"] == pytest.approx(0.0, abs=1e-4)


def test_disabled_dropout_is_that_of_heads_too(tmp_path):
    assert dpo(tmp_path, peft_config=RLoraConfig.paper(), callback=False).args.disable_dropout  # TRL's default
    for disabled in (True, False):
        trainer = dpo(tmp_path, peft_config=RLoraConfig.paper(), disable_dropout=disabled)
        assert {adapter.dropout for adapter in adapters_of(trainer.model)} == {0.0 if disabled else 0.2}
    assert trainer.model.peft_config["default"].head_dropout == 0.2


def test_trackers_get_the_figures_but_not_of_evaluations(tmp_path):
    class Tracker(TrainerCallback):
        def __init__(self):
            self.entries = []

        def on_log(self, args, state, control, logs, **kwargs):
            self.entries.append(dict(logs))

    trainer = dpo(tmp_path, peft_config=RLoraConfig.paper(), callback=False, eval_strategy="steps", eval_steps=2)
    tracker = Tracker()
    trainer.callback_handler.callbacks.insert(0, tracker)
    trainer.add_callback(RLoraCallback(trainer))
    trainer.train()
    trained = [entry for entry in tracker.entries if "loss" in entry]
    assert len(trained) == 4 and all(set(entry) >= FIGURES for entry in trained)
    others = [entry for entry in tracker.entries if "loss" not in entry]
    assert len(others) == 3 and not any(FIGURES & set(entry) for entry in others)
    assert not trainer.model._forward_pre_hooks or len(trainer.model._forward_pre_hooks) == 1  # the model's own


def test_padding_does_not_count(tmp_path):
    """The statistics are those of the tokens, however wide the batch is."""
    entropies = []
    for width in (0, 9):
        trainer = dpo(tmp_path, peft_config=RLoraConfig(router_init="kaiming_uniform"), max_steps=1)
        collate = trainer.data_collator

        def widen(rows, collate=collate, width=width):
            batch = collate(rows)
            return {
                name: torch.nn.functional.pad(value, (0, width)) if value.ndim == 2 else value
                for name, value in batch.items()
            }

        trainer.data_collator = widen
        trainer.train()
        entropies.append(logged(trainer)[0]["router_entropy"])
    assert entropies[1] == pytest.approx(entropies[0], rel=1e-5)


@pytest.mark.parametrize("make", [dpo, grpo])
def test_a_task_router_needs_a_task(tmp_path, make):
    config = RLoraConfig(router="task", tasks=TASKS)
    with pytest.raises(ValueError, match=r"passed no task.*first, second.*set_task\('first'\)"):
        make(tmp_path, peft_config=config).train()

    trainer = make(tmp_path, peft_config=config, max_steps=2)
    trainer.model.set_task("second")
    routers = [adapter.router.detach().clone() for adapter in adapters_of(trainer.model)]
    trainer.train()
    moved = [(a.router - old).abs().amax(1) > 0 for a, old in zip(adapters_of(trainer.model), routers, strict=True)]
    assert all(rows.tolist() == [False, True] for rows in moved)


def test_a_task_that_the_reference_lacks_is_refused(tmp_path):
    """TRL creates the reference from the configuration, which has no task."""
    model = get_peft_model(build_llama(), RLoraConfig(task_type="CAUSAL_LM", router="task", tasks=TASKS))
    model.set_task("first")
    trainer = dpo(tmp_path, model)
    with pytest.raises(ValueError, match="After creating the trainer"):
        trainer.train()
    trainer.model.set_task("first")
    trainer.train()


def test_adapters_on_a_quantized_base_stay_in_float32(tmp_path):
    pytest.importorskip("bitsandbytes")
    TINY_MODELS["llama64"]().save_pretrained(tmp_path / "base")

    def quantized():
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, dtype=torch.bfloat16
        )

    trainer = dpo(tmp_path, quantized(), RLoraConfig.paper(), callback=False)
    assert {adapter.A.dtype for adapter in adapters_of(trainer.model)} == {torch.bfloat16}  # TRL's
    trainer = dpo(tmp_path, quantized(), RLoraConfig.paper())
    assert {p.dtype for adapter in adapters_of(trainer.model) for p in adapter.parameters()} == {torch.float32}
    model, ids = trainer.model.eval(), random_ids()
    with torch.no_grad(), model.disable_adapter():
        expected = model(ids).logits
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    trainer.train()
    assert set(logged(trainer)[-1]) >= FIGURES


def test_what_is_refused(model_folders, tmp_path):
    trainer = dpo(tmp_path, peft_config=RLoraConfig.paper())
    with pytest.raises(ValueError, match="needs a model with R-LoRA adapters that train.*is_trainable=True"):
        trainer.model.requires_grad_(False)
        RLoraCallback(trainer)
    sft = RLoraSFTTrainer.__new__(RLoraSFTTrainer)
    with pytest.raises(TypeError, match="is for other trainers"):
        RLoraCallback(sft)
    trainer = dpo(tmp_path, peft_config=RLoraConfig.paper())
    trainer.args.use_vllm = True
    with pytest.raises(ValueError, match=r"`use_vllm=True`.*router='softmax'.*router=\"uniform\""):
        RLoraCallback(trainer)
