"""llm-compressor: ``BiasCompensationModifier`` in its recipes."""

import json
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch

pytest.importorskip("llmcompressor", reason="needs llm-compressor")

from datasets import Dataset
from helpers.examples import check_python
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import AWQModifier, SmoothQuantModifier
from rig.cpu_shims import llmcompressor_awq_on_cpu
from rig.subjects.tiny import logits, sequences, tiny_checkpoint, tiny_tokenizer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import bc_plugin
from bc_plugin import BiasCompensationConfig, BiasCompensationError, Compensation
from bc_plugin.llmcompressor import BiasCompensationModifier

PIPELINES = ("independent", "sequential", "basic")


def _scheme(bits=4, symmetric=True, group=32):
    weights = {"num_bits": bits, "group_size": group, "symmetric": symmetric, "strategy": "group"}
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


def _gptq(bits=3):
    return [GPTQModifier(config_groups=_scheme(bits), ignore=["lm_head"])]


def _nearest(bits=4, symmetric=True):
    return [QuantizationModifier(config_groups=_scheme(bits, symmetric), ignore=["lm_head"])]


def _w8a8():
    return [QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]


def _awq():
    return [AWQModifier(n_grid=4), *_nearest(3, symmetric=False)]


def _autoround():
    return [AutoRoundModifier(config_groups=_scheme(3), ignore=["lm_head"], iters=4)]


RECIPES = {
    "GPTQ": _gptq,
    "nearest": _nearest,
    "nearest, asymmetric": lambda: _nearest(symmetric=False),
    "W8A8": _w8a8,
    "AWQ": _awq,
    "AutoRound": _autoround,
}


@pytest.fixture(autouse=True)
def _on_cpu():
    with llmcompressor_awq_on_cpu():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "float")


def _run(source, recipe, pipeline="independent", data=True, model=None, **settings):
    model = AutoModelForCausalLM.from_pretrained(source) if model is None else model
    rows = [{key: value[0].tolist() for key, value in item.items()} for item in sequences()]
    return oneshot(
        model=model,
        dataset=Dataset.from_list(rows) if data else None,
        tokenizer=tiny_tokenizer(),
        recipe=recipe,
        pipeline=pipeline,
        **{"shuffle_calibration_samples": False} | settings,
    )


def _float(source):
    return AutoModelForCausalLM.from_pretrained(source)


def _distance(model, source):
    """From the float model, on the calibration data: of random tokens, others tell nothing."""
    ids = torch.cat([item["input_ids"] for item in sequences()])
    with torch.no_grad():
        given, wanted = (each(input_ids=ids).logits for each in (model, _float(source)))
    return float((given - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("recipe", ("GPTQ", "nearest, asymmetric", "W8A8", "AutoRound"))
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_vectors_are_those_computed_by_hand(source, tmp_path, recipe, pipeline):
    if (recipe, pipeline) == ("AutoRound", "basic"):
        pytest.skip("it takes one block at a time")
    make = RECIPES[recipe]
    _run(source, make(), pipeline).save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    by_hand = bc_plugin.compensate(plain, _float(source), sequences())
    model = _run(source, [*make(), BiasCompensationModifier(joint=False)], pipeline)
    compensation = Compensation.attached_to(model)
    assert compensation.vectors.keys() == by_hand.vectors.keys()
    assert len(compensation.vectors) == 2 * 8
    for name, vectors in by_hand.vectors.items():
        torch.testing.assert_close(compensation.vectors[name], vectors)
    assert compensation.digest == by_hand.digest


@pytest.mark.parametrize("recipe", ("nearest", "AutoRound"))
def test_it_warns_after_autoround(source, recipe):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _run(source, [*RECIPES[recipe](), BiasCompensationModifier()])
    told = [each for each in caught if "AutoRound quantizes" in str(each.message)]
    assert len(told) == (recipe == "AutoRound")


@pytest.mark.parametrize("first", ("saved", "run"))
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_error_falls_and_what_is_saved_gives_the_same(source, tmp_path, enabled, recipe, first):
    make = RECIPES[recipe]
    plain = _distance(_run(source, make()), source)
    model = _run(source, [*make(), BiasCompensationModifier(held_out=0)])
    compensation = Compensation.attached_to(model)
    assert all(errors.after <= errors.before for errors in compensation.errors.values())
    if first == "run":  # which decompresses the weights
        assert _distance(model, source) < plain
    model.save_pretrained(tmp_path / "out", save_compressed=True)
    assert _distance(model, source) < plain
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert Compensation.attached_to(loaded).digest == compensation.digest
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_of_awq_only_linears_that_feed_no_rescaled_one_are_left_out(source):
    model = _run(source, [*_awq(), BiasCompensationModifier(held_out=0)])
    sites = {name.rpartition(".")[2] for name in Compensation.attached_to(model).vectors}
    # v_proj has fewer features than o_proj, so AWQ rescales those of up_proj alone.
    assert sites == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "0", "1"}


def test_without_joint_the_quantizer_does_what_it_would_do(source):
    models = []
    for modifiers in ([], [BiasCompensationModifier(joint=False)]):
        torch.manual_seed(3)
        settings = {"shuffle_calibration_samples": True, "num_calibration_samples": 4}
        models.append(_run(source, [*_gptq(), *modifiers], **settings))
        logits(models[-1])
    for name, weight in models[0].named_parameters():
        if name.endswith("proj.weight"):
            torch.testing.assert_close(models[1].get_parameter(name), weight, rtol=0, atol=1e-6)


def test_bfloat16_and_8_bits_that_are_run_before_they_are_saved(source, tmp_path, enabled):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model = _run(source, [*_nearest(8, symmetric=False), BiasCompensationModifier()], model=model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(model), expected)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 2
    with pytest.raises(BiasCompensationError, match="this model's weights have"):
        model.save_pretrained(tmp_path / "changed")


@pytest.mark.parametrize("files", (True, False))
def test_a_float_model_that_was_changed_in_memory(source, tmp_path, files):
    def changed():
        model = _float(source)
        if not files:
            # The toolkit itself reads the config again, and refuses a model that has none.
            model.config.save_pretrained(tmp_path)
            model.config._name_or_path = model.name_or_path = str(tmp_path)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight *= 2
        return model

    model = _run(source, [*_nearest(), BiasCompensationModifier()], model=changed())
    found = Compensation.attached_to(model)
    found.detach(model)
    by_hand = bc_plugin.compensate(model, changed(), sequences())
    assert by_hand.vectors.keys() == found.vectors.keys()
    for name, vectors in by_hand.vectors.items():
        torch.testing.assert_close(found.vectors[name], vectors)


def test_the_float_weights_are_read_from_their_files_again(source):
    kept = []

    class Remembers(BiasCompensationModifier):
        def on_calibration_end(self, *args, **kwargs):
            kept.append(self._run.float_blocks)

    _run(source, [*_gptq(), Remembers()])
    copied = {name for name, key in kept[0].copies if key.endswith("proj.weight")}
    assert not copied
    assert len([key for _, key in kept[0].files if key.endswith("proj.weight")]) == 2 * 7


@pytest.mark.parametrize("recipe", ("GPTQ", "nearest"))
def test_batches_with_padding(source, recipe):
    batches = [torch.cat([item["input_ids"] for item in sequences()[n : n + 2]]) for n in (0, 2, 4)]
    masks = [torch.ones_like(batch) for batch in batches]
    for mask in masks:
        mask[0, :5] = 0
    items = [
        {"input_ids": batch, "attention_mask": mask}
        for batch, mask in zip(batches, masks, strict=True)
    ]
    loader = DataLoader(items, batch_size=None)
    model = oneshot(
        model=_float(source),
        dataset=loader,
        tokenizer=tiny_tokenizer(),
        recipe=[*RECIPES[recipe](), BiasCompensationModifier()],
    )
    found = Compensation.attached_to(model)
    found.detach(model)
    by_hand = bc_plugin.compensate(model, _float(source), items)
    assert by_hand.vectors.keys() == found.vectors.keys()
    for name, vectors in by_hand.vectors.items():
        torch.testing.assert_close(found.vectors[name], vectors)


def test_smoothquant_leaves_the_blocks(source):
    recipe = [SmoothQuantModifier(), *_w8a8(), BiasCompensationModifier(held_out=0)]
    with pytest.warns(UserWarning, match="Only outputs of blocks were compensated"):
        model = _run(source, recipe)
    compensation = Compensation.attached_to(model)
    assert set(compensation.vectors) == {"model.layers.0", "model.layers.1"}
    assert all(errors.after <= errors.before for errors in compensation.errors.values())


# Joint


@pytest.fixture(scope="module")
def source_with_a_mean(source, tmp_path_factory):
    model = _float(source)
    with torch.no_grad():
        model.model.embed_tokens.weight += torch.randn(128)
    folder = tmp_path_factory.mktemp("tiny") / "mean"
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("positions", (0, 1))
def test_joint_leaves_less_of_the_error(source_with_a_mean, pipeline, positions):
    """Of a linear whose mean shift is taken out, ``tr (W - Q) C (W - Q)^T`` is left."""
    reference = _float(source_with_a_mean)
    block = reference.model.layers[0]
    ids = torch.cat([item["input_ids"] for item in sequences()])
    with torch.no_grad():
        inputs = block.input_layernorm(reference.model.embed_tokens(ids))[:, positions:]
    covariance = torch.cov(inputs.flatten(0, 1).T.double(), correction=0)
    left = {}
    for joint in (False, True):
        modifier = BiasCompensationModifier(joint=joint, positions=positions)
        model = _run(source_with_a_mean, [*_gptq(), modifier], pipeline)
        assert Compensation.attached_to(model).joint is joint
        logits(model)  # decompresses it
        for name in ("q_proj", "k_proj", "v_proj"):
            path = f"self_attn.{name}.weight"
            shift = (block.get_parameter(path) - model.model.layers[0].get_parameter(path)).double()
            left[name, joint] = float(((shift @ covariance) * shift).sum())
    for name in ("q_proj", "k_proj", "v_proj"):
        assert left[name, True] < 0.9 * left[name, False]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_hessian_is_that_of_inputs_without_their_mean(
    source_with_a_mean, monkeypatch, pipeline
):
    found, plain = {}, GPTQModifier.compress_module_list

    def compress_module_list(gptq, module_list):
        modules = list(module_list)
        names = {gptq._module_names[module]: module for module in modules}
        found.update({name: gptq._hessians[module].clone() for name, module in names.items()})
        return plain(gptq, modules)

    monkeypatch.setattr(GPTQModifier, "compress_module_list", compress_module_list)
    _run(source_with_a_mean, [*_gptq(), BiasCompensationModifier(positions=0)], pipeline)
    reference = _float(source_with_a_mean).model
    ids = torch.cat([item["input_ids"] for item in sequences()])
    with torch.no_grad():
        inputs = reference.layers[0].input_layernorm(reference.embed_tokens(ids)).flatten(0, 1)
    centred = (inputs - inputs.mean(0)).double()
    expected = 2 * centred.T @ centred
    torch.testing.assert_close(
        found["model.layers.0.self_attn.q_proj"].double(), expected, rtol=1e-4, atol=1e-3
    )


def test_joint_weights_do_not_load_without_their_vectors(source, tmp_path):
    model = _run(source, [*_gptq(), BiasCompensationModifier(joint=True)])
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="only bc_plugin loads"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    bc_plugin.enable("transformers")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
        loaded.save_pretrained(tmp_path / "again")
    finally:
        bc_plugin.disable()
    with pytest.raises(ValueError, match="only bc_plugin loads"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def test_joint_where_it_cannot_be_honoured(source):
    with pytest.raises(BiasCompensationError, match=r"joint=True .* QuantizationModifier"):
        _run(source, [*_nearest(), BiasCompensationModifier(joint=True)])
    model = _run(source, [*_nearest(), BiasCompensationModifier()])
    assert not Compensation.attached_to(model).joint


def _functions():
    return [vars(GPTQModifier)[name] for name in ("calibrate_module", "compress_module_list")]


def _same(found, expected):  # of a wrapper and what it wraps, == says yes
    return all(a is b for a, b in zip(found, expected, strict=True))


def test_the_patches_are_undone(source):
    before = _functions()
    _run(source, [*_gptq(), BiasCompensationModifier()])
    assert _same(_functions(), before)
    with pytest.raises(BiasCompensationError):
        _run(source, [*_gptq(), BiasCompensationModifier(positions=100)])
    assert _same(_functions(), before)


# Settings and recipes


def test_the_settings_are_those_of_the_config():
    config, modifier = BiasCompensationConfig(), BiasCompensationModifier()
    for field in fields(config):
        if field.name != "joint":
            value = getattr(modifier, field.name)
            value = tuple(value) if isinstance(value, list) else value
            assert value == getattr(config, field.name)
    with pytest.raises(BiasCompensationError, match="positions=-1"):
        BiasCompensationModifier(positions=-1)


YAML = """
test_stage:
  quantization_modifiers:
    GPTQModifier:
      ignore: [lm_head]
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 3, group_size: 32, symmetric: true, strategy: group}
    BiasCompensationModifier:
      positions: 0
"""


def test_a_recipe_in_yaml(source, tmp_path):
    (tmp_path / "recipe.yaml").write_text(YAML)
    found = Compensation.attached_to(_run(source, str(tmp_path / "recipe.yaml")))
    modifier = BiasCompensationModifier(positions=0)
    expected = Compensation.attached_to(_run(source, [*_gptq(), modifier]))
    assert (found.positions, found.joint) == (0, True)
    assert found.vectors.keys() == expected.vectors.keys()
    for name, vectors in expected.vectors.items():
        assert torch.equal(found.vectors[name], vectors)


def test_the_recipe_that_is_saved_can_be_used_again(source, tmp_path):
    recipe = [
        QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        BiasCompensationModifier(positions=2, sites=["linear"]),
    ]
    first = _run(source, recipe)
    first.save_pretrained(tmp_path / "out")
    again = Compensation.attached_to(_run(source, str(tmp_path / "out" / "recipe.yaml")))
    assert again.entry() == Compensation.attached_to(first).entry()


def test_enable_makes_it_known_to_yaml(tmp_path):
    code = (
        "import bc_plugin; bc_plugin.enable()\n"
        "from llmcompressor.recipe import Recipe\n"
        f"recipe = Recipe.create_instance({YAML!r})\n"
        "print(type(recipe.modifiers[1]).__module__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split()[-1] == "bc_plugin.llmcompressor.modifier"


@pytest.mark.parametrize("what", ["scales", "integers"])
def test_what_is_fitted_and_refinement(source, what, tmp_path, enabled):
    plain = _run(source, [*_nearest(), BiasCompensationModifier(held_out=0)])
    settings = {"held_out": 0, what: True, "refine_steps": 8, "refine": "block"}
    model = _run(source, [*_nearest(), BiasCompensationModifier(**settings)])
    compensation = Compensation.attached_to(model)
    assert compensation.scales
    assert compensation.refined
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert _distance(model, source) < _distance(plain, source)


@pytest.mark.parametrize("recipe", ("GPTQ", "W8A8"))
def test_native(source, tmp_path, recipe):
    modifier = BiasCompensationModifier(positions=0, native=True)
    model = _run(source, [*RECIPES[recipe](), modifier])
    model.save_pretrained(tmp_path / "out")
    assert not bc_plugin.enabled()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert Compensation.attached_to(loaded) is None
    assert loaded.config.attention_bias
    assert loaded.config.mlp_bias
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(BiasCompensationError, match="positions=1; plain biases"):
        BiasCompensationModifier(native=True)


def test_the_page_says_what_works():
    page = Path(bc_plugin.__file__).parent.parent / "docs" / "toolkits.md"
    section = page.read_text(encoding="utf-8").partition("## llm-compressor")[2]
    check_python(section.partition("```python\n")[2].partition("```")[0])


# Errors


@pytest.mark.parametrize(
    ("recipe", "match"),
    (
        (lambda bc: [bc, *_gptq()], "comes after it; put BiasCompensationModifier last"),
        (lambda bc: [bc], "before it stands nothing"),
        (lambda bc: [SparseGPTModifier(sparsity=0.5), bc], "SparseGPTModifier, and sparsity"),
        (lambda bc: [QuantizationModifier(kv_cache_scheme=KV), bc], "quantizes no weights"),
    ),
)
def test_a_recipe_that_quantizes_nothing_before(source, recipe, match):
    with pytest.raises(BiasCompensationError, match=match):
        _run(source, recipe(BiasCompensationModifier()))


KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.mark.parametrize("pipeline", ("independent", "datafree"))
def test_no_calibration_data(source, pipeline):
    with pytest.raises(BiasCompensationError, match="pass a dataset"):
        _run(source, [*_nearest(), BiasCompensationModifier()], pipeline, data=False)


def test_a_model_that_is_compensated_already(source):
    model = _run(source, [*_nearest(), BiasCompensationModifier()])
    logits(model)  # compressed weights the quantizer itself would stumble over
    with pytest.raises(BiasCompensationError, match="compensated already"):
        _run(source, [*_nearest(), BiasCompensationModifier()], model=model)


@pytest.mark.parametrize("option", ({"save_compressed": False}, {"quantization_format": "dense"}))
def test_saving_otherwise_than_compressed(source, tmp_path, option):
    model = _run(source, [*_nearest(), BiasCompensationModifier()])
    with pytest.raises(BiasCompensationError, match=next(iter(option))):
        model.save_pretrained(tmp_path / "out", **option)


def test_a_run_that_fails_half_way_leaves_nothing_behind(source, monkeypatch):
    calls, plain = [], GPTQModifier.compress_modules

    def fails(gptq):
        calls.append(gptq)
        if len(calls) == 3:
            raise RuntimeError("half way")
        plain(gptq)

    before = _functions()
    monkeypatch.setattr(GPTQModifier, "compress_modules", fails)
    model = _float(source)
    with pytest.raises(RuntimeError, match="half way"):
        _run(source, [*_gptq(), BiasCompensationModifier()], model=model)
    reset_session()  # as the next recipe would
    assert _same(_functions(), before)
    assert Compensation.attached_to(model) is None
