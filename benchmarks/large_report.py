"""Tables of docs/large-models.md from the rows of `large.py`.

python benchmarks/large_report.py               # prints them
python benchmarks/large_report.py --update      # writes them between their marks, as does `large.py --report`
"""

import argparse
import json
import re
import statistics
from pathlib import Path


HERE = Path(__file__).parent
ROWS = HERE / "results" / "large.jsonl"
DOCUMENT = HERE.parent / "docs" / "large-models.md"
BEGIN, END = "<!-- large: written by benchmarks/large.py -->", "<!-- end of large -->"
NAMES = {
    "bf16": "bf16",
    "bf16-zero2": "bf16, ZeRO-2",
    "bf16-zero3": "bf16, ZeRO-3",
    "bf16-fsdp2": "bf16, FSDP2",
    "nf4": "4-bit",
    "nf4-zero3": "4-bit, ZeRO-3",
    "nf4-fsdp2": "4-bit, FSDP2",
}
# What a strategy on several GPUs is compared with where it does nothing, or was not run, on one.
ALONE = {"nf4-zero3": "nf4", "nf4-fsdp2": "nf4", "bf16-fsdp2": "bf16", "bf16-zero3": "bf16", "bf16-zero2": "bf16"}


def read(path: Path = ROWS) -> list[dict]:
    """The rows of a file, none where there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def latest(rows: list[dict]) -> list[dict]:
    """One row for what was measured several times: the median of the last run's times, or that run's error."""
    kinds: dict[tuple, list[dict]] = {}
    for row in rows:
        what = ("device", "kind", "shape", "layers", "processes", "case", "method", "batch", "length")
        kinds.setdefault(tuple(row.get(name) for name in what), []).append(row)
    chosen = []
    for same in kinds.values():
        run = [
            row
            for row in same
            if (row.get("command"), row.get("date")) == (same[-1].get("command"), same[-1].get("date"))
        ]
        timed = [row for row in run if row["median_ms"] is not None]
        if not timed:
            chosen.append(run[-1])
        else:
            chosen.append({**timed[-1], "median_ms": statistics.median(row["median_ms"] for row in timed)})
    return chosen


def find(rows: list[dict], **wanted: object) -> dict | None:
    """The row with these values."""
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def shown(row: dict | None, key: str, form: str) -> str:
    """A value of a row, or why there is none."""
    if row is None:
        return ""
    if row["median_ms"] is None:
        return "out of memory" if row["error"] == "out of memory" else "failed"
    return format(row[key], form)


def ratio(lora: dict | None, ours: dict | None) -> str:
    if lora is None or ours is None or lora["median_ms"] is None or ours["median_ms"] is None:
        return ""
    return f"{ours['median_ms'] / lora['median_ms']:.2f}"


def step_table(rows: list[dict]) -> str:
    """Step time and memory of a device's cases, LoRA beside ours."""
    lines = [
        "| GPUs | base, strategy | LoRA ms/step | R-LoRA ms/step | ratio | LoRA GiB | R-LoRA GiB | incl. setup GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for processes in sorted({row["processes"] for row in rows}):
        for case in NAMES:
            both = [find(rows, processes=processes, case=case, method=method) for method in ("lora", "ours")]
            if both == [None, None]:
                continue
            name = f"{NAMES[case]}, DDP" if case in ("bf16", "nf4") and processes > 1 else NAMES[case]
            cells = [str(processes), name, *(shown(row, "median_ms", ".0f") for row in both), ratio(*both)]
            cells += [shown(row, "peak_gib", ".1f") for row in both] + [shown(both[1], "peak_with_start_gib", ".1f")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def efficiency(rows: list[dict], case: str, method: str, processes: int) -> str:
    """Time of one GPU over that of several, each with its own batch: 100 % where nothing is lost."""
    several = find(rows, processes=processes, case=case, method=method)
    alone = find(rows, processes=1, case=case, method=method)
    note = ""
    if alone is None or alone["median_ms"] is None:
        alone, note = (
            find(rows, processes=1, case=ALONE.get(case), method=method),
            f" (of {NAMES.get(ALONE.get(case))})",
        )
    if several is None or alone is None or several["median_ms"] is None or alone["median_ms"] is None:
        return ""
    return f"{100 * alone['median_ms'] / several['median_ms']:.0f} %{note}"


def scaling_table(rows: list[dict]) -> str:
    """Scaling efficiency from one GPU to several; empty where only one number of GPUs was measured."""
    lines = []
    for processes in sorted({row["processes"] for row in rows} - {1}):
        for case in NAMES:
            cells = [efficiency(rows, case, method, processes) for method in ("lora", "ours")]
            if any(cells):
                lines.append(f"| 1 to {processes} | {NAMES[case]} | {' | '.join(cells)} |")
    return "\n".join(["| GPUs | base, strategy | LoRA | R-LoRA |", "|---|---|---|---|", *lines]) if lines else ""


def largest_table(rows: list[dict]) -> str:
    """What trains in 4 bits on one GPU, by size."""
    lines = [
        "| shape, layers | parameters | LoRA ms/step | R-LoRA ms/step | LoRA GiB | R-LoRA GiB |",
        "|---|---|---|---|---|---|",
    ]
    sizes = sorted({(row["parameters"], row["shape"], row["layers"]) for row in rows})
    for parameters, shape, layers in sizes:
        both = [find(rows, shape=shape, layers=layers, method=method) for method in ("lora", "ours")]
        cells = [f"{shape}, {layers}", f"{parameters / 1e9:.1f} B"]
        cells += [shown(row, "median_ms", ".0f") for row in both]
        cells += [shown(row, "peak_gib", ".1f") for row in both]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(rows: list[dict]) -> str:
    """Versions of the last row that tells them, and the days of all rows, in one line."""
    row = next((row for row in reversed(rows) if "torch" in row), None)
    if row is None:
        return ""
    names = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes")
    days = sorted({row["date"] for row in rows if "date" in row})
    date = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return ", ".join(f"{name} {row[name]}" for name in names if name in row) + f", {date}."


def tables(rows: list[dict]) -> str:
    """All tables, by device."""
    rows = latest(rows)
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows if "device" in row):
        own = [row for row in rows if row.get("device", device) == device]
        steps = [row for row in own if row["kind"] == "step"]
        for shape, layers, batch, length in dict.fromkeys(
            (row["shape"], row["layers"], row["batch"], row["length"]) for row in steps
        ):
            same = [
                r
                for r in steps
                if (r["shape"], r["layers"], r["batch"], r["length"]) == (shape, layers, batch, length)
            ]
            title = (
                f"{device}: {shape} shape, {layers} layers, {batch} x {length} tokens per GPU, gradient checkpointing"
            )
            parts += [f"### {title}", step_table(same)]
            scaling = scaling_table(same)
            parts += ["Scaling efficiency with a constant batch per GPU:", scaling] if scaling else []
        largest = [row for row in own if row["kind"] in ("named", "largest")]
        if largest:
            length = largest[-1]["length"]
            parts += [f"### {device}: 4-bit bases on one GPU, 1 x {length} tokens, gradient checkpointing"]
            parts += [largest_table(largest)]
        parts.append(machine(own))
    return "\n\n".join(parts)


def update(document: Path = DOCUMENT, rows: Path = ROWS) -> str:
    """
    Write the tables between their marks.

    Raises:
        ValueError: If the document has no such marks.
    """
    old, text = document.read_text(), tables(read(rows))
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"{document} has no block between {BEGIN!r} and {END!r}. Add both lines where tables belong.")
    document.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", old))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write into docs/large-models.md")
    args = parser.parse_args()
    print(update() if args.update else tables(read()))


if __name__ == "__main__":
    main()
