"""Run by Python with llama-cpp-python at hand: its HTTP server, on llama.cpp's own libraries.

python llama_server.py MODEL.gguf PORT
"""

import sys

from llama_cpp._ggml import libggml
from llama_cpp.server.__main__ import main

if __name__ == "__main__":
    libggml.ggml_backend_load_all()
    model, port = sys.argv[1:]
    sys.argv[1:] = ["--model", model, "--port", port, "--host", "127.0.0.1", "--n_ctx", "256"]
    sys.argv += ["--n_threads", "1"]
    main()
