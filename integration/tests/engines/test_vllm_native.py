"""What llm-compressor's modifier writes with ``native=True``, in vLLM without the plugin."""

import os
import subprocess

import pytest
import torch

pytest.importorskip("compressed_tensors", reason="needs the current stack")

from rig.engines.with_vllm import VLLM, run_vllm
from rig.folders import INTEGRATION, REPOSITORY
from rig.subjects.served import scores_of
from rig.subjects.tiny import VOCABULARY, tiny_checkpoint, tiny_tokenizer

LLMCOMPRESSOR = REPOSITORY / ".venv-llmcompressor" / "bin" / "python"
for python, target in ((VLLM, "setup-vllm"), (LLMCOMPRESSOR, "setup-llmcompressor")):
    if not python.exists():
        pytest.skip(f"needs an environment more: make {target}", allow_module_level=True)

NOISE = 0.1  # of log-probabilities in bfloat16
WRITE = """
import sys
from rig.quantizers.with_llmcompressor import quantize
from rig.subjects.tiny import sequences

source, plain, vectors, native = sys.argv[1:]
settings = {"bits": 4, "group_size": 32, "method": "nearest", "sym": True}
compensated = {"positions": 0}
for folder, flag, biases in (
    (plain, None, False), (vectors, compensated, False), (native, compensated, True)
):
    model = quantize(source, sequences(), flag, {**settings, "native": biases})
    model.save_pretrained(folder)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints without vectors, with them, and with biases in their place."""
    folder = tmp_path_factory.mktemp("native")
    tiny_tokenizer().save_pretrained(folder / "float")
    tiny_checkpoint(folder / "float", dtype=torch.bfloat16)
    out = [folder / name for name in ("plain", "vectors", "native")]
    paths = (str(INTEGRATION), os.environ.get("PYTHONPATH"))
    own = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [LLMCOMPRESSOR, "-c", WRITE, folder / "float", *out]
    subprocess.run(command, check=True, env=own)
    return out


def test_its_biases_are_the_vectors(made, tmp_path):
    plain, vectors, native = made
    generator = torch.Generator().manual_seed(5)
    prompts = [
        torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (9, 24, 60)
    ]
    # The test's kernel for CPUs without AVX-512 is a plugin of vLLM's, too; ours is not among them.
    alone = {"VLLM_PLUGINS": "rig_kernels", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    found = run_vllm(native, prompts, tmp_path, environment=alone, enforce_eager=True)
    assert "bias_compensation" not in (tmp_path / "vllm.log").read_text()
    pairs = list(zip(found["log_probabilities"], scores_of(vectors, prompts), strict=True))
    apart = [float((torch.tensor(a) - b).abs().mean()) for a, b in pairs]
    assert max(apart) < NOISE
    without = zip(found["log_probabilities"], scores_of(plain, prompts), strict=True)
    assert min(float((torch.tensor(a) - b).abs().mean()) for a, b in without) > 2 * max(apart)
