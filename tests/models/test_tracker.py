"""A token's row belongs to the call it is in, whoever runs what and when."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from helpers.language import VOCABULARY, tiny_model, token_batches
from helpers.vectors import compensated
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from bc_plugin import BiasCompensationError, Compensation

STATE_SPACE = {
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "rwkv": {"attention_hidden_size": 32},
}


def test_threads_do_not_see_each_others_calls():
    model = compensated(tiny_model())
    prompts = [token_batches(1, length=n, seed=n)[0]["input_ids"] for n in range(1, 9)]

    def logits(prompt):
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits)

    expected = [logits(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        for _ in range(6):
            for found, alone in zip(pool.map(logits, prompts), expected, strict=True):
                torch.testing.assert_close(found, alone)


def _gradient(model, ids, between=None):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    if between is not None:
        between()
    loss.backward()
    return model.model.embed_tokens.weight.grad


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensors", "reentrant"])
def test_another_forward_before_the_backward_changes_no_gradient(reentrant):
    model = compensated(tiny_model()).train()
    ids, other = (b["input_ids"] for b in token_batches(2, length=12, seed=3))
    expected = _gradient(copy.deepcopy(model), ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    def between():
        with torch.no_grad():
            model(input_ids=other[:, :5], use_cache=False)

    torch.testing.assert_close(_gradient(model, ids, between), expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensors", "reentrant"])
def test_blocks_that_somebody_else_checkpoints(reentrant):
    model = compensated(tiny_model()).train()
    ids = token_batches(1, length=12, seed=3)[0]["input_ids"]
    expected = _gradient(copy.deepcopy(model), ids)
    for block in model.model.layers:
        inside = block.forward

        def forward(hidden, *args, _inside=inside, **kwargs):
            run = partial(_inside, **kwargs)
            return checkpoint(run, hidden, *args, use_reentrant=reentrant)

        block.forward = forward
    found = _gradient(model, ids, lambda: model(input_ids=ids[:, :5], use_cache=False))
    torch.testing.assert_close(found, expected)


def test_what_is_run_outside_of_a_call_is_refused():
    model = compensated(tiny_model())
    linear = model.model.layers[0].mlp.up_proj
    with pytest.raises(BiasCompensationError, match="outside of the model's own forward"):
        linear(torch.zeros(1, 3, linear.in_features))
    with pytest.raises(BiasCompensationError, match="outside of the model's own forward"):
        model.model.layers[0].mlp(torch.zeros(1, 3, linear.in_features))


def test_a_call_that_fails_is_over():
    model = compensated(tiny_model())
    handle = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**token_batches(1)[0])
    handle.remove()
    with pytest.raises(BiasCompensationError, match="outside"):
        model.model.layers[0].mlp(torch.zeros(1, 3, 32))


@pytest.mark.parametrize("positions", [None, 0, 1], ids=["none", "0", "1"])
def test_compiling_gives_the_graphs_that_it_gives_without_vectors(monkeypatch, positions):
    # Where the integration tests run as well they have switched it off.
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    model = tiny_model(num_hidden_layers=2)
    if positions is not None:
        model = compensated(model, positions)
    ids = token_batches(1)[0]["input_ids"]
    torch.compiler.reset()
    counter = CompileCounter()
    with torch.no_grad():
        whole = torch.compile(model, backend=counter, fullgraph=True)
        torch.testing.assert_close(whole(ids, use_cache=False).logits, model(ids).logits)
    assert counter.frame_count == 1


def _replica(model):
    """What DataParallel makes of a module, but for the copies of its tensors."""
    twins = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in twins.items():
        twin._modules = {name: twins[child] for name, child in module._modules.items()}
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else 1.5 * parameter.detach())
    return twins[model]


def test_a_replica_runs_its_own_weights():
    model = compensated(tiny_model())
    batch = token_batches(1)[0]
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(1.5)
        torch.testing.assert_close(_replica(model)(**batch).logits, expected(**batch).logits)


@pytest.mark.parametrize("kind", STATE_SPACE)
def test_caches_without_a_length(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, **STATE_SPACE[kind]
    )
    float_model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in float_model.named_parameters():
        if parameter.dim() == 2 and "A_log" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model = compensated(float_model)
    ids = token_batches(1, length=9, seed=1)[0]["input_ids"]
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    out = model.generate(ids, output_logits=True, return_dict_in_generate=True, **settings)
    with torch.no_grad():
        whole = model(out.sequences).logits[:, 8:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=1e-3, atol=1e-3)
    Compensation.attached_to(model).detach(model)
    model = compensated(float_model, positions=2)
    with pytest.raises(BiasCompensationError, match="does not tell how many tokens"):
        model.generate(ids, **settings)


def test_a_mask_is_summed_up_as_numbers():
    model = compensated(tiny_model()).requires_grad_(False)
    batch = token_batches(1)[0]
    with torch.no_grad():
        graph = torch.jit.trace(
            lambda ids, mask: model(ids, attention_mask=mask, use_cache=False).logits,
            (batch["input_ids"], batch["attention_mask"]),
            check_trace=False,
        ).inlined_graph
    sums = [node.inputsAt(0) for node in graph.findAllNodes("aten::cumsum")]
    assert sums and not any("Bool" in str(value.type()) for value in sums)
