"""Run by the Python of vLLM's own environment: log-probabilities of prompts, and what follows them.

    python vllm_worker.py MODEL ASKED.json FOUND.json

``ASKED.json`` holds ``prompts``, lists of token ids; ``engine``, arguments of vLLM's ``LLM``;
``continued``, how many tokens to generate greedily after each prompt, twice, so that the second
time most are cached; and ``classes``, whether to tell the classes of the linears' methods.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    model, asked, out = sys.argv[1:]
    from vllm import LLM, SamplingParams

    with open(asked) as file:
        given = json.load(file)
    prompts = [{"prompt_token_ids": ids} for ids in given["prompts"]]
    longest = max(len(ids) for ids in given["prompts"])
    new = max(given.get("continued", 0), 1)
    engine = LLM(
        **{
            "model": model,
            "dtype": "bfloat16",
            "max_model_len": longest + new,
            "skip_tokenizer_init": True,
            **given.get("engine", {}),
        }
    )
    scored = engine.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0))
    found = {"log_probabilities": [_of_prompt(one) for one in scored]}
    if given.get("continued"):
        new = given["continued"]
        greedy = SamplingParams(max_tokens=new, min_tokens=new, temperature=0.0, logprobs=0)
        engine.reset_prefix_cache()
        runs = [engine.generate(prompts, greedy) for _ in range(2)]
        found["continuations"] = [[_continued(one) for one in run] for run in runs]
    if given.get("classes"):
        found["classes"] = engine.apply_model(_classes)[0]
    with open(out, "w") as file:
        json.dump(found, file)


def _of_prompt(one) -> list:
    pairs = zip(one.prompt_logprobs[1:], one.prompt_token_ids[1:], strict=True)
    return [entry[token].logprob for entry, token in pairs]


def _continued(one) -> dict:
    (output,) = one.outputs
    pairs = zip(output.logprobs, output.token_ids, strict=True)
    return {
        "ids": list(output.token_ids),
        "log_probabilities": [entry[token].logprob for entry, token in pairs],
        "cached": one.num_cached_tokens,
    }


def _classes(model) -> list:
    methods = (getattr(module, "quant_method", None) for module in model.modules())
    kinds = {type(method) for method in methods if method is not None}
    return sorted(f"{kind.__module__}.{kind.__name__}" for kind in kinds)


if __name__ == "__main__":
    main()
