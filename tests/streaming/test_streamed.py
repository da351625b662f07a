"""Models that stay in their files: what they give, what is in memory, and what is refused."""

import copy

import pytest
import torch
from helpers.language import crudely_quantized, tiny_model, token_batches
from helpers.packed import packed_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation
from bc_plugin.models.blocks import find_blocks
from bc_plugin.models.modules import stored_tensors
from bc_plugin.models.offloaded import lent
from bc_plugin.vectors.joint import joint_linears, mark_joint
from bc_plugin.vectors.weights import weights_of

pytest.importorskip("accelerate")

from bc_plugin.streaming.errors import CannotStream
from bc_plugin.streaming.lending import Lending, RowsLending
from bc_plugin.streaming.load import open_streamed
from bc_plugin.streaming.packed import PackedLinear

# Widths that are whole words of any number of bits.
WIDE = {"intermediate_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 4}
FORMATS = {
    **{f"gptq-{bits}": {"bits": bits} for bits in (2, 3, 4, 8)},
    "gptq_v2": {"bits": 4, "checkpoint_format": "gptq_v2"},
    "awq": {"method": "awq"},
}
LISTS = ["model.layers"]


@torch.no_grad()
def logits(model):
    return model(**token_batches(1, seed=3)[0]).logits


def saved(folder, model, **options):
    """The model as ``from_pretrained`` has it."""
    model.save_pretrained(folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float model and one quantized to 4 bits, packed."""
    folder = tmp_path_factory.mktemp("streamed")
    model = tiny_model(**WIDE)
    model.save_pretrained(folder / "float")
    packed_checkpoint(folder / "packed", copy.deepcopy(model))
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_it_gives_what_the_loaded_model_gives(tmp_path, tied, dtype, size):
    model = saved(tmp_path, tiny_model(tie_word_embeddings=tied).to(dtype), max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "20KB")
    assert torch.equal(logits(open_streamed(tmp_path)), logits(model))
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logits(open_streamed(tmp_path, "float64")), logits(wide))


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "gemma3_text", "bloom"])
def test_other_architectures(tmp_path, architecture):
    model = saved(tmp_path, tiny_model(architecture))
    assert torch.equal(logits(open_streamed(tmp_path)), logits(model))


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_vectors_are_those_of_loaded_models(tmp_path, dtype, size):
    model = tiny_model().to(dtype)
    names = tmp_path / "quantized", tmp_path / "float"
    pair = crudely_quantized(model), model
    loaded = [saved(n, m, max_shard_size=size) for n, m in zip(names, pair, strict=True)]
    expected = bc_plugin.compensate(*loaded, token_batches())
    found = bc_plugin.compensate(*names, token_batches())
    assert found.vectors.keys() == expected.vectors.keys()
    # The same operations on the same numbers, so nothing is rounded otherwise.
    assert all(torch.equal(found.vectors[n], v) for n, v in expected.vectors.items())
    assert (found.digest, found.float_weights) == (expected.digest, expected.float_weights)
    found.attach(loaded[0])


def test_activations_in_files_change_no_bit(folders):
    names = folders / "packed", folders / "float"
    expected = bc_plugin.compensate(*names, token_batches())
    found = bc_plugin.compensate(*names, token_batches(), {"offload_activations": True})
    assert all(torch.equal(found.vectors[n], v) for n, v in expected.vectors.items())


def test_vectors_in_place_do_what_they_do_in_loaded_models(tmp_path):
    model = tiny_model()
    crudely_quantized(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    compensation = bc_plugin.compensate(loaded, model, token_batches(), {"positions": 1})
    streamed = open_streamed(tmp_path)
    plain = logits(streamed)
    for each in (loaded, streamed):
        compensation.attach(each)
    torch.testing.assert_close(logits(streamed), logits(loaded))
    assert not torch.equal(logits(streamed), plain)
    compensation.detach(streamed)
    assert torch.equal(logits(streamed), plain)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed_weights_mean_what_they_meant_before(tmp_path, kind, dtype):
    before = packed_checkpoint(tmp_path, tiny_model(**WIDE).to(dtype), **FORMATS[kind])
    streamed = open_streamed(tmp_path)
    for name in find_blocks(streamed).names:
        with lent(streamed, name):
            for path, linear in streamed.get_submodule(name).named_modules():
                if isinstance(linear, PackedLinear):
                    weight = before.get_submodule(f"{name}.{path}").weight
                    # Unit vectors pick columns, and nothing else is added to them.
                    units = torch.eye(linear.in_features, dtype=dtype)
                    assert torch.equal(linear(units), weight.T)


def test_a_packed_weight_is_made_in_parts(folders, monkeypatch):
    streamed, name = open_streamed(folders / "packed"), "model.layers.0"
    linear, inputs = streamed.get_submodule(f"{name}.mlp.up_proj"), torch.randn(3, 5, 32)
    with lent(streamed, name):
        whole = linear(inputs)
        monkeypatch.setattr("bc_plugin.models.packed.AT_ONCE", 1)
        torch.testing.assert_close(linear(inputs), whole)


def test_one_block_of_each_model_is_in_memory(folders, monkeypatch):
    """Bytes are counted whenever weights are filled in: at no other time do they grow."""
    largest, fill = {}, Lending._fill
    models = []

    def held(model):
        tensors = (t for n, t in stored_tensors(model) if n.startswith("model.layers."))
        return sum(t.nbytes for t in tensors if not t.is_meta)

    def counted(self, module):
        given = fill(self, module)
        for model in models:
            largest[id(model)] = max(largest.get(id(model), 0), held(model))
        return given

    models += [open_streamed(folders / name) for name in ("packed", "float")]
    monkeypatch.setattr(Lending, "_fill", counted)
    bc_plugin.compensate(*models, token_batches())
    for model in models:
        block = sum(t.nbytes for _, t in stored_tensors(model.get_submodule("model.layers.0")))
        assert largest[id(model)] == block
        assert held(model) == 0
        assert model.lm_head.weight.is_meta and model.model.embed_tokens.weight.is_meta


def test_a_lent_block_is_read_once(folders, monkeypatch):
    reads, fill = [], Lending._fill
    monkeypatch.setattr(Lending, "_fill", lambda s, m: reads.append(m) or fill(s, m))
    quantized = open_streamed(folders / "packed")
    bc_plugin.compensate(quantized, folders / "float", token_batches(12), {"batch_tokens": 16})
    for name in find_blocks(quantized).names:
        assert reads.count(quantized.get_submodule(name)) == 1


def test_only_rows_that_are_looked_up_are_read(folders, monkeypatch):
    model, lent_rows = open_streamed(folders / "float"), []
    before = RowsLending.post_forward

    def observed(self, module, output):
        lent_rows.append(len(module.weight))
        return before(self, module, output)

    monkeypatch.setattr(RowsLending, "post_forward", observed)
    batch = token_batches(1)[0]
    logits(model)
    with torch.no_grad():
        model(**batch)
    assert lent_rows[-1] == len(batch["input_ids"].unique()) < model.config.vocab_size


def test_changes_stay(folders):
    model, name = open_streamed(folders / "packed"), "model.layers.0"
    before = weights_of(model, LISTS)
    with lent(model, name):
        model.get_submodule(f"{name}.mlp.up_proj").scales.mul_(2)
    changed = weights_of(model, LISTS)
    assert changed.digest == before.digest  # of integers
    assert changed.float_weights[0] != before.float_weights[0]
    assert changed.float_weights[1:] == before.float_weights[1:]
    assert weights_of(open_streamed(folders / "packed"), LISTS) == before  # the files are as before


def test_scales_are_kept_and_of_a_folder_refused(folders):
    names = folders / "packed", folders / "float"
    config = {"scales": True}
    with pytest.raises(BiasCompensationError, match="compensate --scales"):
        bc_plugin.compensate(*names, token_batches(), config)
    quantized = open_streamed(names[0])
    before = weights_of(quantized, LISTS)
    found = bc_plugin.compensate(quantized, names[1], token_batches(), config)
    assert found.scales and found.digest == before.digest
    assert all(a != b for a, b in zip(found.float_weights, before.float_weights, strict=True))
    assert weights_of(quantized, LISTS).float_weights == found.float_weights


def test_scales_are_as_they_were_after_an_error(folders, monkeypatch):
    quantized = open_streamed(folders / "packed")
    before = weights_of(quantized, LISTS)

    def broken(*_):
        raise RuntimeError

    monkeypatch.setattr("bc_plugin.shift.fitting.FittedWeights.conclude", broken)
    with pytest.raises(RuntimeError):
        bc_plugin.compensate(quantized, folders / "float", token_batches(), {"scales": True})
    assert weights_of(quantized, LISTS) == before


def test_joint_weights_are_known_as_such(tmp_path):
    model = tiny_model()
    quantized = crudely_quantized(model)
    linears = [n for n, m in quantized.named_modules() if isinstance(m, nn.Linear)]
    mark_joint(quantized, [name for name in linears if name != "lm_head"])
    bc_plugin.enable("transformers")
    try:
        bc_plugin.compensate(quantized, model, token_batches()).attach(quantized)
        quantized.save_pretrained(tmp_path)
    finally:
        bc_plugin.disable()
    assert Compensation.load(tmp_path).joint
    assert joint_linears(open_streamed(tmp_path)) == joint_linears(quantized)


def _without(folder, out, name, value=None):
    """A copy whose file has another tensor of a name, or none."""
    out.mkdir()
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: t for n, t in tensors.items() if n != name}
    if value is not None:
        tensors[name] = value
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((folder / "config.json").read_text())
    return out


@pytest.mark.parametrize(
    ("which", "name"),
    [
        ("float", "model.layers.1.mlp.up_proj.weight"),
        ("float", "model.norm.weight"),
        ("packed", "model.layers.1.mlp.up_proj.scales"),
        ("packed", "model.layers.1.mlp.up_proj.g_idx"),
    ],
)
def test_a_missing_tensor_is_named(folders, tmp_path, which, name):
    damaged = _without(folders / which, tmp_path / "damaged", name)
    with pytest.raises(BiasCompensationError, match=f"model.safetensors.*{name}"):
        open_streamed(damaged)


def test_a_tensor_of_another_shape_is_named(folders, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    damaged = _without(folders / "float", tmp_path / "damaged", name, torch.zeros(3, 4))
    with pytest.raises(BiasCompensationError, match=f"model.safetensors.*{name}.*\\(3, 4\\)"):
        open_streamed(damaged)


def test_a_file_that_is_cut_off_is_named(folders, tmp_path):
    damaged = _without(folders / "float", tmp_path / "damaged", None)
    file = damaged / "model.safetensors"
    whole = file.read_bytes()
    model = open_streamed(damaged)
    file.write_bytes(whole[:5000])
    with pytest.raises(BiasCompensationError, match=r"model\.safetensors.*cannot be read"):
        open_streamed(damaged)
    expected = r"model\.safetensors: its tensor .*layers\.0"
    with pytest.raises(BiasCompensationError, match=expected), lent(model, "model.layers.0"):
        pass


def test_what_is_unknown_is_to_be_loaded_whole(folders, tmp_path):
    other = _without(folders / "packed", tmp_path / "other", None)
    config = other / "config.json"
    config.write_text(config.read_text().replace('"gptq"', '"bitsandbytes"'))
    with pytest.raises(CannotStream, match="from_pretrained"):
        open_streamed(other)
    name = "model.norm.weight"
    renamed = _without(folders / "float", tmp_path / "renamed", name)
    tensors = load_file(renamed / "model.safetensors") | {"other": torch.zeros(1)}
    save_file(tensors, renamed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CannotStream, match=name):
        open_streamed(renamed)
