"""A compensated model gives the same logits however it is run."""

import copy
import io

import pytest
import torch
from helpers.images import inputs, tiny
from helpers.language import ARCHITECTURES, crudely_quantized, tiny_model, token_batches

import bc_plugin
from bc_plugin.models.blocks import find_blocks

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
ROTARY = [name for name in ARCHITECTURES if name not in ("opt", "bloom", "gpt2")]


def _compensated(architecture="llama", positions=2, **changes):
    model = tiny_model(architecture, **changes)
    quantized = crudely_quantized(model)
    config = {"positions": positions, "held_out": 0}
    compensation = bc_plugin.compensate(quantized, model, token_batches(), config)
    # Make leading positions matter a lot, so that a token in the wrong row is seen.
    for vectors in compensation.vectors.values():
        vectors[:-1] += 0.5 * torch.randn(vectors[:-1].shape).to(vectors.dtype)
    compensation.attach(quantized)
    return quantized


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("positions", [0, 1, 3, "all"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_step_by_step_decoding_equals_one_forward(architecture, positions):
    model = _compensated(architecture, positions)
    ids = token_batches(1, length=20, seed=1)[0]["input_ids"]
    whole = model(ids).logits
    cache, steps = None, []
    for piece in (ids[:, :1], ids[:, 1:2], ids[:, 2:6], *ids[:, 6:].split(1, dim=1)):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_equals_one_forward(architecture, implementation):
    model = _compensated(architecture)
    if implementation == "static" and not model._can_compile_fullgraph:
        pytest.skip(f"transformers has no static cache for {architecture}")
    batch = token_batches(1, length=9, seed=1)[0]
    out = model.generate(
        **batch,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        cache_implementation=implementation,
        output_logits=True,
        return_dict_in_generate=True,
    )
    whole = model(out.sequences).logits[:, 8:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_padded_row_gets_the_logits_it_has_alone(architecture, side):
    model = _compensated(architecture)
    ids = token_batches(1, length=9, seed=1)[0]["input_ids"]
    gap = (4, 0) if side == "left" else (0, 4)
    mask = torch.nn.functional.pad(torch.ones_like(ids), gap)
    inputs = {"input_ids": torch.nn.functional.pad(ids, gap), "attention_mask": mask}
    if architecture in (*ROTARY, "gpt2"):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    alone = model(ids).logits
    padded = model(**inputs).logits[mask.bool()][None]
    torch.testing.assert_close(padded, alone, **CLOSE)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama", "gemma3_text"])
def test_unequal_prompts_in_a_batch_generate_what_they_do_alone(
    architecture, beams, implementation
):
    model = _compensated(architecture)
    prompts = [
        b["input_ids"][:, :n] for b, n in zip(token_batches(3, seed=1), (9, 5, 7), strict=True)
    ]
    settings = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "num_beams": beams,
        "cache_implementation": implementation,
    }
    alone = [
        model.generate(p, attention_mask=torch.ones_like(p), **settings)[0, p.shape[1] :]
        for p in prompts
    ]
    pad = torch.nn.functional.pad
    ids = torch.cat([pad(p, (9 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([pad(torch.ones_like(p), (9 - p.shape[1], 0)) for p in prompts])
    together = model.generate(ids, attention_mask=mask, **settings)[:, 9:]
    assert together.tolist() == [row.tolist() for row in alone]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text"])
def test_packed_sequences_get_the_logits_they_have_alone(architecture):
    model = _compensated(architecture)
    first, second = (b["input_ids"] for b in token_batches(2, length=7, seed=1))
    positions = torch.arange(7).repeat(2)[None]
    packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(first).logits, model(second).logits], 1)
    torch.testing.assert_close(packed, apart, **CLOSE)


def test_embeddings_instead_of_ids():
    model = _compensated()
    ids = token_batches(1)[0]["input_ids"]
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(embedded, model(ids).logits, **CLOSE)


def test_hidden_states_that_are_asked_for_are_compensated():
    model = _compensated()
    ids = token_batches(1)[0]["input_ids"]
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    states = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(states[1], seen[0])


def test_gradient_checkpointing_gives_the_same_gradients():
    model = _compensated()
    batch = token_batches(1)[0]
    gradients = []
    for checkpointed in (False, True):
        twin = copy.deepcopy(model).train()
        if checkpointed:
            twin.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.enable_grad():
            twin(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        gradients.append(twin.model.embed_tokens.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_copied_and_a_pickled_model_stay_compensated():
    model = _compensated()
    batch = token_batches(1, length=5)[0]
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    expected = model(**batch).logits
    # The copy follows its own position tracker, not the original's.
    model(**token_batches(1, length=9)[0])
    assert torch.equal(twin(**batch).logits, expected)
    assert torch.equal(loaded(**batch).logits, expected)


@pytest.mark.parametrize("positions", [0, 1])
def test_compiled_models_give_the_same_logits(monkeypatch, positions):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # as the integration tests set it
    model = _compensated(positions=positions, num_hidden_layers=1)
    ids = token_batches(1)[0]["input_ids"]
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, **CLOSE)


def test_nothing_assumes_token_ids():
    model = tiny("vit").double()
    quantized = crudely_quantized(model)
    quantized.vit.embeddings = model.vit.embeddings  # so that the first blocks see the same
    images = [{"pixel_values": batch["pixel_values"].double()} for batch in inputs("vit", 6)]
    config = {"positions": 1, "held_out": 0, "dtype": "float64"}
    compensation = bc_plugin.compensate(quantized, model, images, config)
    compensation.attach(quantized)
    first = find_blocks(model).names[0]
    outputs = []
    for either in (model, quantized):
        either.get_submodule(first).register_forward_hook(lambda m, a, out: outputs.append(out))
    for batch in images:
        model(**batch)
        quantized(**batch)
    pairs = zip(outputs[::2], outputs[1::2], strict=True)
    measured = torch.stack([(a - b).square().mean() for a, b in pairs]).mean().item()
    assert measured == pytest.approx(compensation.errors[first].after, rel=1e-9)
