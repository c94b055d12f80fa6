"""Activation checkpointing repeats a forward pass with what that pass knew of its batch, whoever calls."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from testing_utils import perturb, random_ids
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from rlora_trl import RLoraConfig
from rlora_trl.tuner import find_routings
from rlora_trl.tuner.routing import _REMEMBERED


TASKS = ["a", "b", "c"]
KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def build(model_folders, **options):
    base = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    config = RLoraConfig(task_type="CAUSAL_LM", router="task", tasks=TASKS, **{"head_dropout": 0.2, **options})
    model = get_peft_model(base, config).train()
    perturb(model, scale=2.0)
    return model


def enable(model, reentrant):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()


def wrap_layers(model, reentrant):
    """What accelerate does for FSDP."""
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    layers = model.base_model.model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer, checkpoint_impl=kind)
    model.enable_input_require_grads()


def call_checkpoint(model, reentrant):
    """What the code of many models does."""
    for layer in model.base_model.model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=reentrant)
        if reentrant:  # which takes no keywords
            forward = layer.forward.args[0]
            layer.forward = lambda hidden, forward=forward, **kwargs: checkpoint(
                partial(forward, **kwargs), hidden, use_reentrant=True
            )
    model.enable_input_require_grads()


def loss_of(model, seed, **kwargs):
    ids = random_ids(batch=4, seed=seed).to(model.device)
    # A recomputation would add to a cache what is in it already.
    return model(input_ids=ids, labels=ids, use_cache=False, **kwargs).loss


def gradients(model):
    found = {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def one(model):
    loss_of(model, 0, task_ids=["a", "c", "b", "c"]).backward()


def by_token(model):
    loss_of(model, 0, task_ids=torch.arange(36).view(4, 9) % 4 - 1).backward()


def other_batch_between(model):
    first = loss_of(model, 0, task_ids=["a", "a", "b", "c"])
    second = loss_of(model, 1, task_ids=["c", "b", "a", "a"])
    first.backward()
    second.backward()


def reversed_order(model):
    losses = [loss_of(model, seed, task_ids=[seed % 3, 0, 1, 2]) for seed in range(4)]
    for loss in reversed(losses):
        loss.backward()


def evaluation_between(model):
    loss = loss_of(model, 0, task_ids=["a", "c", "b", "c"])
    model.eval()
    with torch.no_grad():
        loss_of(model, 1, task_ids=["b"] * 4)
    model.train()
    loss.backward()


def chosen_task_changes(model):
    model.set_task("a")
    first = loss_of(model, 0)
    model.set_task("b")
    second = loss_of(model, 1)
    model.set_task(None)
    (first + 2 * second).backward()


PASSES = {f.__name__: f for f in (one, by_token, other_batch_between, reversed_order, evaluation_between)}
PASSES["chosen_task_changes"] = chosen_task_changes


@KINDS
@pytest.mark.parametrize("switch", [enable, wrap_layers, call_checkpoint])
@pytest.mark.parametrize("passes", PASSES)
def test_gradients_are_those_without_checkpointing(model_folders, passes, switch, reentrant):
    plain = build(model_folders)
    checkpointed = copy.deepcopy(plain)
    switch(checkpointed, reentrant)
    found = []
    for model in (plain, checkpointed):
        torch.manual_seed(3)  # of dropout masks, which recomputations repeat
        PASSES[passes](model)
        found.append(gradients(model))
        assert all(routing.batch.task_ids is None for routing in find_routings(model))
    expected, got = found
    assert set(got) == set(expected) and len(expected) == 18
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: name + text)


@KINDS
def test_a_plain_trainer(model_folders, tmp_path, reentrant):
    rows = [{"input_ids": random_ids(1, 9, seed)[0].tolist(), "task_ids": seed % 3} for seed in range(8)]
    data = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows])
    weights = []
    for checkpointing in (False, True):
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointing else None,
            seed=5,
        )
        torch.manual_seed(0)
        model = build(model_folders)
        model.enable_input_require_grads()
        Trainer(model, arguments, train_dataset=data).train()
        weights.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=1e-4, atol=1e-6)


def whole_call(model, reentrant):
    """A checkpoint around a whole call, which says the tasks itself."""

    def loss_of_embedded(embedded, ids):
        return model(inputs_embeds=embedded, labels=ids, use_cache=False, task_ids=["a", "c", "b", "c"]).loss

    def loss_of_chosen(embedded, ids):
        model.set_task("b")
        return model(inputs_embeds=embedded, labels=ids, use_cache=False).loss

    for function in (loss_of_embedded, loss_of_chosen):
        ids = random_ids(batch=4).to(model.device)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        if reentrant is None:
            loss = function(embedded, ids)
        else:
            loss = checkpoint(function, embedded, ids, use_reentrant=reentrant)
        model.set_task("c")
        loss.backward()


@pytest.mark.parametrize("inside", [None, False, True], ids=["plain", "non-reentrant inside", "reentrant inside"])
@KINDS
def test_a_checkpoint_around_a_whole_call(model_folders, reentrant, inside):
    plain = build(model_folders)
    checkpointed = copy.deepcopy(plain)
    if inside is not None:
        enable(checkpointed, inside)
    found = []
    for model, kind in ((plain, None), (checkpointed, reentrant)):
        torch.manual_seed(3)
        whole_call(model, kind)
        found.append(gradients(model))
        assert find_routings(model)[0].batch.task == 2  # what a recomputation chooses is its own
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: n + text)


def enable_within(model, reentrant, outside):
    """A checkpoint for each MLP, within one for each layer."""
    for layer in model.base_model.model.model.layers:
        layer.mlp.forward = partial(checkpoint, layer.mlp.forward, use_reentrant=reentrant)
    enable(model, outside)


@pytest.mark.parametrize("outside", [False, True], ids=["non-reentrant outside", "reentrant outside"])
@KINDS
@pytest.mark.parametrize("passes", PASSES)
def test_checkpoints_within_checkpoints(model_folders, passes, reentrant, outside):
    plain = build(model_folders)
    checkpointed = copy.deepcopy(plain)
    enable_within(checkpointed, reentrant, outside)
    found = []
    for model in (plain, checkpointed):
        torch.manual_seed(3)
        PASSES[passes](model)
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: n + text)


def in_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def chosen_elsewhere(model, run):
    """The task is chosen in the main thread, training runs in `run`; twice, in the same thread."""

    def step():
        loss_of(model, 0).backward()

    model.set_task("a")
    run(step)
    model.set_task("b")
    run(step)


def backward_elsewhere(model, run):
    """As a GPU has it, whose nodes are evaluated in a thread of their own."""
    first = loss_of(model, 0, task_ids=["a", "a", "b", "c"])
    second = loss_of(model, 1, task_ids=["c", "b", "a", "a"])
    run(first.backward)
    run(second.backward)


def evaluation_elsewhere(model, run):
    def evaluate():
        model.eval()
        with torch.no_grad():
            loss_of(model, 1, task_ids=["b"] * 4)
        model.train()

    loss = loss_of(model, 0, task_ids=["a", "c", "b", "c"])
    run(evaluate)
    loss.backward()


@KINDS
@pytest.mark.parametrize("passes", [chosen_elsewhere, backward_elsewhere, evaluation_elsewhere])
def test_threads(model_folders, passes, reentrant):
    plain = build(model_folders)
    checkpointed = copy.deepcopy(plain)
    enable(checkpointed, reentrant)
    found = []
    for model in (plain, checkpointed):
        torch.manual_seed(3)
        with ThreadPoolExecutor(1) as pool:
            passes(model, lambda function, pool=pool: pool.submit(function).result())
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: n + text)


def test_passes_of_several_threads_are_refused(model_folders):
    model = build(model_folders)
    enable(model, True)
    loss_of(model, 0, task_ids=["a", "c", "b", "c"]).backward()
    loss = in_thread(lambda: loss_of(model, 0, task_ids=["b", "c", "b", "c"]))
    with pytest.raises(RuntimeError, match="several threads have run passes.*run those of one model in one thread"):
        loss.backward()


def test_a_backward_pass_that_failed_leaves_nothing(model_folders):
    model = build(model_folders)
    enable(model, False)
    expected = []
    for seed in (0, 0):
        torch.manual_seed(3)
        one(model)
        expected.append(gradients(model))
        if seed == 0:  # a batch between, whose backward pass stops in a recomputation
            loss = loss_of(model, 1, task_ids=["b"] * 4)
            layer = model.base_model.model.model.layers[0].mlp.down_proj
            handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
            with pytest.raises(MemoryError):
                loss.backward()
            handle.remove()
            model.zero_grad()
    for name, gradient in expected[0].items():
        assert torch.equal(expected[1][name], gradient), name


def test_a_pass_that_is_not_remembered_is_refused(model_folders):
    model = build(model_folders)
    enable(model, False)
    loss = loss_of(model, 0, task_ids=["a", "c", "b", "c"])
    (routing,) = find_routings(model)
    for _ in range(_REMEMBERED):
        with routing.using(task=0):
            routing.note_forward()
    with pytest.raises(
        RuntimeError, match="are not known, because 256 later ones have run. Call `backward` after fewer"
    ):
        loss.backward()


def test_passes_for_inference_are_not_remembered(model_folders):
    model = build(model_folders)
    (routing,) = find_routings(model)
    loss_of(model, 0, task_ids=["a", "c", "b", "c"])
    remembered = len(routing._history)
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            loss_of(model, 1, task_ids=["b"] * 4)
    assert len(routing._history) == remembered and routing.batch.task_ids is None
