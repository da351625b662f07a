"""Run by Python with llama-cpp-python at hand: tokens per second of several files, in turns.

    python llama_speed.py OUT.json THREADS TURNS PROMPT GENERATED MODEL.gguf [MODEL.gguf ...]

OUT.json has, for each file, a list per turn of tokens per second: of a prompt of PROMPT tokens, and
of GENERATED tokens one after the other.
"""

import json
import sys
import time
from pathlib import Path

import llama_cpp
from llama_cpp._ggml import libggml


def main(out: str, threads: str, turns: str, prompt: str, generated: str, *paths: str) -> None:
    llama_cpp.llama_backend_init()
    libggml.ggml_backend_load_all()
    length, more = int(prompt), int(generated)
    contexts = [_context(path, int(threads), length + more) for path in paths]
    for context in contexts:
        _run(context, length, more)  # the first run of each reads its weights from the disk
    found = [[] for _ in paths]
    for _ in range(int(turns)):
        for times, context in zip(found, contexts, strict=True):
            times.append(_run(context, length, more))
    Path(out).write_text(json.dumps(found))


def _context(path: str, threads: int, length: int) -> object:
    settings = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = length
    settings.n_threads = settings.n_threads_batch = threads
    return llama_cpp.llama_init_from_model(model, settings)


def _run(context: object, length: int, more: int) -> list[float]:
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    start = time.perf_counter()
    _decode(context, list(range(10, 10 + length)))
    read = time.perf_counter()
    for token in range(more):
        _decode(context, [10 + token])
    return [length / (read - start), more / (time.perf_counter() - read)]


def _decode(context: object, tokens: list[int]) -> None:
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))):
        raise SystemExit("llama.cpp cannot run the tokens")
    llama_cpp.llama_synchronize(context)


if __name__ == "__main__":
    main(*sys.argv[1:])
