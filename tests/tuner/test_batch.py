"""Task ids as users pass them: what is accepted, what is refused, and what a layer makes of them."""

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from testing_utils import perturb, random_ids
from transformers import AutoModelForCausalLM, BertConfig, BertForMultipleChoice

from rlora_trl import RLoraConfig
from rlora_trl.tuner import find_routings
from rlora_trl.tuner.batch import describe_batch


TASKS = ["a", "b", "c"]


def build(model_folders):
    base = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    model = get_peft_model(base, RLoraConfig(task_type="CAUSAL_LM", router="task", tasks=TASKS)).train()
    perturb(model, scale=2.0)
    return model


ROWS = [0, 1, 2, 0]


FITTING = {
    "names": ["a", "b", "c", "a"],
    "tuple": ("a", "b", "c", "a"),
    "numbers": ROWS,
    "numpy numbers": [np.int64(0), np.int32(1), 2, 0],
    "numpy": np.array(ROWS),
    "numpy names": np.array(["a", "b", "c", "a"]),
    "tensor": torch.tensor(ROWS),
    "column": Dataset.from_dict({"task": ["a", "b", "c", "a"]})["task"],
    "series": pd.Series(["a", "b", "c", "a"]),
    "small integers": torch.tensor(ROWS, dtype=torch.uint8),
    "tokens": torch.tensor(ROWS)[:, None].expand(4, 9),
}


def eval_logits(model, **kwargs):
    with torch.no_grad():
        return model.eval()(input_ids=random_ids(batch=4), **kwargs).logits


@pytest.mark.parametrize("given", FITTING)
def test_task_ids_that_fit(model_folders, given):
    model = build(model_folders)
    expected = eval_logits(model, task_ids=torch.tensor(ROWS))
    assert not torch.allclose(expected, eval_logits(model, task_ids=torch.tensor([2, 1, 0, 0])), atol=1e-3)
    assert torch.equal(eval_logits(model, task_ids=FITTING[given]), expected)


REFUSED = {
    "two for four rows": (["a", "b"], ValueError, "has shape .2., but the batch has 4 rows"),
    "two in a tensor": (torch.tensor([0, 1]), ValueError, "has shape .2., but the batch has 4 rows"),
    "one for four rows": (["a"], ValueError, "Pass one for each row, or a tensor .4, 9. with one for each token"),
    "eight": (["a", "b"] * 4, ValueError, "the batch has 4 rows"),
    "as many as tokens": (["a"] * 36, ValueError, "the batch has 4 rows"),
    "none": ([], ValueError, "the batch has 4 rows"),
    "one name": ("a", TypeError, "must be a list with the task of each row.*got 'a'"),
    "one number": (1, TypeError, "got 1"),
    "a scalar": (torch.tensor(1), TypeError, r"got a tensor \[\] of torch.int64"),
    "other tokens": (torch.zeros(4, 8, dtype=torch.int64), ValueError, r"has shape \[4, 8\]"),
    "other rows": (torch.zeros(2, 9, dtype=torch.int64), ValueError, r"has shape \[2, 9\]"),
    "turned": (torch.zeros(9, 4, dtype=torch.int64), ValueError, r"has shape \[9, 4\]"),
    "three axes": (torch.zeros(4, 9, 1, dtype=torch.int64), TypeError, "for each row or for each token"),
    "floats": (torch.zeros(4), TypeError, "of torch.float32"),
    "booleans": (torch.zeros(4, dtype=torch.bool), TypeError, "of torch.bool"),
    "a boolean": ([True, 0, 1, 2], ValueError, "The adapter has no task True"),
    "a list of lists": ([["a"] * 9] * 4, TypeError, "or a tensor of integers .* got a list of lists"),
    "an unknown task": (["a", "b", "c", "d"], ValueError, "The adapter has no task 'd'"),
    "a number too large": (torch.tensor([0, 1, 2, 3]), ValueError, "The adapter has no task 3"),
}


@pytest.mark.parametrize("where", ["PeftModel", "tuner", "embeddings", "positional"])
@pytest.mark.parametrize("given", REFUSED)
def test_task_ids_that_do_not_fit(model_folders, given, where):
    model = build(model_folders).eval()
    task_ids, kind, text = REFUSED[given]
    ids = random_ids(batch=4)
    with pytest.raises(kind, match=text):
        if where == "embeddings":
            model(inputs_embeds=model.get_input_embeddings()(ids), task_ids=task_ids)
        elif where == "positional":
            model(ids, task_ids=task_ids)
        else:
            (model if where == "PeftModel" else model.base_model)(input_ids=ids, task_ids=task_ids)
    # Nothing of it is left for the next batch.
    assert torch.equal(eval_logits(model, task_ids=ROWS), eval_logits(model, task_ids=torch.tensor(ROWS)))


def test_generation_takes_one_task_for_each_row(model_folders):
    model = build(model_folders).eval()
    options = {"input_ids": random_ids(batch=4), "max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**options, task_ids=ROWS)
    for beams in ({"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}):
        assert model.generate(**options, **beams, task_ids=ROWS).shape[1] == expected.shape[1]
    for task_ids in (["a", "b"], torch.zeros(4, 9, dtype=torch.int64)):
        with pytest.raises(ValueError, match="the batch has 4 rows. Pass one for each row.$"):
            model.generate(**options, task_ids=task_ids)


def test_task_ids_given_to_the_tuner_itself(model_folders):
    model = build(model_folders)
    expected = eval_logits(model, task_ids=ROWS)
    assert torch.equal(eval_logits(model.base_model, task_ids=ROWS), expected)


def test_task_ids_of_a_call_without_adapters_are_not_kept(model_folders):
    model = build(model_folders).eval()
    ids = random_ids(batch=4)
    with model.disable_adapter():
        model(input_ids=ids, task_ids=ROWS)
    without = model.generate(input_ids=ids[:2], max_new_tokens=2, do_sample=False)
    assert without.shape[0] == 2


def test_a_layer_that_sees_another_batch_is_refused(model_folders):
    model = build(model_folders).eval()
    (routing,) = find_routings(model)
    ids = torch.tensor([0, 1, 2, 0])
    with routing.using(task_ids=ids):
        assert routing.token_task_ids(torch.Size([4, 3]), ids.device).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0]
        assert routing.token_task_ids(torch.Size([8]), ids.device).tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
        for shape in ([8, 3], [2, 3], [3, 4], [7]):
            with pytest.raises(ValueError, match="do not fit an input of shape"):
                routing.token_task_ids(torch.Size(shape), ids.device)
    with routing.using(task_ids=ids[:, None].expand(4, 3)):
        for shape in ([4, 6], [3, 4], [24]):
            with pytest.raises(ValueError, match="do not fit an input of shape"):
                routing.token_task_ids(torch.Size(shape), ids.device)


def test_multiple_choice_repeats_rows(model_folders):
    config = BertConfig(
        vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    base = BertForMultipleChoice(config)
    model = get_peft_model(base, RLoraConfig(router="task", tasks=TASKS, init_weights=False, task_type=None)).eval()
    ids = random_ids(batch=6).view(2, 3, 9)
    with torch.no_grad():
        together = model(input_ids=ids, task_ids=["a", "c"]).logits
        for row, task in enumerate(("a", "c")):
            alone = model(input_ids=ids[row : row + 1], task_ids=[task]).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_experts_that_see_some_of_the_tokens_are_refused(model_folders):
    """Also where their number happens to be a multiple of the rows."""
    model = build(model_folders).eval()
    (routing,) = find_routings(model)
    ids = torch.tensor([0, 1])
    with routing.using(task_ids=ids, lengths=(9, 4)):
        for tokens in (18, 8):  # of the encoder, of the decoder
            assert len(routing.token_task_ids(torch.Size([tokens]), ids.device)) == tokens
        for tokens in (12, 6, 2):
            with pytest.raises(ValueError, match="Leave out layers that get only part of the batch"):
                routing.token_task_ids(torch.Size([tokens]), ids.device)


def test_lengths_are_those_of_all_sequences_of_a_row():
    ids, decoded = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)
    batch = describe_batch((), {"input_ids": ids, "labels": decoded, "attention_mask": ids})
    assert (batch.rows, batch.shape, batch.rows_repeat, set(batch.lengths)) == (2, ids.shape, False, {9, 4})
    assert batch.input_ids is ids and describe_batch((), {"inputs_embeds": torch.zeros(3, 5, 8)}).input_ids is None
    assert describe_batch((ids,), {}, True)[:4] == (2, ids.shape, True, ())
    assert describe_batch((), {"inputs_embeds": torch.zeros(3, 5, 8)})[:2] == (3, torch.Size([3, 5]))
    assert describe_batch((), {"pixel_values": torch.zeros(3, 3, 8, 8)}) == (3, None, False, (), None)
    assert describe_batch((), {"use_cache": False}) is None
