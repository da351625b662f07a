"""Run by Python with llama-cpp-python at hand: llama.cpp's own quantizer.

    python llama_quantizer.py FLOAT.gguf OUT.gguf Q4_K_M THREADS [IMATRIX.npz]

IMATRIX.npz has, by name of a weight, the mean square of each input, float32 (in_features,).
"""

import ctypes
import sys

import llama_cpp
import numpy as np
from llama_cpp._ggml import libggml


def main(source: str, out: str, kind: str, threads: str, imatrix: str | None = None) -> None:
    llama_cpp.llama_backend_init()
    libggml.ggml_backend_load_all()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = int(threads)
    found = {} if imatrix is None else dict(np.load(imatrix))
    rows = (llama_cpp.llama_model_imatrix_data * (len(found) + 1))()  # the last one is the end
    for row, (name, values) in zip(rows, found.items(), strict=False):
        row.name, row.size = name.encode(), values.size
        row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if found:
        settings.imatrix = ctypes.cast(rows, type(settings.imatrix))
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(settings)):
        raise SystemExit(f"llama.cpp does not quantize {source}")


if __name__ == "__main__":
    main(*sys.argv[1:])
