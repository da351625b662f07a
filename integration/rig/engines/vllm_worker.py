"""Run by the Python of vLLM's own environment: log-probabilities of prompts, and throughput.

    python vllm_worker.py MODEL IDS.json OUT.json [--tensor-parallel-size N] [--generate N]

``IDS.json`` holds lists of token ids. Nothing of bc_plugin is installed there.
"""

import argparse
import json
import os
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("ids")
    parser.add_argument("out")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--generate", type=int, default=0)
    given = parser.parse_args()

    from vllm import LLM, SamplingParams

    with open(given.ids) as file:
        prompts = [{"prompt_token_ids": ids} for ids in json.load(file)]
    longest = max(len(prompt["prompt_token_ids"]) for prompt in prompts)
    engine = LLM(
        model=given.model,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=longest + max(given.generate, 1),
        tensor_parallel_size=given.tensor_parallel_size,
        skip_tokenizer_init=True,
    )
    scored = engine.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0))
    found = {
        "log_probabilities": [
            [
                entry[token].logprob
                for entry, token in zip(
                    one.prompt_logprobs[1:], one.prompt_token_ids[1:], strict=True
                )
            ]
            for one in scored
        ]
    }
    if given.generate:
        settings = SamplingParams(
            max_tokens=given.generate, min_tokens=given.generate, temperature=0.0
        )
        found["seconds"] = []
        for _ in range(3):
            start = time.perf_counter()
            engine.generate(prompts, settings)
            found["seconds"].append(time.perf_counter() - start)
        found["tokens"] = given.generate * len(prompts)
    with open(given.out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
