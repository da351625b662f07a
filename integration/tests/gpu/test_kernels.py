"""A compensated checkpoint gives the same logits through every kernel, in both half precisions."""

from contextlib import nullcontext

import pytest
import torch
from rig.quantizers import with_autoawq
from rig.quantizers.pipelines import PIPELINES
from rig.subjects.dequantized import dequantized
from rig.subjects.tiny import logits, sequences, tiny_checkpoint, tiny_tokenizer
from transformers import AutoModelForCausalLM

from bc_plugin import Compensation

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
GPTQ = ("gptq_marlin", "gptq_triton", "gptq_exllama_v2", "gptq_torch")
AWQ = ("awq_marlin", "awq_gemm", "awq_gemm_triton", "awq_exllama_v2", "awq_torch")


def _check(model, device, expected, plain):
    """The model's logits are those expected, but for rounding, which vectors are far above.

    Not of each token: in a random model rounding may turn a token's attention to another.
    """
    found = _logits(model, device)
    assert next(model.parameters()).device == device
    apart, made = ((each - expected).norm(dim=-1)[0] for each in (found, plain))
    close = apart < 0.2 * made
    assert bool(close[0]), "the leading token has a vector of its own"
    assert close.float().mean() > 0.8, (apart, made)


@torch.no_grad()
def _logits(model, device):
    batch = {key: value.to(device) for key, value in sequences(1, seed=7)[0].items()}
    return model(**batch).logits.float().cpu()


def _kernel(backend, method):
    """The class behind a backend of GPTQModel's; a skip says why it cannot run here."""
    from gptqmodel.quantization import FORMAT, METHOD
    from gptqmodel.utils.backend import BACKEND
    from gptqmodel.utils.importer import get_kernel_for_backend

    form = FORMAT.GEMM if method == "awq" else FORMAT.GPTQ
    kernel = get_kernel_for_backend(BACKEND(backend), METHOD(method), form)
    runs, why = kernel.validate_once()  # builds it, for some
    if not runs:
        pytest.skip(f"GPTQModel has no {backend} here: {why}")
    return BACKEND(backend), kernel


@DTYPES
@pytest.mark.parametrize("backend", GPTQ + AWQ)
def test_gptqmodel(checkpoint, enabled, device, backend, dtype):
    pytest.importorskip("gptqmodel", reason="needs the gptq extra")
    from gptqmodel import GPTQModel

    if device.type == "cpu" and not backend.endswith("_torch"):
        pytest.skip(f"{backend} is a kernel for GPUs")
    method = backend.partition("_")[0]
    chosen, kernel = _kernel(backend, method)
    if dtype not in kernel.SUPPORTS_DTYPES:
        pytest.skip(f"{kernel.__name__} does not compute in {dtype}")
    folder, plain = checkpoint(method)
    model = GPTQModel.load(str(folder), backend=chosen, device=str(device), dtype=dtype).model
    down = model.model.layers[0].mlp.down_proj
    assert isinstance(down, kernel) and Compensation.attached_to(model) is not None
    _check(model, device, logits(dequantized(folder)), logits(dequantized(plain)))


@DTYPES
@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_transformers(checkpoint, enabled, device, method, dtype):
    """Whatever kernel is chosen by itself."""
    pytest.importorskip("gptqmodel", reason="needs the gptq extra")
    pytest.importorskip("compressed_tensors", reason="needs other quantizers")
    folder, plain = checkpoint(method)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device})
    assert Compensation.attached_to(model) is not None
    _check(model, device, logits(dequantized(folder)), logits(dequantized(plain)))


def test_autoawq(tmp_path, enabled, device):
    """Its own quantizing, which is refused on CPUs, and its own kernels, which are for float16."""
    pipeline = PIPELINES["autoawq"]
    if not pipeline.installed:
        pytest.skip("needs the awq extra")
    with pipeline.on_cpu() if device.type == "cpu" else nullcontext():
        tiny_tokenizer().save_pretrained(tmp_path / "float")
        source = tiny_checkpoint(
            tmp_path / "float", dtype=pipeline.dtype, hidden_size=256, intermediate_size=512
        )
        settings = {"bits": 4, "group_size": 32, **pipeline.settings}
        awq = pipeline.quantize(source, sequences(), {"positions": 1}, settings)
        pipeline.save(awq, tmp_path / "out")
        model = with_autoawq.load(tmp_path / "out", str(device))
        expected = dequantized(tmp_path / "out")
        compensated = logits(expected)
        Compensation.attached_to(expected).detach(expected)
        found, plain = _logits(model, device), logits(expected)
    apart = (found - compensated).norm()
    assert apart < 0.02 * compensated.norm() and apart < 0.2 * (plain - compensated).norm()
    errors = Compensation.attached_to(model).errors.values()
    assert all(error.after <= error.before for error in errors)
