"""Balance losses in training: what they add to the gradients, however a step is split; and what they do to heads."""

import pytest
import torch
from datasets import Dataset
from testing_utils import TINY_MODELS, build_tokenizer, task_datasets, task_rows
from trainer_utils import arguments
from transformers import TrainerCallback
from trl import SFTTrainer

from rlora_trl import MultiHeadAdapter, RLoraConfig, RLoraSFTTrainer
from rlora_trl.kernels import balance_loss


KINDS = ("switch", "importance", "mutual_information", "z")
COEFFICIENT = 2.0  # so that the added gradient is of the size of the loss's, and rounding does not hide errors


class Gradients(TrainerCallback):
    """Keeps the gradients of the last step, before the optimizer uses them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.kept = {n: p.grad.detach().clone().double() for n, p in model.named_parameters() if p.grad is not None}


def rows_of_different_lengths(count=8):
    rows = []
    for index in range(count):
        rows.append(task_rows("first", 1, seed=index)[0])
        rows[-1]["prompt"] = " ".join(["w7"] * index * 2) + " " + rows[-1]["prompt"]
    return rows


def trainer_for(model_folders, folder, rows=None, config=None, seed=3, **kwargs):
    """A trainer whose adapter is away from its initial values, and whose steps are all alike."""
    settings = {"max_steps": 1, "train_sampling_strategy": "sequential", "max_grad_norm": 0.0, "optim": "sgd"}
    trainer = RLoraSFTTrainer(
        model=model_folders["llama"],
        args=arguments(folder, **{**settings, **kwargs}),
        train_dataset=Dataset.from_list(rows or rows_of_different_lengths()),
        processing_class=build_tokenizer(),
        peft_config=config or RLoraConfig(head_dropout=0.0, router_init="kaiming_uniform"),
        callbacks=[Gradients()],
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters_of(trainer):
            adapter.router.add_(torch.randn(adapter.router.shape, generator=generator).to(adapter.router))
    return trainer


def adapters_of(trainer):
    return [module for module in trainer.model.modules() if isinstance(module, MultiHeadAdapter)]


def gradients(trainer):
    trainer.train()
    return next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, Gradients)).kept


def added(make, **kwargs):
    """What the balance loss adds to each gradient: with it less without it."""
    with_loss, without = gradients(make(**kwargs)), gradients(make(**{**kwargs, "balance_loss": "none"}))
    return {name: with_loss[name] - without[name] for name in with_loss}


def flat(grads, only=""):
    return torch.cat([grad.flatten() for name, grad in sorted(grads.items()) if only in name])


def assert_same(a, b, tolerance=2e-5):
    """Of float32 gradients, which are differences of others about as large."""
    for only in ("", ".router", ".A", ".B"):
        x, y = flat(a, only), flat(b, only)
        assert (x - y).norm() < tolerance * y.norm(), (only, (x - y).norm() / y.norm())
    assert flat(a, ".router").norm() > 0


def by_autograd(trainer, kind):
    """The gradients of the formula, through the whole model, on the trainer's batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    mask = batch["attention_mask"].flatten()
    losses = []

    def hook(adapter, args, kwargs):
        x = args[0].reshape(-1, args[0].shape[-1])
        losses.append(balance_loss(x @ adapter.router.T, kind, mask))

    handles = [a.register_forward_pre_hook(hook, with_kwargs=True) for a in adapters_of(trainer)]
    trainer.model.train()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    loss = COEFFICIENT * torch.stack(losses).mean()
    named = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    # Nothing is behind the last layers but their own routers.
    return {
        n: torch.zeros_like(p).double() if g is None else g.double()
        for (n, p), g in zip(named.items(), grads, strict=True)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_adds_the_gradient_of_the_formula(model_folders, tmp_path, kind):
    def make(**kwargs):
        return trainer_for(model_folders, tmp_path, **kwargs)

    wanted = by_autograd(make(), kind)
    got = added(make, balance_loss=kind, balance_coef=COEFFICIENT)
    assert_same(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_makes_no_difference(model_folders, tmp_path, kind):
    def run(**kwargs):
        make = lambda **own: trainer_for(model_folders, tmp_path, **{**kwargs, **own})  # noqa: E731
        return added(make, balance_loss=kind, balance_coef=COEFFICIENT)

    plain = run()
    for reentrant in (True, False):
        checkpointed = run(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert_same(checkpointed, plain)


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_accumulation_makes_no_difference_for_what_is_linear_in_tokens(model_folders, tmp_path, scope):
    def run(batch, steps):
        make = lambda **own: trainer_for(  # noqa: E731
            model_folders, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, **own
        )
        return added(make, balance_loss="z", balance_coef=COEFFICIENT, balance_scope=scope)

    whole = run(8, 1)
    assert_same(run(4, 2), whole)
    assert_same(run(1, 8), whole)


@pytest.mark.parametrize("scope", ["micro", "global"])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_over_copies_makes_no_difference(model_folders, tmp_path, kind, scope):
    rows = rows_of_different_lengths()[:4] * 2

    def run(batch, steps):
        make = lambda **own: trainer_for(  # noqa: E731
            model_folders, tmp_path, rows, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, **own
        )
        return added(make, balance_loss=kind, balance_coef=COEFFICIENT, balance_scope=scope)

    assert_same(run(4, 2), run(8, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_path_makes_no_difference(model_folders, tmp_path, monkeypatch, kind):
    make = lambda **own: trainer_for(model_folders, tmp_path, **own)  # noqa: E731
    fused = added(make, balance_loss=kind, balance_coef=COEFFICIENT)
    # What decides between the fused and the composed form.
    monkeypatch.setattr("rlora_trl.tuner.adapter.torch.compiler.is_compiling", lambda: True)
    assert_same(added(make, balance_loss=kind, balance_coef=COEFFICIENT), fused)


def test_a_loss_that_the_trainer_divides_is_balanced_alike(model_folders, tmp_path, monkeypatch):
    """Where tokens are not counted over the step, `Trainer` divides by the number of micro-batches."""
    rows = rows_of_different_lengths()[:4] * 2
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    make = lambda **own: trainer_for(model_folders, tmp_path, rows, **options, **own)  # noqa: E731
    counted = added(make, balance_loss="switch", balance_coef=COEFFICIENT)
    monkeypatch.setattr(RLoraSFTTrainer, "_get_num_items_in_batch", lambda *args, **kwargs: None)
    assert_same(added(make, balance_loss="switch", balance_coef=COEFFICIENT), counted)


@pytest.mark.parametrize("router", ["top_k", "task"])
def test_other_routers_are_balanced(model_folders, tmp_path, router):
    config = RLoraConfig.moe_lora(head_dropout=0.0) if router == "top_k" else None
    if router == "task":
        config = RLoraConfig(router="task", head_dropout=0.0, router_init="kaiming_uniform")
    rows = [{**row, "task": "ab"[i % 2]} for i, row in enumerate(rows_of_different_lengths())]
    make = lambda **own: trainer_for(model_folders, tmp_path, rows, config, **own)  # noqa: E731
    grads = added(make, balance_loss="switch", balance_coef=COEFFICIENT)
    for name, grad in grads.items():
        if name.endswith(".router"):
            assert (grad.norm(dim=1) > 0).all(), name


def test_evaluation_loss_does_not_contain_it(model_folders, tmp_path):
    losses = []
    for options in ({}, {"balance_loss": "z", "balance_coef": 100.0}):
        trainer = trainer_for(model_folders, tmp_path, **options)
        trainer.eval_dataset = trainer.train_dataset
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def test_a_coefficient_of_zero_is_none(model_folders, tmp_path):
    make = lambda **own: trainer_for(model_folders, tmp_path, **own)  # noqa: E731
    grads = gradients(make(balance_loss="switch", balance_coef=0.0))
    wanted = gradients(make())
    assert all(torch.equal(grads[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("config", [RLoraConfig(router="uniform"), RLoraConfig(num_heads=1, router="uniform")])
def test_nothing_to_balance_is_refused(model_folders, tmp_path, config):
    with pytest.raises(ValueError, match="needs a router with several heads to balance"):
        trainer_for(model_folders, tmp_path, config=config, balance_loss="switch")


def test_beside_the_loss_of_a_mixture_of_experts(tmp_path):
    """TRL's `router_aux_loss_coef` is for the experts of the base model, `balance_coef` for the heads."""
    from transformers import MixtralConfig, MixtralForCausalLM

    decoder = TINY_MODELS["llama"]().config
    config = MixtralConfig(
        vocab_size=decoder.vocab_size,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        pad_token_id=0,
    )

    def run(**kwargs):
        torch.manual_seed(0)
        trainer = RLoraSFTTrainer(
            MixtralForCausalLM(config),
            arguments(tmp_path, max_steps=2, **kwargs),
            train_dataset=task_datasets(),
            processing_class=build_tokenizer(),
            peft_config=RLoraConfig(target_modules=["q_proj", "v_proj"], router_init="kaiming_uniform"),
        )
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    both, experts, heads = (
        run(router_aux_loss_coef=0.5, balance_loss="z", balance_coef=1.0)[0],
        run(router_aux_loss_coef=0.5)[0],
        run(router_aux_loss_coef=0.0, balance_loss="z", balance_coef=1.0)[0],
    )
    assert both["aux_loss"] == pytest.approx(experts["aux_loss"]) and "aux_loss" not in heads
    assert both["balance_loss"] == pytest.approx(heads["balance_loss"]) and "balance_loss" not in experts
    # The loss that is shown has the experts' part, as TRL shows it, and not the heads'.
    assert both["loss"] == pytest.approx(experts["loss"])
    assert both["grad_norm_router"] != pytest.approx(experts["grad_norm_router"], rel=1e-3)


def take_over(trainer, head=0, margin=6.0):
    """A router that prefers one head by about `margin` for every token of the data, found by least squares."""
    batch = next(iter(trainer.get_train_dataloader()))
    seen = {}

    def hook(adapter, args, kwargs):
        seen[adapter] = args[0].detach().reshape(-1, args[0].shape[-1])

    handles = [a.register_forward_pre_hook(hook, with_kwargs=True) for a in adapters_of(trainer)]
    with torch.no_grad():
        trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for handle in handles:
            handle.remove()
        for adapter, x in seen.items():
            kept = x[batch["attention_mask"].flatten().bool()]
            adapter.router.zero_()
            adapter.router[head] = torch.linalg.lstsq(kept, torch.full((len(kept), 1), margin)).solution[:, 0]


@pytest.mark.parametrize("kind", ["none", "switch", "importance", "mutual_information"])
def test_a_head_that_has_taken_over(tmp_path, kind):
    """A balance loss takes it back; without one it stays. (z keeps logits small, it does not balance.)"""
    torch.manual_seed(0)
    model = TINY_MODELS["llama"]()
    trainer = RLoraSFTTrainer(
        model,
        arguments(
            tmp_path,
            per_device_train_batch_size=30,
            max_steps=200,
            balance_loss=kind,
            # Where all tokens prefer one head alike, mutual information is stationary: it only amplifies differences.
            balance_coef=1.0 if kind == "mutual_information" else 0.1,
            learning_rate=1e-3,
            router_learning_rate=1e-2,
            logging_steps=20,
            logging_first_step=True,
        ),
        train_dataset=task_datasets(10),
        processing_class=build_tokenizer(),
        peft_config=RLoraConfig(head_dropout=0.0),
    )
    take_over(trainer)
    trainer.train()
    load = [entry["head_load_max"] for entry in trainer.state.log_history if "head_load_max" in entry]
    assert load[0] > 0.9
    if kind == "none":
        assert load[-1] > 0.6  # what the task itself moves
    elif kind == "mutual_information":
        # It asks for decided tokens too: a head that no token prefers by then gets little gradient, and in some layers
        # two heads share the tokens.
        assert load[-1] < 0.6
    else:
        assert load[-1] < 1.5 / 3


def test_what_is_logged(model_folders, tmp_path):
    trainer = trainer_for(model_folders, tmp_path, max_steps=6, logging_steps=3, balance_loss="switch")
    batch = next(iter(trainer.get_train_dataloader()))
    mask = batch["attention_mask"].flatten().bool()
    weights, losses = [], []

    def hook(adapter, args, kwargs):
        x = args[0].detach().reshape(-1, args[0].shape[-1])[mask]
        weights.append(adapter.head_weights(x))
        losses.append(balance_loss(x @ adapter.router.T, "switch"))

    handles = [a.register_forward_pre_hook(hook, with_kwargs=True) for a in adapters_of(trainer)]
    trainer.args.learning_rate = 0.0
    with torch.no_grad():
        trainer.model.train()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [3, 6]
    load = torch.stack([w.mean(0) for w in weights])
    for entry in logs:
        assert entry["balance_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
        entropy = torch.stack([-(w * w.log()).sum(-1).mean() for w in weights]).mean().item()
        assert entry["router_entropy"] == pytest.approx(entropy, rel=1e-4)
        assert entry["head_load_max"] == pytest.approx(load.amax(1).mean().item(), rel=1e-4)
        cv = (load.std(1, correction=0) / load.mean(1)).mean().item()
        assert entry["head_load_cv"] == pytest.approx(cv, rel=1e-4)
        cosines = [
            torch.nn.functional.cosine_similarity(a.B[i].flatten(), a.B[j].flatten(), dim=0)
            for a in adapters_of(trainer)
            for i, j in ((0, 1), (0, 2), (1, 2))
        ]
        assert entry["head_similarity"] == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-5)
        norms = [entry[f"grad_norm_{name}"] for name in ("A", "B", "router")]
        assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(entry["grad_norm"], rel=1e-4)


def test_without_a_router_there_is_nothing_to_log_of_it(model_folders, tmp_path):
    trainer = RLoraSFTTrainer(
        model_folders["llama"],
        arguments(tmp_path, max_steps=1),
        train_dataset=task_datasets(),
        processing_class=build_tokenizer(),
        peft_config=RLoraConfig(router="uniform"),
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    assert "grad_norm_A" in entry and "grad_norm_router" not in entry and "head_load_max" not in entry


def test_padding_never_counts(model_folders, tmp_path):
    """The same rows, padded more: the same gradient of the balance loss."""
    make = lambda **own: trainer_for(model_folders, tmp_path, **own)  # noqa: E731
    options = {"balance_loss": "switch", "balance_coef": COEFFICIENT}
    assert_same(added(make, pad_to_multiple_of=64, **options), added(make, **options))


def test_other_trainers_train_the_model_as_ever(model_folders, tmp_path):
    """The state that a trainer of ours leaves behind does not reach another one's steps."""
    trainer = trainer_for(model_folders, tmp_path, balance_loss="switch")
    trainer.train()
    rows = Dataset.from_list(task_rows("first", 8))
    other = SFTTrainer(
        trainer.model,
        arguments(tmp_path / "other", max_steps=1),
        train_dataset=rows,
        processing_class=build_tokenizer(),
    )
    stats = trainer._observer.monitor.step.data.clone()
    other.train()
    assert torch.equal(trainer._observer.monitor.step.data, stats)
