"""What AutoGPTQ, AutoAWQ and llm-compressor's AWQ need to run without a GPU. For tests only."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from unittest import mock

import torch


@contextmanager
def auto_gptq_on_cpu():
    """While this lasts, AutoGPTQ takes the CPU for its first GPU."""
    from auto_gptq.modeling import _base

    def quantize(original):
        @functools.wraps(original)
        def on_cpu(self, *args, **kwargs):
            inside_model = []

            def as_tuple(module, args, output):
                # From transformers 4.54 a block returns a tensor, of which AutoGPTQ, which calls
                # blocks by themselves, takes [0].
                tensor = isinstance(output, torch.Tensor)
                return (output,) if tensor and not inside_model else output

            layers = _base.get_module_by_name_prefix(self.model, self.layers_block_name)
            handles = [layer.register_forward_hook(as_tuple) for layer in layers]
            handles += [
                self.model.register_forward_pre_hook(lambda *_: inside_model.append(True)),
                self.model.register_forward_hook(lambda *_: inside_model.clear(), always_call=True),
            ]
            try:
                return original.__get__(self)(*args, **kwargs)  # bound, as a patch wants it
            finally:
                for handle in handles:
                    handle.remove()

        return on_cpu

    def from_pretrained(original):
        @functools.wraps(original)
        def on_cpu(cls, *args, **kwargs):
            with mock.patch("torch.cuda.is_available", return_value=True):
                return original(cls, *args, **kwargs)

        return classmethod(on_cpu)

    model = _base.BaseGPTQForCausalLM
    loader = vars(model)["from_pretrained"].__func__
    with (
        mock.patch.object(_base, "CUDA_0", torch.device("cpu")),
        mock.patch("torch.cuda.synchronize", lambda *a: None),
        mock.patch.object(model, "from_pretrained", from_pretrained(loader)),
        mock.patch.object(model, "quantize", quantize(vars(model)["quantize"])),
    ):
        yield


@contextmanager
def optimum_with_auto_gptq_on_cpu():
    """While this lasts, Optimum 2.0 quantizes on the CPU with AutoGPTQ.

    It also wants ``cache_block_outputs=False`` (for the same [0] as above).
    """
    from optimum.gptq import quantizer

    move = torch.nn.Module.to

    def to(self, *args, **kwargs):
        return self if args == (0,) else move(self, *args, **kwargs)

    with (
        mock.patch.object(quantizer, "nested_move_to", lambda value, device: value),
        mock.patch.object(torch.nn.Module, "to", to),
        mock.patch("torch.cuda.synchronize", lambda *a: None),
    ):
        yield


@contextmanager
def autoawq_on_cpu():
    """While this lasts, AutoAWQ takes the CPU for its first GPU, and PyTorch for its kernels."""
    from awq.models import base
    from awq.modules.linear import gemm

    @torch.no_grad()
    def forward(self, x):
        """As its own: float16 in and out. CPUs multiply that more than ten times slower."""
        weight = gemm.dequantize_gemm(
            self.qweight, self.qzeros, self.scales, self.w_bit, self.group_size
        )
        out = (x.half().float() @ weight.float()).half()
        return (out if self.bias is None else out + self.bias).to(x.dtype)

    # From a GPU this is a copy, which AutoAWQ restores weights from after each try at a scale. On a
    # CPU it is the tensor itself, and the weights would keep the first scale tried.
    move = torch.Tensor.cpu

    def cpu(tensor, *args, **kwargs):
        return move(tensor, *args, **kwargs).clone()

    with (
        mock.patch.object(torch.Tensor, "cpu", cpu),
        # Its loader would demand a package for the CPU otherwise.
        mock.patch.object(base, "get_best_device", lambda: "cuda:0"),
        mock.patch.object(gemm.WQLinear_GEMM, "forward", forward),
    ):
        yield


@contextmanager
def llmcompressor_awq_on_cpu():
    """While this lasts, llm-compressor 0.14's AWQ pins no memory for a GPU that is not there."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    with mock.patch.object(IntermediatesCache, "pin_memory", lambda *a: None):
        yield
