"""Run by the Python of vLLM's own environment: several models' throughput, in turns.

    python vllm_turns.py ASKED.json FOUND.json

``ASKED.json`` holds ``models``, paths by name; ``prompts``, lists of token ids; ``new``, how many
tokens to generate; and ``turns``. All engines are up at once, and one after the other is timed.
"""

import json
import os
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    asked, out = sys.argv[1:]
    from vllm import LLM, SamplingParams

    with open(asked) as file:
        given = json.load(file)
    prompts, new = [{"prompt_token_ids": ids} for ids in given["prompts"]], given["new"]
    settings = {
        "dtype": "bfloat16",
        "max_model_len": max(map(len, given["prompts"])) + new,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
    }
    engines = {name: LLM(model=path, **settings) for name, path in given["models"].items()}
    found = {name: {"prefill": [], "decode": []} for name in engines}
    for turn in range(given["turns"] + 1):
        for name, engine in engines.items():
            seconds = {}
            for count in (1, new):
                params = SamplingParams(max_tokens=count, min_tokens=count, temperature=0.0)
                start = time.perf_counter()
                engine.generate(prompts, params, use_tqdm=False)
                seconds[count] = time.perf_counter() - start
            if turn:  # the first warms up
                found[name]["prefill"].append(seconds[1])
                found[name]["decode"].append(seconds[new] - seconds[1])
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
