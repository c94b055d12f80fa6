"""Routers in whole models: tasks told in every way, mixed batches, and rows that don't depend on their batch-mates."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from testing_utils import TINY_MODELS, perturb, random_ids
from transformers import AutoModelForCausalLM, LEDConfig, LEDForConditionalGeneration

from rlora_trl import MultiHeadAdapter, RLoraConfig, set_task
from rlora_trl.tuner import find_routings
from rlora_trl.tuner.routing import Routing


TASKS = ["first", "colour", "same"]
ROUTERS = {
    "softmax": {},
    "top_k": {"router": "top_k", "router_top_k": 2, "router_init": "kaiming_uniform"},
    "task": {"router": "task", "tasks": TASKS},
    "uniform": {"router": "uniform"},
    "own_a": {"share_a": False},
}


def base_model(model_folders):
    return AutoModelForCausalLM.from_pretrained(model_folders["llama"]).eval()


def adapted(model_folders, seed=0, **kwargs):
    model = get_peft_model(base_model(model_folders), RLoraConfig(task_type="CAUSAL_LM", **kwargs)).eval()
    perturb(model, scale=2.0, seed=seed)
    return model


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


@pytest.mark.parametrize("router", ROUTERS)
def test_a_row_does_not_depend_on_its_batch(model_folders, router):
    model = adapted(model_folders, **ROUTERS[router])
    ids = random_ids(batch=4)
    kwargs = {"task_ids": torch.tensor([0, 1, 2, 0])} if router == "task" else {}
    together = logits(model, ids, **kwargs)
    for row in range(4):
        own = {name: value[row : row + 1] for name, value in kwargs.items()}
        alone = logits(model, ids[row : row + 1], **own)[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


@pytest.fixture
def task_model(model_folders):
    return adapted(model_folders, **ROUTERS["task"])


def test_tasks_differ_and_can_be_told_in_every_way(task_model):
    ids = random_ids(batch=3)
    by_task = []
    for task in TASKS:
        task_model.set_task(task)
        by_task.append(logits(task_model, ids))
    task_model.set_task(None)
    assert not torch.allclose(by_task[0], by_task[1], atol=1e-3)
    mixed = torch.stack([by_task[2][0], by_task[0][1], by_task[1][2]])
    for given in (torch.tensor([2, 0, 1]), [2, 0, 1], ["same", "first", "colour"]):
        torch.testing.assert_close(logits(task_model, ids, task_ids=given), mixed)
    by_token = torch.tensor([2, 0, 1]).unsqueeze(1).expand(3, ids.shape[1])
    torch.testing.assert_close(logits(task_model, ids, task_ids=by_token), mixed)
    set_task(task_model, 1)
    torch.testing.assert_close(logits(task_model, ids), by_task[1])
    # What a batch says goes before what `set_task` said.
    torch.testing.assert_close(logits(task_model, ids, task_ids=[2, 0, 1]), mixed)


def test_without_a_task_the_mean_mixture_is_used_and_said_once(task_model, caplog):
    caplog.set_level("WARNING")
    mean = logits(task_model, random_ids())
    logits(task_model, random_ids())
    said = [record for record in caplog.records if "mean of the head weights" in record.getMessage()]
    assert len(said) == 1 and "set_task" in said[0].getMessage()
    torch.testing.assert_close(logits(task_model, random_ids(), task_ids=torch.full((3,), -1)), mean)
    adapter = next(m for m in task_model.modules() if isinstance(m, MultiHeadAdapter))
    mixtures = adapter.task_logits().softmax(-1)
    torch.testing.assert_close(mixtures[-1], mixtures[:-1].mean(0))


def test_generation(task_model):
    ids = random_ids(batch=2, length=5)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = []
    for row, task in enumerate(("colour", "first")):
        task_model.set_task(task)
        expected.append(task_model.generate(input_ids=ids[row : row + 1], **options)[0])
    task_model.set_task(None)
    mixed = task_model.generate(input_ids=ids, task_ids=["colour", "first"], **options)
    assert [row.tolist() for row in mixed] == [row.tolist() for row in expected]
    beams = task_model.generate(input_ids=ids, task_ids=["colour", "first"], num_beams=3, **options)
    assert beams.shape == mixed.shape
    assert all(routing.batch.task_ids is None for routing in find_routings(task_model))


def test_save_and_load_with_and_without_peft(task_model, model_folders, tmp_path):
    ids = random_ids()
    expected = logits(task_model, ids, task_ids=[0, 1, 2])
    task_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(model_folders), tmp_path).eval()
    assert torch.equal(logits(loaded, ids, task_ids=[0, 1, 2]), expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    set_task(plain, "colour")
    task_model.set_task("colour")
    assert torch.equal(logits(plain, ids), logits(task_model, ids))


def test_copies_keep_the_task_and_share_one_state(task_model):
    task_model.set_task("same")
    expected = logits(task_model, random_ids())
    for other in (copy.deepcopy(task_model), pickle.loads(pickle.dumps(task_model))):
        assert torch.equal(logits(other, random_ids()), expected)
        assert len(find_routings(other)) == 1
        other.set_task("first")
        assert torch.equal(logits(task_model, random_ids()), expected)


def test_other_methods_are_left_alone(model_folders):
    """What watches for the `PeftModel` of an adapter is gone once it has come."""
    from peft import LoraConfig
    from torch.nn.modules import module

    before = len(module._global_module_registration_hooks)
    adapted(model_folders)
    AutoModelForCausalLM.from_pretrained(model_folders["llama"]).add_adapter(RLoraConfig(task_type="CAUSAL_LM"))
    lora = get_peft_model(base_model(model_folders), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert len(module._global_module_registration_hooks) == before
    assert not lora._forward_pre_hooks


def test_gradients_reach_the_mixtures_of_the_tasks_in_the_batch_only(task_model):
    task_model.train()
    ids = random_ids(batch=2)
    task_model(input_ids=ids, labels=ids, task_ids=[0, 2]).loss.backward()
    for module in task_model.modules():
        if isinstance(module, MultiHeadAdapter):
            assert (module.router.grad.abs().sum(1) > 0).tolist() == [True, False, True]


def test_two_adapters_each_know_their_own_tasks(task_model):
    task_model.add_adapter("other", RLoraConfig(router="task", tasks=["x", "y"], task_type="CAUSAL_LM"))
    task_model.set_adapter("other")
    assert len(find_routings(task_model)) == 2
    # Both have to know the task, or to be switched one by one.
    with pytest.raises(ValueError, match="The adapter has no task 'x'; it has 0: first"):
        task_model.set_task("x")


def test_errors(task_model, model_folders):
    with pytest.raises(ValueError, match="The adapter has no task 'sst2'; it has 0: first, 1: colour"):
        task_model.set_task("sst2")
    with pytest.raises(ValueError, match="The adapter has no task 3"):
        logits(task_model, random_ids(), task_ids=torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="The adapter has no task -2"):
        logits(task_model, random_ids(), task_ids=torch.tensor([0, 1, -2]))
    with pytest.raises(ValueError, match="the batch has 3 rows. Pass one for each row"):
        logits(task_model, random_ids(), task_ids=[0, 1])
    with pytest.raises(ValueError, match="can't be passed together"):
        logits(task_model, random_ids(), task_ids=[0, 1, 2], adapter_names=["default"] * 3)
    softmax = adapted(model_folders)
    with pytest.raises(ValueError, match='`set_task` needs an adapter with `router="task"`'):
        softmax.set_task("first")
    with pytest.raises(ValueError, match="`task_ids` needs an adapter with"):
        logits(softmax, random_ids(), task_ids=[0, 1, 2])
    with pytest.raises(ValueError, match="needs a model with R-LoRA adapters"):
        set_task(base_model(model_folders), "first")
    with pytest.raises(ValueError, match="needs the names of the tasks"):
        get_peft_model(base_model(model_folders), RLoraConfig(router="task", task_type="CAUSAL_LM"))


def test_a_batch_has_no_other_values():
    routing = Routing(("a", "b"), "softmax")
    with pytest.raises(TypeError, match="A batch has no sead; it has task_ids"):
        routing.update(sead=3)


def test_tasks_of_rows_in_generate_without_a_task_type():
    """PEFT passes arguments on in another way; rows are repeated for beams."""
    torch.manual_seed(0)
    model = get_peft_model(TINY_MODELS["llama"](), RLoraConfig(router="task", tasks=["one", "two"])).eval()
    perturb(model, scale=1.0)
    settings = {"input_ids": random_ids(2), "max_new_tokens": 4, "do_sample": False, "num_beams": 3}
    alone = []
    for task in ("one", "two"):
        model.set_task(task)
        alone.append(model.generate(**settings))
    model.set_task(None)
    mixed = model.generate(**settings, task_ids=["one", "two"])
    assert torch.equal(mixed[0], alone[0][0]) and torch.equal(mixed[1], alone[1][1])


def test_layers_that_see_positions_before_rows_are_refused_in_generate():
    """The attention of LED's encoder has the positions first: 8 of them are no 4 copies of 2 rows."""
    config = LEDConfig(
        vocab_size=80,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
    )
    torch.manual_seed(0)
    targets = r".*encoder.*self_attn.*query"
    settings = {"task_type": "SEQ_2_SEQ_LM", "router": "task", "tasks": ["one", "two"]}
    model = get_peft_model(LEDForConditionalGeneration(config), RLoraConfig(target_modules=targets, **settings)).eval()
    with pytest.raises(ValueError, match=r"do not fit an input of shape \[8, 2, 'd_in'\]"):
        model.generate(input_ids=random_ids(2, 8), task_ids=["one", "two"], max_new_tokens=2, num_beams=2)
