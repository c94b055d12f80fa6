"""What the trainer's records of routing cost: step times with and without logs, and with a balance loss.

    python benchmarks/trainer_overhead.py --out benchmarks/results/trainer_overhead.jsonl

Steps of `RLoraSFTTrainer` on random tokens and a model of random weights, timed on the host from one step's end to the
next one's, the device being waited for.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import TARGETS, environment, median, write_row
from datasets import Dataset
from shapes import SHAPES, model_config
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer


class StepTimes(TrainerCallback):
    """Milliseconds of each step but the first few."""

    def __init__(self, warmup):
        self.warmup, self.times, self.last = warmup, [], None

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.last is not None and state.global_step > self.warmup:
            self.times.append(1e3 * (now - self.last))
        self.last = now


class Silent(RLoraSFTTrainer):
    """Without statistics of routing, norms, similarity and losses by task."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._observer.monitor = self._observer.ledger = None
        self._observer.adapters = {}

    def _will_log(self):
        return False


VARIANTS = {
    "no records": (Silent, {"logging_steps": 10}),
    "logs every 10 steps": (RLoraSFTTrainer, {"logging_steps": 10}),
    "logs every step": (RLoraSFTTrainer, {"logging_steps": 1}),
    "switch, logs every 10 steps": (RLoraSFTTrainer, {"logging_steps": 10, "balance_loss": "switch"}),
}


def tokenizer():
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>")


def step_times(name, model_factory, batch, length, checkpointing, steps, warmup):
    kind, settings = VARIANTS[name]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 1000, (batch * 4, length), generator=generator).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids, "task": [f"task{i % 4}" for i in range(len(ids))]})
    times = StepTimes(warmup)
    cuda = torch.cuda.is_available()
    trainer = kind(
        model_factory(),
        RLoraSFTConfig(
            tempfile.mkdtemp(),
            per_device_train_batch_size=batch,
            max_steps=steps,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=cuda,
            max_length=length,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=RLoraConfig(head_dropout=0.2, target_modules=list(TARGETS)),
        callbacks=[times],
    )
    trainer.train()
    return times.times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-3b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="cut the model short, for a quick look")
    parser.add_argument(
        "--settings", nargs="+", default=["8x2048", "6x512"], help="8x2048 checkpoints, 6x512 does not"
    )
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def model_factory():
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(model_config(args.shape, args.layers), dtype=dtype)

    for setting in args.settings:
        batch, length = map(int, setting.split("x"))
        base = None
        for name in VARIANTS:
            values = step_times(name, model_factory, batch, length, length > 1000, args.steps, args.warmup)
            # The mean, as logs come every so often.
            mean = sum(values) / len(values)
            base = base or mean
            row = {
                "shape": args.shape,
                "setting": setting,
                "variant": name,
                "mean_ms": mean,
                "median_ms": median(values),
                "ratio": mean / base,
                "steps": len(values),
                "times_ms": [round(value, 3) for value in values],
                **environment(),
            }
            write_row(args.out, row)
            shown = f"mean {mean:8.1f} ms  median {median(values):8.1f}  ratio {mean / base:.3f}"
            print(f"{args.shape} {setting} {name:28} {shown}", flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
