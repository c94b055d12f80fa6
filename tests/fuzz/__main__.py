"""The command: reads mutated inputs with all readers, prints a table, and exits with 1 if one of them fails."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, help="inputs follow from it (default: random)")
    parser.add_argument("--seconds", type=float, default=600.0, help="when to stop (default: 600)")
    parser.add_argument("--cases", type=int, help="number of inputs after which to stop (default: no limit)")
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to repeat one")
    parser.add_argument("--only", action="append", metavar="READER", help="only this reader; may be repeated")
    parser.add_argument("--workers", type=int, default=2, help="number of processes (default: 2)")
    parser.add_argument("--output", type=Path, help="folder for inputs that fail")
    parser.add_argument(
        "--limit",
        type=float,
        help="seconds of processor time that an input may take (default: 2, or more on a slow machine)",
    )
    parser.add_argument("--report", type=Path, help="file for the counts and failures, as JSON")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--readers", default="fuzz.readers", metavar="MODULE", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> int:
    """Run the command; returns its exit code."""
    args = parse()
    # Before anything of PyTorch or Hugging Face is imported: no network, and one thread for each worker.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    readers = import_module(args.readers).READERS

    known = [reader.name for reader in readers]
    if unknown := set(args.only or ()) - set(known):
        print(f"Unknown readers: {', '.join(sorted(unknown))}. Known are {', '.join(known)}.", file=sys.stderr)
        return 2
    readers = [reader for reader in readers if not args.only or reader.name in args.only]

    from .cases import SECONDS, slowness
    from .runner import Plan, fuzz

    seed = random.randrange(2**31) if args.seed is None else args.seed
    print(f"seed {seed}, {len(readers)} readers, {args.workers} workers", flush=True)
    limit = SECONDS * slowness() if args.limit is None else args.limit
    plan = Plan(readers, seed, args.seconds, args.cases, args.first, args.workers, args.output, limit, args.once)
    report = fuzz(plan)
    if args.report is not None:
        failures = [[*kind, failures[0].outcome.detail] for kind, failures in report.failures.items()]
        args.report.write_text(json.dumps({"rows": report.rows, "failures": failures}), encoding="utf-8")
    return show(report)


def show(report: Any) -> int:
    """Print a report; returns the exit code."""
    columns = ("inputs", "refused", "accepted", "mean", "slowest", "most", "failures")
    head = f"{'reader':16}{''.join(f'{column:>10}' for column in columns)}"
    print(f"\n{head}\n{'-' * len(head)}")
    for name, row in report.rows.items():
        counts = "".join(f"{row[key]:>10}" for key in ("inputs", "refused", "accepted"))
        mean = 1000 * row["total"] / max(row["inputs"], 1)
        print(
            f"{name:16}{counts}{mean:>7.2f} ms{row['seconds']:>8.2f} s{row['megabytes']:>7.0f} MB{row['failures']:>10}"
        )

    for (reader, verdict, place), failures in report.failures.items():
        first = failures[0]
        print(f"\n{reader}: {len(failures)} x {verdict} {place}\n  {first.outcome.detail} (input {first.number})")
        for name, data in first.files.items():
            print(f"  {ascii(name)}: {ascii(data[:300])}{'...' if len(data) > 300 else ''}")
    for name in report.idle:
        print(f"\n{name}: accepted no input. Its samples no longer fit; correct them in samples.py.")

    total = sum(row["inputs"] for row in report.rows.values())
    failed = sum(row["failures"] for row in report.rows.values())
    print(f"\n{total} inputs in {report.seconds:.0f} s ({total / report.seconds:.0f}/s), {failed} failures")
    return 1 if failed or report.idle else 0


if __name__ == "__main__":
    sys.exit(main())
