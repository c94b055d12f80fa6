"""Balance losses of experts: each expert is a layer whose tokens are those that it gets."""

from functools import partial

import expert_models
import pytest
import torch
from datasets import Dataset
from expert_models import build, with_loops
from peft import get_peft_model
from testing_utils import build_tokenizer, random_ids, task_rows
from trainer_utils import arguments
from transformers import TrainerCallback

from rlora_trl import MultiHeadAdapter, RLoraConfig, RLoraSFTTrainer
from rlora_trl.kernels import balance_loss, capture_loss_grad
from rlora_trl.trainer.monitor import RoutingMonitor
from rlora_trl.tuner.routing import find_routings


KINDS = ("switch", "importance", "mutual_information", "z")
COEFFICIENT = 2.0  # so that the added gradient is of the size of the loss's
FORMS = [("qwen3_moe", "eager"), ("qwen3_moe", "batched_mm"), ("qwen3_moe", "grouped_mm"), ("llama4", None)]


def adapters_of(model):
    return [module for module in model.modules() if isinstance(module, MultiHeadAdapter)]


def adapted(family, form=None, **fields):
    base = build(family)
    if form is not None:
        base.set_experts_implementation(form)
    fields = {"head_dropout": 0.0, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], **fields}
    model = get_peft_model(base, RLoraConfig(**fields)).train()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in adapters_of(model):
            adapter.router.add_(torch.randn(adapter.router.shape, generator=generator))
    return model


def batch(padded):
    ids = random_ids(4, 9)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = mask[2, :7] = 0
    return {"input_ids": ids, "attention_mask": mask}


def gradients(model, loss):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}


def with_balance(model, kind, inputs, coefficient=COEFFICIENT):
    """The gradients of a loss with a balance loss, and the figures that would be logged."""
    tokens = inputs["attention_mask"].sum().float()
    monitor = RoutingMonitor(adapters_of(model), kind, coefficient, False, torch.device("cpu"))
    monitor.begin_step(tokens, 1, lambda tensor: tensor)
    tally = monitor.tally(1, tokens)
    for routing in find_routings(model):
        routing.update(tally=tally, token_mask=inputs["attention_mask"])
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    grads = gradients(model, capture_loss_grad(loss, tally))
    for routing in find_routings(model):
        routing.forget_batch()
    return grads, monitor.summary(lambda tensor: tensor)


def by_loops(model, kind, inputs, monkeypatch):
    """The balance loss from a loop over experts, by its formula."""
    seen, tokens = {id(adapter.router): [] for adapter in adapters_of(model)}, []
    reference = expert_models.multihead_delta_reference

    def recording(x, A, B, router, *args, **kwargs):
        seen[id(router._base)].append((tokens[-1], x, router))
        return reference(x, A, B, router, *args, **kwargs)

    monkeypatch.setattr(expert_models, "multihead_delta_reference", recording)
    with_loops(model, task_logits=lambda token, adapter, expert: tokens.append(token))
    model(**inputs)

    mask, losses = inputs["attention_mask"].flatten().bool(), []
    for calls in seen.values():
        rows = [(x[mask[token] & (x != 0).any(-1)], router) for token, x, router in calls]
        total = sum(len(x) for x, _ in rows)
        losses.append(sum(len(x) / total * balance_loss(x @ router.T, kind) for x, router in rows if len(x)))
    return torch.stack(losses).mean()


def flat(grads, only=""):
    return torch.cat([grad.flatten() for name, grad in sorted(grads.items()) if only in name]).double()


def assert_same(actual, expected, tolerance=1e-4):
    """Of float32 gradients, which are differences of others about as large."""
    for only in ("", ".router", ".A", ".B"):
        x, y = flat(actual, only), flat(expected, only)
        assert (x - y).norm() <= tolerance * y.norm(), (only, (x - y).norm() / y.norm())
    assert flat(expected, ".router").norm() > 0


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "form"), FORMS)
def test_adds_the_gradient_of_the_formula(family, form, kind, padded, monkeypatch):
    model, inputs = adapted(family, form), batch(padded)
    with_loss, figures = with_balance(model, kind, inputs)
    without, _ = with_balance(model, "none", inputs)
    added = {name: with_loss[name] - without[name] for name in with_loss}

    formula = by_loops(model, kind, inputs, monkeypatch)
    assert_same(added, gradients(model, COEFFICIENT * formula))
    assert figures["balance_loss"] == pytest.approx(float(formula.detach()), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("fields", [{"dropout_position": "input"}, {"share_a": False}, {"init_weights": "zero_b"}])
def test_other_adapters(fields, monkeypatch):
    model, inputs = adapted("qwen3_moe", "grouped_mm", **fields), batch(True)
    with_loss, without = with_balance(model, "switch", inputs)[0], with_balance(model, "none", inputs)[0]
    formula = by_loops(model, "switch", inputs, monkeypatch)
    expected = gradients(model, COEFFICIENT * formula)
    assert_same({name: with_loss[name] - without[name] for name in with_loss}, expected, 1e-3)


def test_figures_are_means_over_experts_by_their_tokens(monkeypatch):
    model, inputs = adapted("qwen3_moe", "grouped_mm"), batch(False)
    _, figures = with_balance(model, "none", inputs)
    assert "balance_loss" not in figures
    entropies = []
    monkeypatch.setitem(
        by_loops.__globals__,
        "balance_loss",
        lambda logits, kind: torch.distributions.Categorical(logits=logits).entropy().mean(),
    )
    entropies = by_loops(model, "none", inputs, monkeypatch)
    assert figures["router_entropy"] == pytest.approx(float(entropies.detach()), rel=1e-5)
    assert 1 / 3 < figures["head_load_max"] < 1 and figures["head_load_cv"] > 0


def test_a_loop_without_indices_is_refused():
    """The number of experts of a token is unknown there."""
    model = adapted("qwen3_moe", "eager")
    for wrapper in expert_models.wrappers(model).values():
        experts = wrapper.base_layer
        hidden = experts.forward
        wrapper.forward = partial(lambda run, experts, x, index, weights: run(x), wrapper.forward, experts)
        experts.forward = partial(_first_expert, hidden)
    inputs = batch(False)
    with_balance(model, "none", inputs)
    with pytest.raises(RuntimeError, match="needs the number of experts of each token"):
        with_balance(model, "switch", inputs)


def _first_expert(forward, x):
    return forward(x, torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1))


# Through the trainer


class Gradients(TrainerCallback):
    """Keeps the gradients of the last step, before the optimizer uses them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.kept = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def trained(folder, rows, seed=1, **settings):
    options = {"max_steps": 1, "train_sampling_strategy": "sequential", "max_grad_norm": 0.0, "optim": "sgd"}
    torch.manual_seed(seed)
    trainer = RLoraSFTTrainer(
        model=build("qwen3_moe"),
        args=arguments(folder, **{**options, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=build_tokenizer(),
        peft_config=RLoraConfig(head_dropout=0.0, router_init="kaiming_uniform"),
        callbacks=[Gradients()],
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in adapters_of(trainer.model):
            adapter.router.add_(torch.randn(adapter.router.shape, generator=generator))
    trainer.train()
    return trainer, next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, Gradients)).kept


def added(folder, rows, **settings):
    _, with_loss = trained(folder, rows, balance_coef=COEFFICIENT, **settings)
    _, without = trained(folder, rows, **{**settings, "balance_loss": "none"})
    return {name: with_loss[name] - without[name] for name in with_loss}


def test_a_step_may_be_split(tmp_path):
    """The loss "z" is a mean over tokens, so that its gradient is the same for each split."""
    rows = task_rows("first", 8)
    whole = added(tmp_path, rows, balance_loss="z", per_device_train_batch_size=8)
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert_same(added(tmp_path, rows, balance_loss="z", **halves), whole)
    assert_same(added(tmp_path, rows, balance_loss="z", gradient_checkpointing=True, **halves), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_the_whole_step(tmp_path, kind):
    """Equal micro-batches and steps have equal shares, so that the scope makes no difference."""
    rows = task_rows("first", 4) * 4
    settings = {
        "balance_loss": kind,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "learning_rate": 1e-30,
    }
    micro = added(tmp_path, rows, **settings)
    assert_same(added(tmp_path, rows, balance_scope="global", **settings), micro)


def test_shares_of_different_micro_batches(tmp_path):
    """A step whose halves differ: after the first step, the gradient is about that of all its rows at once."""
    rows = (task_rows("first", 4) + task_rows("same", 4)) * 2
    settings = {"balance_loss": "importance", "max_steps": 2, "learning_rate": 1e-30}
    whole = added(tmp_path, rows, per_device_train_batch_size=8, **settings)
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    by_halves = added(tmp_path, rows, **halves, **settings)
    estimated = added(tmp_path, rows, balance_scope="global", **halves, **settings)

    def error(grads):
        return ((flat(grads, "router") - flat(whole, "router")).norm() / flat(whole, "router").norm()).item()

    assert error(estimated) < 0.5 * error(by_halves), (error(estimated), error(by_halves))


def test_a_resumed_run_has_the_shares(tmp_path):
    settings = {
        "balance_loss": "switch",
        "balance_coef": COEFFICIENT,
        "balance_scope": "global",
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
    }
    rows = task_rows("first", 32)
    trainer, _ = trained(tmp_path, rows, **settings)
    whole = [entry["balance_loss"] for entry in trainer.state.log_history if "balance_loss" in entry]
    resumed = RLoraSFTTrainer(
        model=build("qwen3_moe"),
        args=arguments(
            tmp_path,
            **{"train_sampling_strategy": "sequential", "max_grad_norm": 0.0, "optim": "sgd", **settings},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=build_tokenizer(),
        peft_config=RLoraConfig(head_dropout=0.0, router_init="kaiming_uniform"),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [e["balance_loss"] for e in resumed.state.log_history if "balance_loss" in e] == whole
    assert len(whole) == 4


def test_the_state_of_many_experts_on_many_ranks_is_bounded(monkeypatch):
    model = adapted("qwen3_moe")
    monitor = RoutingMonitor(adapters_of(model), "switch", 1.0, True, torch.device("cpu"))
    monitor.step.data.copy_(torch.rand(monitor.step.data.shape) + 1.0)
    ranks = monitor.state(lambda sums: torch.cat([sums, 3.0 * sums]))
    assert len(ranks) == 2
    monkeypatch.setattr("rlora_trl.trainer.monitor._MOST_NUMBERS", len(ranks[0]))
    (summed,) = monitor.state(lambda sums: torch.cat([sums, 3.0 * sums]))
    torch.testing.assert_close(torch.tensor(summed), torch.tensor(ranks).sum(0))

    monitor.load_state(ranks, rank=1, ranks=2)
    prior, own = monitor.prior, monitor.prior_of_rank
    monitor.load_state([summed], rank=1, ranks=2)
    torch.testing.assert_close(monitor.prior, prior)
    torch.testing.assert_close(monitor.prior_of_rank, own)


def test_a_balance_loss_evens_the_heads(tmp_path):
    def load(**settings):
        rows = task_rows("first", 160)
        trainer, _ = trained(tmp_path, rows, max_steps=20, optim="adamw_torch", learning_rate=1e-2, **settings)
        return [entry["head_load_cv"] for entry in trainer.state.log_history if "head_load_cv" in entry]

    balanced, free = load(balance_loss="importance", balance_coef=3.0), load()
    assert balanced[-1] < 0.7 * free[-1], (balanced, free)
