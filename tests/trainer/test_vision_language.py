"""Language models with pictures, through `RLoraSFTTrainer`: default targets, tasks, mixing and evaluation by task."""

import picture_models
import pytest
import torch
from datasets import Dataset
from testing_utils import build_tokenizer
from trainer_utils import arguments
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from rlora_trl import MultiHeadAdapter, RLoraConfig, RLoraSFTTrainer


PIL = pytest.importorskip("PIL.Image")
SIZE, PATCH = picture_models.SIZE, picture_models.PATCH
COLORS, TASKS = ["red", "blue"], ["this", "other"]
TOKENS = {
    "llava": ["<image>"],
    "smolvlm": ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"],
    "qwen2_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
}
OTHERS = ("llava", "smolvlm")
CHAT = (
    "{{% for message in messages %}}<{{{{ message['role'] }}}}> {{% if message['content'] is string %}}"
    "{{{{ message['content'] }}}} {{% else %}}{{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{image} {{% else %}}{{{{ part['text'] }}}} {{% endif %}}{{% endfor %}}"
    "{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}<assistant> {{% endif %}}"
)
IMAGE = {"llava": "<image>", "smolvlm": "<image>", "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>"}


def qwen_processor():
    """Qwen2-VL's without its videos, which need torchvision."""
    from transformers import ProcessorMixin, Qwen2VLProcessor

    class Pictures(Qwen2VLProcessor):
        image_token, video_token, video_processor = *TOKENS["qwen2_vl"][:2], None

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(TOKENS["qwen2_vl"][:2])
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return Pictures


def build_processor(name):
    # Those that need no torchvision.
    from transformers import (
        CLIPImageProcessorPil,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
        LlavaProcessor,
        Qwen2VLImageProcessorPil,
    )

    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS[name]})
    chat = tokenizer.chat_template = CHAT.format(image=IMAGE[name])
    if name == "llava":
        size = {"height": SIZE, "width": SIZE}
        images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=size)
        return LlavaProcessor(images, tokenizer, PATCH, "default", chat, num_additional_image_tokens=1)
    if name == "smolvlm":
        # Its own processor is this one and videos.
        edge = {"longest_edge": SIZE}
        try:
            images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
        except ImportError as error:  # in transformers 5.17
            pytest.skip(str(error))
        return Idefics3Processor(images, tokenizer, picture_models.PATCHES // 4, chat)
    pixels = {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE}
    images = Qwen2VLImageProcessorPil(size=pixels, patch_size=PATCH, merge_size=2, temporal_patch_size=2)
    return qwen_processor()(images, tokenizer, chat)


def build_model(name, processor):
    torch.manual_seed(0)
    ids = processor.tokenizer.convert_tokens_to_ids
    if name == "qwen2_vl":
        kinds = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        special = dict(zip(kinds, map(ids, TOKENS[name]), strict=True))
    else:
        special = {"image_token_id" if name == "smolvlm" else "image_token_index": ids("<image>")}
    config = CONFIG_MAPPING[name](**{**picture_models.SETTINGS[name], **special})
    return AutoModelForImageTextToText.from_config(config)


def rows(task, count):
    """The answer to the same question depends on the picture and on the task."""
    listed = []
    for index in range(count):
        shown = index % 2
        answer = COLORS[shown if task == "this" else 1 - shown]
        listed.append(
            {
                "image": PIL.new("RGB", (SIZE, SIZE), COLORS[shown]),
                "prompt": [{"role": "user", "content": "w1"}],
                "completion": [{"role": "assistant", "content": answer}],
            }
        )
    return Dataset.from_list(listed)


def make_trainer(name, folder, targets=None, **settings):
    processor = build_processor(name)
    config = RLoraConfig(router="task", router_init="kaiming_uniform", target_modules=targets, r=8)
    defaults = {"max_steps": 30, "learning_rate": 5e-3, "mixing": "equal", "max_length": None}
    return RLoraSFTTrainer(
        build_model(name, processor),
        arguments(folder, **{"per_device_train_batch_size": 8, **defaults, **settings}),
        train_dataset={"this": rows("this", 24), "other": rows("other", 8)},
        eval_dataset={task: rows(task, 4) for task in TASKS},
        processing_class=processor,
        peft_config=config,
    )


@pytest.mark.parametrize("name", ["qwen2_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_tasks_on_pictures(tmp_path, name):
    trainer = make_trainer(name, tmp_path)
    targeted = trainer.model.base_model.targeted_module_names
    assert targeted and all(".language_model." in path or ".text_model." in path for path in targeted)
    assert trainer.mixture.draws == {"this": 16, "other": 16}
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for task in TASKS:
        # Without the picture and the task, ln 2 is the best for two equally frequent answers.
        assert after[f"eval_{task}_loss"] < 0.3 < 0.69 < before[f"eval_{task}_loss"], (before, after)


@pytest.mark.parametrize("name", ["qwen2_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_vision_towers_by_choice(tmp_path, name):
    """Their layers see patches, so a router for tasks must know the rows: one picture for each row here."""
    tower = r".*\.(vision_tower|vision_model|visual)\..*\.mlp\.fc[12]"
    if name == "qwen2_vl":
        # All patches of a batch in one sequence: no row is known.
        with pytest.raises(ValueError, match=r"do not fit an input.*vision encoders.*exclude_modules"):
            make_trainer(name, tmp_path, targets=tower, max_steps=1).train()
        # All patches of a batch of one row are of that row.
        trainer = make_trainer(name, tmp_path, targets=tower, max_steps=2, per_device_train_batch_size=1)
        trainer.train()
        assert trainer.state.global_step == 2
        return
    language = r".*\.(language_model|text_model)\..*\.(gate|up|down)_proj"
    for targets, count in {tower: 4, f"({language}|{tower})": 10}.items():
        trainer = make_trainer(name, tmp_path, targets=targets, max_steps=2)
        trainer.train()
        adapters = [module for module in trainer.model.modules() if isinstance(module, MultiHeadAdapter)]
        assert len(adapters) == count and trainer.state.global_step == 2
