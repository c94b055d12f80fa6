"""`trainable_token_indices` in the trainer: rows of the input train; rows of the head are refused."""

import pytest
import torch
from peft import get_peft_model
from testing_utils import _DECODER, TINY_MODELS, WORDS, build_tokenizer, task_datasets
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer


NEW = 80  # the first row that resizing adds
ANSWER = WORDS.index("Answer:")
EMBEDDINGS = {"gpt2": "wte", "llama": "embed_tokens"}


def resized(name, tied=True):
    torch.manual_seed(0)
    tied_llama = LlamaConfig(**_DECODER, tie_word_embeddings=True)
    model = TINY_MODELS["gpt2"]() if name == "gpt2" else LlamaForCausalLM(tied_llama)
    model.resize_token_embeddings(NEW + 1, mean_resizing=False)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def trainer_of(model, folder, peft_config=None):
    args = RLoraSFTConfig(
        str(folder), max_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no", learning_rate=0.1
    )
    return RLoraSFTTrainer(
        model=model,
        args=args,
        train_dataset=task_datasets(4)["first"],
        processing_class=build_tokenizer(),
        peft_config=peft_config,
    )


def config_of(**kwargs):
    return RLoraConfig(task_type="CAUSAL_LM", **kwargs)


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("given", [False, True])
def test_rows_of_a_tied_head_are_refused_with_what_to_do(tmp_path, name, given):
    names = rf"modules_to_save=\['{EMBEDDINGS[name]}', 'lm_head'\]"
    config = config_of(trainable_token_indices=[NEW])
    with pytest.raises(ValueError, match=rf"rows of the output head 'lm_head'.*{names}.*tie_word_embeddings = False"):
        if given:
            trainer_of(get_peft_model(resized(name), config), tmp_path)
        else:
            trainer_of(resized(name), tmp_path, config)


def test_rows_of_an_untied_head_are_refused_too(tmp_path):
    rows = {"embed_tokens": [NEW], "lm_head": [NEW]}
    with pytest.raises(ValueError, match="rows of the output head 'lm_head'"):
        trainer_of(resized("llama", tied=False), tmp_path, config_of(trainable_token_indices=rows))


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_rows_of_the_input_train_below_an_untied_head(tmp_path, name):
    trainer = trainer_of(resized(name, tied=False), tmp_path, config_of(trainable_token_indices=[ANSWER, NEW]))
    (rows,) = [p for n, p in trainer.model.named_parameters() if "trainable_tokens_delta" in n]
    head = trainer.model.get_output_embeddings().weight
    before = rows.detach().clone(), head.detach().clone()
    trainer.train()
    assert not torch.equal(rows, before[0]) and torch.equal(head, before[1])


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_whole_embeddings_and_heads_train(tmp_path, name):
    trainer = trainer_of(resized(name), tmp_path, config_of(modules_to_save=[EMBEDDINGS[name], "lm_head"]))
    copies = {n: p for n, p in trainer.model.named_parameters() if "modules_to_save" in n}
    before = {n: p.detach().clone() for n, p in copies.items()}
    trainer.train()
    assert len(copies) == 2 and all(not torch.equal(p, before[n]) for n, p in copies.items())
