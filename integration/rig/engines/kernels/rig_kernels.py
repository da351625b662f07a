"""vLLM's 4-bit kernel for CPUs without AVX-512, for which vLLM's packages have none.

Only a test machine needs it. vLLM loads it in each of its processes, as a plugin of its own: this
folder is on their path, and the one beside it announces the entry point.
"""

import torch

SCHEMA = (
    "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a2!) output, Tensor scales, "
    "Tensor? zeros, Tensor? bias, SymInt pack_factor, str isa_hint) -> ()"
)
BLOCK, BITS = 16, 4  # outputs that are stored together, each input's after the other's
_library = []
_weights: dict[int, torch.Tensor] = {}


def register() -> None:
    """Define the kernel where there is none."""
    if _library or hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(SCHEMA)
    library.impl("cpu_gemm_wna16", _gemm, "CPU")
    library.impl("cpu_gemm_wna16", lambda *args: None, "Meta")
    _library.append(library)


def _gemm(inputs, packed, output, scales, zeros, bias, pack_factor, isa_hint) -> None:
    key = packed.data_ptr()
    if key not in _weights:
        _weights[key] = _weight(packed, scales, zeros)
    # Without AVX-512 a product of bfloat16 matrices is many times slower than of float32.
    wide = inputs.float() @ _weights[key]
    output.copy_(wide if bias is None else wide + bias)


def _weight(packed, scales, zeros):
    """float32 (in_features, out_features), as the kernel's packed words and scales mean it."""
    features = scales.shape[1]
    values = _nibbles(packed.view(features // BLOCK, -1, BLOCK * BITS // 32))
    values = values.permute(1, 0, 2).reshape(-1, features)
    group = torch.arange(len(values)) // (len(values) // len(scales))
    zero = 8 if zeros is None else _nibbles(zeros)[group]
    return ((values - zero) * scales[group].float()).to(scales.dtype).float()


def _nibbles(words):
    shifts = torch.arange(0, 32, BITS)
    return ((words.long()[..., None] >> shifts) & 15).flatten(-2)
