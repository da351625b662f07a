import copy
import dataclasses
import json

import pytest
import torch
from models import crudely_quantized, tiny_model, token_batches
from safetensors.torch import load_file, save_file
from torch import nn

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation
from bc_plugin.vectors.compensation import FILE


def _pair(architecture="llama", positions=1, **changes):
    model = tiny_model(architecture, **changes)
    quantized = crudely_quantized(model)
    return quantized, bc_plugin.compensate(
        quantized, model, token_batches(), {"positions": positions}
    )


@torch.no_grad()
def _logits(model):
    return model(**token_batches(1, seed=3)[0]).logits


@pytest.mark.parametrize("positions", [0, 1])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_attach_then_detach_gives_the_same_outputs_bit_for_bit(architecture, positions):
    quantized, compensation = _pair(architecture, positions)
    before, state = _logits(quantized), copy.deepcopy(quantized.state_dict())
    compensation.attach(quantized)
    assert Compensation.attached_to(quantized) is compensation
    assert not torch.equal(_logits(quantized), before)
    compensation.detach(quantized)
    assert Compensation.attached_to(quantized) is None
    assert torch.equal(_logits(quantized), before)
    assert list(quantized.state_dict()) == list(state)
    for module in quantized.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in vars(module)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_plain_bias_leaves_a_linears_forward_alone(architecture):
    quantized, compensation = _pair(architecture, positions=0)
    compensation.attach(quantized)
    for name, kind in compensation.kinds.items():
        module = quantized.get_submodule(name)
        assert ("forward" in vars(module)) == (kind == "block")


def test_only_vectors_are_added_to_the_state_dict():
    quantized, compensation = _pair("opt")
    before = copy.deepcopy(quantized.state_dict())
    compensation.attach(quantized)
    after = quantized.state_dict()
    added = {f"{name}.bias_compensation" for name in compensation.vectors}
    assert set(after) - set(before) == added
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_state_dict_loaded_into_a_compensated_model_keeps_it_compensated(architecture):
    quantized, compensation = _pair(architecture, positions=0)
    compensation.attach(quantized)
    expected, state = _logits(quantized), copy.deepcopy(quantized.state_dict())
    for tensor in quantized.state_dict().values():
        tensor.zero_()
    quantized.load_state_dict(state)
    assert torch.equal(_logits(quantized), expected)


def test_a_compensated_model_can_change_its_type():
    quantized, compensation = _pair("opt")
    compensation.attach(quantized)
    expected = _logits(quantized)
    torch.testing.assert_close(_logits(quantized.double()).float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", [0, 1, "all"])
def test_save_then_load_gives_the_same_logits(tmp_path, positions):
    quantized, compensation = _pair(positions=positions)
    path = compensation.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] == [FILE]
    loaded = Compensation.load(tmp_path)
    assert loaded.positions == compensation.positions
    for name, errors in compensation.errors.items():
        assert loaded.errors[name].after == pytest.approx(errors.after, rel=1e-3)
    twin = copy.deepcopy(quantized)
    compensation.attach(quantized)
    loaded.attach(twin)
    assert torch.equal(_logits(twin), _logits(quantized))


def test_vectors_that_cannot_be_written_leave_no_file(tmp_path, monkeypatch):
    _, compensation = _pair()
    compensation.save(tmp_path)
    before = (tmp_path / FILE).read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("bc_plugin.vectors.compensation.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        compensation.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_bytes() == before


def test_vectors_take_two_bytes_unless_they_do_not_fit():
    quantized, compensation = _pair()
    assert {v.dtype for v in compensation.vectors.values()} == {torch.float16}
    model = tiny_model()
    model.model.embed_tokens.weight.data.mul_(1e6)
    quantized = crudely_quantized(model)
    large = bc_plugin.compensate(quantized, model, token_batches())
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1e6)
    large = bc_plugin.compensate(quantized, model, token_batches())
    assert large.vectors["model.layers.0.mlp.down_proj"].dtype == torch.float32
    assert all(torch.isfinite(v).all() for v in large.vectors.values())


# Everything that must not pass in silence


def test_vectors_of_another_model_are_refused():
    _, compensation = _pair()
    other = crudely_quantized(tiny_model(seed=1))
    with pytest.raises(BiasCompensationError, match="digest"):
        compensation.attach(other)


def test_vectors_of_another_architecture_are_refused():
    _, compensation = _pair()
    with pytest.raises(BiasCompensationError, match="no module"):
        compensation.attach(crudely_quantized(tiny_model("opt")))


def test_requantized_weights_are_refused():
    quantized, compensation = _pair()
    weight = quantized.model.layers[2].self_attn.v_proj.weight
    weight.data += 0.05 * (torch.rand_like(weight) < 0.2)
    with pytest.raises(BiasCompensationError, match="digest"):
        compensation.attach(quantized)


def test_attaching_twice_is_refused():
    quantized, compensation = _pair()
    compensation.attach(quantized)
    with pytest.raises(BiasCompensationError, match="already"):
        compensation.attach(quantized)


def test_detaching_what_is_not_attached_is_refused():
    quantized, compensation = _pair()
    with pytest.raises(BiasCompensationError, match="not attached"):
        compensation.detach(quantized)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_vectors_that_are_not_finite_are_refused(value):
    quantized, compensation = _pair()
    compensation.vectors["model.layers.1"][0, 3] = value
    with pytest.raises(BiasCompensationError, match=r"model\.layers\.1\.bias_compensation .* NaN"):
        compensation.attach(quantized)


def test_a_vector_of_the_wrong_shape_is_refused():
    quantized, compensation = _pair()
    name = "model.layers.0.mlp.down_proj"
    compensation.vectors[name] = compensation.vectors[name][:, :-1]
    with pytest.raises(BiasCompensationError, match=r"shape \(2, 31\), expected \(2, 32\)"):
        compensation.attach(quantized)


def _rewrite(folder, change_tensors=None, change_entry=None):
    from safetensors import safe_open

    path = folder / FILE
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        entry = json.loads(file.metadata()["bias_compensation"])
    (change_tensors or (lambda tensors: None))(tensors)
    (change_entry or (lambda entry: None))(entry)
    save_file(tensors, path, metadata={"bias_compensation": json.dumps(entry)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"change_tensors": lambda t: t.pop("model.layers.1.bias_compensation")},
            r"missing, the first is model\.layers\.1\.bias_compensation",
        ),
        (
            {"change_tensors": lambda t: t.update({"x.bias_compensation": torch.zeros(2, 3)})},
            r"x\.bias_compensation, which its quantization config does not announce",
        ),
        ({"change_entry": lambda e: e.update(format_version=99)}, "format version 99"),
        ({"change_entry": lambda e: e.pop("positions")}, "damaged"),
        ({"change_entry": lambda e: e.update(sites=3)}, "damaged"),
    ],
    ids=["missing", "unknown", "newer", "incomplete", "nonsense"],
)
def test_a_damaged_file_is_refused(tmp_path, changes, message):
    _, compensation = _pair()
    compensation.save(tmp_path)
    _rewrite(tmp_path, **changes)
    with pytest.raises(BiasCompensationError, match=message):
        Compensation.load(tmp_path)


def test_a_folder_without_compensation_is_refused(tmp_path):
    with pytest.raises(BiasCompensationError, match="holds no compensation"):
        Compensation.load(tmp_path)


def test_a_kernel_with_a_bias_of_another_order_is_left_alone():
    class Permuted(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias.flip(0))

    class BuiltOnce(nn.Linear):
        def __init__(self, *args):
            super().__init__(*args)
            self.kernel = [self.weight, self.bias]

        def forward(self, x):
            return nn.functional.linear(x, *self.kernel)

    from bc_plugin.models.tracker import PositionTracker
    from bc_plugin.vectors.attach import AttachedSite

    for kind in (Permuted, BuiltOnce):
        module = kind(8, 6)
        x = torch.randn(2, 3, 8)
        expected = module(x) + torch.arange(6.0)
        site = AttachedSite(module, torch.arange(6.0)[None], PositionTracker(0), torch.float32)
        assert site.merged is None
        torch.testing.assert_close(module(x), expected)


def test_detaching_under_a_forward_wrapped_since_still_takes_the_vectors_out():
    quantized, compensation = _pair()
    before = _logits(quantized)
    compensation.attach(quantized)
    block = quantized.model.layers[0]
    ours = block.forward
    block.forward = lambda *args, **kwargs: ours(*args, **kwargs)  # as accelerate does
    compensation.detach(quantized)
    assert torch.equal(_logits(quantized), before)


def test_describe_lists_every_site():
    _, compensation = _pair()
    rows = compensation.describe()
    assert len(rows) == 3 * 8
    assert {row["shape"][0] for row in rows} == {2}
    assert sum(row["bytes"] for row in rows) == compensation.nbytes
    assert all(dataclasses.is_dataclass(e) for e in compensation.errors.values())
