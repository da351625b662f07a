"""What export makes of packed and fused linears, one at a time."""

import weakref
from functools import partial

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from bc_plugin.engines import plain
from bc_plugin.engines.as_llama import unfuse
from bc_plugin.engines.dequantize import dequantize
from bc_plugin.engines.plain import read_tensors, write_checkpoint
from bc_plugin.engines.widen import widen
from bc_plugin.models import packed
from bc_plugin.models.packed import integers_of, pack, packed_linears, weight_of
from bc_plugin.vectors.lazy import LazyTensor, Stored

INPUTS, OUTPUTS, GROUPS, LINEARS = 64, 160, 2, 5
FORMATS = [(bits, form) for bits in (2, 3, 4, 8) for form in ("gptq", "gptq_v2")] + [(4, "awq")]


def _words(*shape):
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).int()


def _settings(bits, form):
    if form == "awq":
        return {"quant_method": "awq", "bits": bits, "version": "gemm"}
    return {"quant_method": "gptq", "bits": bits, "format": form, "sym": True}


def _checkpoint(folder, bits, form):
    """Linears of random words, and an embedding."""
    torch.manual_seed(0)
    along = bits * OUTPUTS // 32
    shape = (INPUTS, along) if form == "awq" else (INPUTS * bits // 32, OUTPUTS)
    tensors = {"embed.weight": torch.randn(8, 4)}
    for number in range(LINEARS):
        name = f"layers.{number}.qkv"
        tensors |= {
            f"{name}.qweight": _words(*shape),
            f"{name}.qzeros": _words(GROUPS, along),
            f"{name}.scales": torch.rand(GROUPS, OUTPUTS).half(),
        }
        if form != "awq":
            tensors[f"{name}.g_idx"] = torch.randint(GROUPS, (INPUTS,)).int()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return tensors, _settings(bits, form)


def _written(folder, tensors):
    (folder / "out").mkdir()
    write_checkpoint(folder / "out", folder / "in", tensors, {})
    return load_file(folder / "out" / "model.safetensors")


@pytest.fixture(params=[1, 1 << 20], ids=["in parts", "at once"])
def at_once(request, monkeypatch):
    monkeypatch.setattr(packed, "AT_ONCE", request.param)


@pytest.fixture
def most_alive(monkeypatch):
    """The most bytes of tensors read from files that were there at once."""
    alive, most, read = [0], [0], Stored.read

    def gone(size):
        alive[0] -= size

    def counted(*args):
        tensor = read(*args)
        alive[0] += tensor.nbytes
        most[0] = max(most[0], alive[0])
        weakref.finalize(tensor, gone, tensor.nbytes)
        return tensor

    monkeypatch.setattr(Stored, "read", counted)
    return lambda: most[0]


def _require_one_at_a_time(most, tensors):
    one = sum(tensor.nbytes for name, tensor in tensors.items() if ".0." in name)
    assert 0 < most() <= one


@pytest.mark.parametrize(("bits", "form"), FORMATS)
def test_float_weights_are_those_of_the_whole_linear(tmp_path, bits, form, at_once, most_alive):
    tensors, settings = _checkpoint(tmp_path / "in", bits, form)
    lazy = read_tensors(tmp_path / "in")
    dequantize(lazy, settings, torch.bfloat16)
    found = _written(tmp_path, lazy)
    assert set(found) == {"embed.weight"} | {f"layers.{n}.qkv.weight" for n in range(LINEARS)}
    assert torch.equal(found["embed.weight"], tensors["embed.weight"])
    for name in packed_linears(tensors):
        expected = weight_of(tensors, name, settings).T.to(torch.bfloat16)
        assert torch.equal(found[f"{name}.weight"], expected)
    _require_one_at_a_time(most_alive, tensors)


@pytest.mark.parametrize(("bits", "form"), [(2, "gptq"), (3, "gptq"), (3, "gptq_v2")])
def test_widened_integers_are_those_of_the_whole_linear(tmp_path, bits, form, at_once, most_alive):
    tensors, settings = _checkpoint(tmp_path / "in", bits, form)
    lazy, wide = read_tensors(tmp_path / "in"), dict(settings)
    widen(lazy, wide)
    assert (wide["bits"], wide["format"]) == (4, "gptq")
    found = _written(tmp_path, lazy)
    assert found.keys() == tensors.keys()
    for name in packed_linears(tensors):
        values, zeros, groups = integers_of(tensors, name, settings)
        assert torch.equal(found[f"{name}.qweight"], pack(values - zeros[groups] + 8, 4, dim=0))
        assert torch.equal(found[f"{name}.qzeros"], pack(torch.full_like(zeros, 7), 4, dim=1))
        assert torch.equal(weight_of(found, name, wide), weight_of(tensors, name, settings))
    _require_one_at_a_time(most_alive, tensors)


@pytest.mark.parametrize(("bits", "form"), [(3, "gptq"), (4, "awq")])
def test_fused_linears_are_cut_and_then_made_floats(tmp_path, bits, form, most_alive):
    tensors, settings = _checkpoint(tmp_path / "in", bits, form)
    lazy, parts = read_tensors(tmp_path / "in"), {"q": 96, "k": 32, "v": 32}
    unfuse(lazy, {"qkv": parts}, "layers")
    dequantize(lazy, settings, torch.float32)
    found = _written(tmp_path, lazy)
    for number in range(LINEARS):
        whole = weight_of(tensors, f"layers.{number}.qkv", settings).T.float().split([96, 32, 32])
        for part, expected in zip(parts, whole, strict=True):
            assert torch.equal(found[f"layers.{number}.{part}.weight"], expected)
    _require_one_at_a_time(most_alive, tensors)


def test_nothing_is_read_of_what_stays(tmp_path, most_alive):
    tensors, _ = _checkpoint(tmp_path / "in", 4, "gptq")
    found = _written(tmp_path, read_tensors(tmp_path / "in"))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert most_alive() == 0


def test_shards_are_those_of_huggingface_hub(tmp_path, monkeypatch):
    tensors, _ = _checkpoint(tmp_path / "in", 4, "gptq")
    (tmp_path / "theirs").mkdir()
    huggingface_hub.save_torch_state_dict(
        dict(sorted(tensors.items())),
        tmp_path / "theirs",
        max_shard_size="10KB",
        metadata={"format": "pt"},
    )
    split = partial(huggingface_hub.split_torch_state_dict_into_shards, max_shard_size="10KB")
    monkeypatch.setattr(huggingface_hub, "split_torch_state_dict_into_shards", split)
    (tmp_path / "ours").mkdir()
    lazy = {name: LazyTensor.of(tensor) for name, tensor in sorted(tensors.items())}
    plain.write_checkpoint(tmp_path / "ours", tmp_path / "in", lazy, {})
    theirs = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert len(theirs) > 3
    assert sorted(path.name for path in (tmp_path / "ours").glob("model*")) == theirs
    for name in theirs:
        ours = tmp_path / "ours" / name
        if name.endswith(".json"):
            assert ours.read_text().strip() == (tmp_path / "theirs" / name).read_text().strip()
        else:
            first, second = load_file(ours), load_file(tmp_path / "theirs" / name)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)
