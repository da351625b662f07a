"""Logits from llama.cpp, in a process of its own: a fault of its ends the process.

    python llama_cpp_logits.py MODEL.gguf CONTROL.gguf IDS.npy OUT.npy

CONTROL.gguf may be ``-``. IDS.npy is int64 (sequences, length), OUT.npy float32 (sequences, length,
vocabulary). Nothing but llama-cpp-python, gguf and numpy is imported.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import numpy as np


def main(model_path: str, control_path: str, ids_path: str, out_path: str) -> None:
    """Run the file's sequences, one after the other."""
    import llama_cpp
    from llama_cpp._ggml import libggml

    llama_cpp.llama_backend_init()
    libggml.ggml_backend_load_all()  # where backends are libraries of their own
    model = llama_cpp.llama_model_load_from_file(
        model_path.encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise SystemExit(f"llama.cpp does not load {model_path}")
    ids = np.load(ids_path)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = ids.shape[1]
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    settings.n_threads = settings.n_threads_batch = threads
    settings.type_k = settings.type_v = 0  # F32: rounding is for what is compared
    settings.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, settings)
    if control_path != "-":
        _set_control_vector(llama_cpp, context, model, control_path)
    np.save(out_path, np.stack([_logits(llama_cpp, context, model, row) for row in ids]))


def _set_control_vector(llama_cpp: Any, context: Any, model: Any, path: str) -> None:
    """As ``--control-vector`` does: direction.N is added to the output of layer N, from 1 on."""
    from gguf import GGUFReader

    layers = llama_cpp.llama_model_n_layer(model)
    width = llama_cpp.llama_model_n_embd(model)
    data = np.zeros((layers - 1, width), np.float32)
    for tensor in GGUFReader(path).tensors:
        data[int(tensor.name.rpartition(".")[2]) - 1] += tensor.data
    pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if llama_cpp.llama_set_adapter_cvec(context, pointer, data.size, width, 1, layers):
        raise SystemExit(f"llama.cpp does not take {path}")


def _logits(llama_cpp: Any, context: Any, model: Any, row: np.ndarray) -> np.ndarray:
    length = len(row)
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch = llama_cpp.llama_batch_init(length, 0, 1)
    batch.n_tokens = length
    for place, token in enumerate(row.tolist()):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit("llama.cpp cannot run the tokens")
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (length, size)).copy()
    llama_cpp.llama_batch_free(batch)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
