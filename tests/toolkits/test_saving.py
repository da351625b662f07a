"""What is attached is what is saved, and what is loaded: of models that no toolkit quantized."""

import json

import pytest
import torch
from helpers.deepstack import with_deepstack, with_images
from helpers.language import crudely_quantized, tiny_model
from helpers.vectors import compensated, logits
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.core_model_loading import WeightRenaming

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation
from bc_plugin.names import KEY


@pytest.fixture(autouse=True)
def _enabled():
    bc_plugin.enable("transformers")
    yield
    bc_plugin.disable()


@pytest.fixture
def model():
    return compensated(tiny_model())


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "40KB"}])
def test_a_model_without_quantization_config(tmp_path, model, shards):
    model.save_pretrained(tmp_path, **shards)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    load(tmp_path).save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("content", ["null", "3"])
def test_a_config_that_is_no_object_is_told_where_there_are_vectors(tmp_path, model, content):
    model.save_pretrained(tmp_path / "ours")
    tiny_model().save_pretrained(tmp_path / "plain")
    for folder in ("ours", "plain"):
        (tmp_path / folder / "config.json").write_text(content)
    with pytest.raises(BiasCompensationError, match=r"ours/config\.json holds no JSON object"):
        load(tmp_path / "ours")
    with pytest.raises(TypeError):  # transformers' own
        load(tmp_path / "plain")


def test_detached_is_saved_without(tmp_path, model):
    Compensation.attached_to(model).detach(model)
    model.save_pretrained(tmp_path)
    assert KEY not in json.loads((tmp_path / "config.json").read_text())
    loaded = load(tmp_path)
    assert Compensation.attached_to(loaded) is None
    assert torch.equal(logits(loaded), logits(model))


def test_saved_as_a_base_model_and_loaded_with_a_head(tmp_path, model):
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    base.save_pretrained(tmp_path / "base")
    loaded = load(tmp_path / "base")
    found = Compensation.attached_to(loaded).vectors
    assert found.keys() == Compensation.attached_to(model).vectors.keys()


@pytest.mark.parametrize("first", ["one file", "shards"])
def test_no_file_of_another_save_is_left_to_be_loaded(tmp_path, model, first):
    saves = [{}, {"max_shard_size": "40KB"}]
    other = compensated(tiny_model(seed=1))
    for saved, shards in zip(
        (other, model), saves[:: 1 if first == "one file" else -1], strict=True
    ):
        saved.save_pretrained(tmp_path, **shards)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_config_and_weights_of_two_saves_are_refused(tmp_path, model):
    model.save_pretrained(tmp_path)
    vectors = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if KEY in k}
    compensated(tiny_model(seed=1)).save_pretrained(tmp_path / "other")
    others = load_file(tmp_path / "other" / "model.safetensors")
    save_file({**others, **vectors}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BiasCompensationError, match=r"weights in .* are not those"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["norm.weight", "embed_tokens.weight", "down_proj.weight"])
def test_a_changed_weight_is_refused(tmp_path, model, name):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(name))
    tensors[key].view(-1)[3] *= 1.01
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BiasCompensationError, match=r"model.safetensors are not those"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name", ["bias_compensation.safetensors", "other.safetensors", "training_args.bin"]
)
def test_files_that_the_loader_does_not_read_do_not_count(tmp_path, model, name):
    model.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"broken")
    assert torch.equal(logits(load(tmp_path)), logits(model))
    assert (
        Compensation.load(tmp_path).vectors.keys() == Compensation.attached_to(model).vectors.keys()
    )


def test_an_older_file_of_vectors_does_not_win(tmp_path, model):
    own = Compensation.attached_to(model)
    own.replaced(vectors={name: -v for name, v in own.vectors.items()}).save(tmp_path)
    model.save_pretrained(tmp_path)
    found = Compensation.load(tmp_path).vectors
    assert all(torch.equal(found[name], vectors) for name, vectors in own.vectors.items())


def test_vectors_beside_a_plain_checkpoint(tmp_path, model):
    expected = logits(model)
    compensation = Compensation.attached_to(model)
    compensation.detach(model)
    model.save_pretrained(tmp_path)
    compensation.save(tmp_path)
    loaded = load(tmp_path)
    assert Compensation.attached_to(loaded) is None
    Compensation.load(tmp_path).attach(loaded)
    assert torch.equal(logits(loaded), expected)


def test_names_that_transformers_changes_on_saving(tmp_path):
    """Of a text model within a vision-language model, which has other names in files."""
    model = with_deepstack().float()
    batches = [
        {name: v.float() if v.is_floating_point() else v for name, v in batch.items()}
        for batch in with_images()
    ]
    quantized = crudely_quantized(model)
    settings = {"blocks": "model.language_model.layers"}
    compensation = bc_plugin.compensate(quantized, model, batches, settings)
    compensation.attach(quantized)
    quantized._weight_conversions = [
        WeightRenaming("^language_model.model", "model.language_model")
    ]
    quantized.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("language_model.model") for name in saved)
    loaded = type(model).from_pretrained(
        tmp_path, key_mapping={"^language_model.model": "model.language_model"}
    )
    with torch.no_grad():
        assert torch.equal(loaded(**batches[0]).logits, quantized(**batches[0]).logits)


def test_vectors_in_a_folder_of_their_own(tmp_path, model):
    compensation = Compensation.attached_to(model)
    compensation.save(tmp_path / "new")
    assert Compensation.load(tmp_path / "new").entry() == compensation.entry()
