"""Many threads with one compensated model, as in a server: is any answer another than alone?

    python integration/benchmarks/threads.py [--seconds 60] [--threads 8]

Every thread generates from prompts of mixed lengths; each answer is compared, token by token and in
its logits, with what the same prompt gives when nothing else runs.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from helpers.language import crudely_quantized, tiny_model, token_batches
from helpers.vectors import compensated
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn


def subject(positions: int | None) -> nn.Module:
    """A tiny model."""
    torch.manual_seed(0)
    float_model = tiny_model(num_hidden_layers=6)
    if positions is None:
        return crudely_quantized(float_model)
    return compensated(float_model, positions)


def answer(model: nn.Module, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens and the logits of a greedy continuation."""
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits)


def count(model: nn.Module, threads: int, seconds: float) -> tuple[int, int, int]:
    """Answers, those that are wrong, and those that raised, in so many seconds."""
    prompts = [token_batches(1, length=n, seed=n)[0]["input_ids"] for n in range(1, 33)]
    alone = [answer(model, prompt) for prompt in prompts]
    end = time.perf_counter() + seconds

    def serve(first: int) -> list[str]:
        outcomes = []
        number = first
        while time.perf_counter() < end:
            number = (number * 5 + 1) % len(prompts)
            try:
                tokens, logits = answer(model, prompts[number])
            except Exception as error:  # whatever it is, it is counted
                outcomes.append(repr(error))
                continue
            same = torch.equal(tokens, alone[number][0])
            close = torch.allclose(logits, alone[number][1], atol=1e-3)
            outcomes.append("right" if same and close else "wrong")
        return outcomes

    with ThreadPoolExecutor(threads) as pool:
        found = [outcome for part in pool.map(serve, range(threads)) for outcome in part]
    raised = len(found) - found.count("right") - found.count("wrong")
    return len(found), found.count("wrong"), raised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("positions", "answers", "wrong", "raised")
    table.title = f"{given.threads} threads, {given.seconds:.0f} s each"
    for positions in (None, 0, 1):
        model = subject(positions)
        counts = count(model, given.threads, given.seconds)
        table.add_row("no vectors" if positions is None else str(positions), *map(str, counts))
    Console().print(table)


if __name__ == "__main__":
    main()
