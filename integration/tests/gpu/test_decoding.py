"""Tokens are decoded without waiting for the device, in CUDA graphs, and compiled."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from helpers.language import tiny_model
from helpers.vectors import compensated
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, StaticCache

from bc_plugin import Compensation

# Operations whose results the program, not the device, needs to go on.
VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")
POSITIONS = (0, 1, 3)
PROMPT, STEPS = 4, 5
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=POSITIONS, ids="positions={}".format)
def positions(request):
    return request.param


@pytest.fixture
def model(positions, device):
    """Compensated, of linears that PyTorch itself runs."""
    return compensated(tiny_model(), positions).to(device)


def _tokens(device, count):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 90, (1, count), generator=generator).to(device)


class Waiting(TorchDispatchMode):
    """Counts operations that need a value from the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in VALUES:
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(device):
    """While it lasts, waiting for the device is an error, if there is one to wait for."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _decoding(model, device):
    """A call that decodes one token, warmed up."""
    ids = _tokens(device, PROMPT + 3)
    cache = model(ids[:, :PROMPT], use_cache=True).past_key_values
    # Made before, as a server would: a tensor of a number that Python has is a wait of its own.
    places = [torch.tensor([[PROMPT + n]], device=device) for n in range(3)]

    def step(number):
        token = ids[:, PROMPT + number, None]
        return model(token, past_key_values=cache, position_ids=places[number], use_cache=True)

    step(0)
    return step


def test_a_token_is_decoded_without_waiting(model, device):
    step = _decoding(model, device)
    with no_waiting(device):
        output = step(1)
    with Waiting() as waiting:
        output = step(2)
    # On a CPU, where looking costs nothing, the tracker looks whether there are leading tokens.
    looks = int(device.type == "cpu" and Compensation.attached_to(model).positions > 0)
    assert len(waiting.found) == looks, waiting.found
    assert output.logits.isfinite().all()


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_kernels_wait_no_more_with_vectors(method, device, checkpoint, enabled):
    pytest.importorskip("gptqmodel", reason="needs the gptq extra")
    pytest.importorskip("compressed_tensors", reason="needs other quantizers")
    folder, plain = checkpoint(method)
    counts = []
    for each in (plain, folder):
        model = AutoModelForCausalLM.from_pretrained(
            each, dtype=torch.float16, device_map={"": device}
        )
        step = _decoding(model, device)
        with _warned(device) as waits:
            step(1)
        counts.append(len(waits))
    assert counts[1] <= counts[0]


@contextmanager
def _warned(device):
    """The warnings of operations that wait for the device."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        waits = []
        try:
            yield waits
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            waits += [w for w in found if "synchronizing CUDA operation" in str(w.message)]


class Replayed:
    """A call with the same tensors each time, captured in a CUDA graph where there can be one."""

    def __init__(self, call, device):
        self.call, self.graph = call, None
        if device.type == "cuda":
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = call()

    def __call__(self):
        if self.graph is None:
            return self.call()
        self.graph.replay()
        return self.output


def _static_steps(model, device, run=lambda call: call):
    """Logits of token after token with a static cache, each in tensors that stay in place.

    Args:
        run: Makes of the call what is called.
    """
    ids = _tokens(device, PROMPT + STEPS)
    cache = StaticCache(config=model.config, max_cache_len=16)
    token, place = ids[:, :1].clone(), torch.zeros(1, 1, dtype=torch.int64, device=device)

    def call():
        return model(token, past_key_values=cache, position_ids=place, use_cache=True).logits

    logits = []
    for number in range(PROMPT):
        token.copy_(ids[:, number, None])
        place.fill_(number)
        logits.append(call().clone())
    # A capture computes nothing, but Python's part of a cache would count it.
    step = run(call)
    for number in range(PROMPT, ids.shape[1]):
        token.copy_(ids[:, number, None])
        place.fill_(number)
        logits.append(step().clone())
    return torch.cat(logits, 1), model(ids, use_cache=False).logits


def test_a_static_cache(model, device):
    torch.testing.assert_close(*_static_steps(model, device), **CLOSE)


def test_a_cuda_graph_is_replayed_for_later_tokens(model, device):
    found, expected = _static_steps(model, device, lambda call: Replayed(call, device))
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["default", "reduce-overhead"])
def test_compiled_decoding(model, device, kind, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # as the integration tests set it
    how = {"mode": kind} if device.type == "cuda" else {"backend": "aot_eager"}
    compiled = torch.compile(model, **how)
    _, expected = _static_steps(model, device)
    found, _ = _static_steps(compiled, device)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_generate_compiles_a_static_cache_by_itself(model, device):
    prompt = _tokens(device, PROMPT)
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    mask = torch.ones_like(prompt)
    expected, found = (
        model.generate(prompt, attention_mask=mask, cache_implementation=kind, **settings)
        for kind in ("dynamic", "static")
    )
    assert found.tolist() == expected.tolist()
