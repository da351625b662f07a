"""What is wrong shows before a toolkit begins to quantize; what is not wrong is not refused."""

import copy

import pytest
import torch
from helpers.language import tiny_model, token_batches
from torch import nn

from bc_plugin import BiasCompensationConfig, BiasCompensationError
from bc_plugin.calibration.stream import prepare_stream
from bc_plugin.models.blocks import find_blocks
from bc_plugin.models.float_blocks import BlockSnapshot
from bc_plugin.toolkits import rehearse
from bc_plugin.toolkits.rehearse import Rehearsal


class Kernel(nn.Linear):
    """A quantized linear without its weights yet."""


def _kernels(name, block):
    for path, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear):
            kernel = Kernel(linear.in_features, linear.out_features, bias=False)
            kernel.to(linear.weight.dtype)
            nn.init.zeros_(kernel.weight)
            owner, _, leaf = path.rpartition(".")
            setattr(block.get_submodule(owner), leaf, kernel)
    return block


def _rehearse(model, batches=None, as_quantized=_kernels, **settings):
    batches = token_batches() if batches is None else batches
    config = BiasCompensationConfig(**settings)
    blocks = find_blocks(model, config.blocks)
    stream, positions = prepare_stream(model, blocks, batches, config)
    Rehearsal(model, blocks, BlockSnapshot(model, blocks), as_quantized, positions, config).run(
        stream
    )


class Sequential(nn.Module):
    """A feed-forward layer of another kind, whose linears are given what ``path`` makes of it."""

    def __init__(self, tokens_of) -> None:
        super().__init__()
        self.inner, self.tokens_of = nn.Linear(32, 32), tokens_of

    def forward(self, hidden):
        return self.inner(self.tokens_of(hidden)).reshape(hidden.shape)


def _with_last(tokens_of):
    model = tiny_model()
    model.model.layers[2].mlp = Sequential(tokens_of)
    return model


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize("settings", [{}, {"positions": 0}, {"positions": "all"}])
def test_nothing_is_wrong_and_nothing_changes(architecture, settings):
    model = tiny_model(architecture)
    before = copy.deepcopy(model.state_dict())
    modules = [(name, type(module)) for name, module in model.named_modules()]
    _rehearse(model, **settings)
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_one_block_of_each_kind_is_measured(monkeypatch):
    measured = []
    measure = rehearse.measure_block

    def noted(name, *rest):
        measured.append(name)
        return measure(name, *rest)

    monkeypatch.setattr(rehearse, "measure_block", noted)
    _rehearse(_with_last(lambda hidden: hidden))
    assert measured == ["model.layers.0", "model.layers.2"]


def test_tokens_that_cannot_be_placed_in_a_later_kind_of_block():
    model = _with_last(lambda hidden: hidden.view(-1, 4, 32))
    with pytest.raises(BiasCompensationError, match=r"layers\.2\.mlp\.inner.*positions=0"):
        _rehearse(model)
    _rehearse(model, positions=0)
    _rehearse(model, sites="block")


def test_padding_goes_first():
    """Windows of real tokens are no trouble without positions; which are padding is."""
    model = _with_last(lambda hidden: hidden.view(-1, 4, 32))
    batches = token_batches()
    batches[-1]["attention_mask"][:, -3:] = 0
    with pytest.raises(BiasCompensationError, match="unknown what is padding"):
        _rehearse(model, batches, positions=0, batch_tokens=16, held_out=0)


def test_a_linear_that_is_never_called_is_found_out():
    model = tiny_model()
    model.model.layers[1].mlp.spare = nn.Linear(32, 32)
    with pytest.raises(BiasCompensationError, match=r"layers\.1\.mlp\.spare.*never reaches"):
        _rehearse(model, sites="linear")


def test_a_linear_may_wait_for_the_batch_that_comes_to_it():
    class Picky(Sequential):
        def forward(self, hidden):
            return self.inner(hidden) if len(hidden) == 2 else hidden

    model = tiny_model()
    model.model.layers[1].mlp = Picky(None)
    _rehearse(model, token_batches() + token_batches(1, length=8, batch=2), held_out=0)
    with pytest.raises(BiasCompensationError, match="never reaches"):
        _rehearse(model, held_out=0, sites="linear")


def test_a_block_whose_output_is_not_finite():
    model = tiny_model().half()
    model.model.layers[1].mlp.down_proj.weight.data.fill_(6e4)
    with pytest.raises(BiasCompensationError, match=r"layers\.1.*not finite.*float16"):
        _rehearse(model)


@pytest.mark.parametrize("error", [NotImplementedError, ValueError, AssertionError])
def test_a_kernel_that_does_not_run_here(error):
    class Elsewhere(Kernel):
        def forward(self, hidden):
            raise error("only groups of 128")

    def as_quantized(name, block):
        block.mlp.up_proj = Elsewhere(32, 48, bias=False)
        return block

    with pytest.raises(
        BiasCompensationError, match=r"layers\.0 .*only groups of 128.*Nothing has been quantized"
    ):
        _rehearse(tiny_model(), as_quantized=as_quantized)


def test_a_kernel_that_cannot_be_made():
    def as_quantized(name, block):
        raise NotImplementedError("group_size=48")

    with pytest.raises(BiasCompensationError, match=r"group_size=48.*another group size"):
        _rehearse(tiny_model(), as_quantized=as_quantized)


def test_only_what_will_be_quantized_has_to_be_in_order():
    """A linear that a toolkit leaves alone may see whatever it likes."""

    def as_quantized(name, block):
        block.self_attn.q_proj = Kernel(32, 32, bias=False)
        return block

    _rehearse(_with_last(lambda hidden: hidden.view(-1, 4, 32)), as_quantized=as_quantized)


def test_the_toolkit_is_told_which_block_it_is():
    names = []

    def as_quantized(name, block):
        names.append(name)
        return _kernels(name, block)

    _rehearse(_with_last(lambda hidden: hidden), as_quantized=as_quantized)
    assert names == ["model.layers.0", "model.layers.2"]
