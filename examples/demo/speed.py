"""Speed of the demo's bundle beside transformers, in one run; `make bench`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edgemoe.disk import human_bytes
from edgemoe.evaluate.subject import load_dense
from edgemoe.models import load_model
from examples.demo.measure import bench, time_eager

DEMO = Path(__file__).resolve().parents[2] / "demo"
PROMPT_TOKENS = (32, 256, 1024)
NEW_TOKENS = 64
REPEAT = 5


def main() -> None:
    """Time all three, and print a table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    table = Table(
        title=f"Medians of {REPEAT} runs, {NEW_TOKENS} new tokens, fp32 in transformers"
    )
    for column in (
        "model",
        "load s",
        "memory",
        "prompt",
        "prefill tokens/s",
        "decode tokens/s",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    models: dict[str, Any] = {
        "dense, transformers": load_dense(DEMO / "dense"),
        "MoE, transformers": load_model(DEMO / "moe").model,
    }
    for prompt_tokens in PROMPT_TOKENS:
        for name, model in models.items():
            speed = time_eager(
                model, prompt_tokens=prompt_tokens, new_tokens=NEW_TOKENS, repeat=REPEAT
            )
            table.add_row(name, "", "", str(prompt_tokens), *_speeds(speed))
        speed = bench(
            DEMO / "bundle",
            "code",
            prompt_tokens=prompt_tokens,
            new_tokens=NEW_TOKENS,
            repeat=REPEAT,
        )
        memory = human_bytes(speed["peak_rss_bytes"])
        table.add_row(
            f"bundle, {speed['precision']}",
            f"{speed['load_s']:.2f}",
            memory,
            str(speed["prompt_tokens"]),
            *_speeds(speed),
        )
        table.add_section()
    Console(width=None).print(table)


def _speeds(speed: dict[str, Any]) -> list[str]:
    return [f"{speed[f'{name}_tokens_per_s']:.1f}" for name in ("prefill", "decode")]


if __name__ == "__main__":
    main()
