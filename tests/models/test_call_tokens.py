"""Sites that give other tokens than the call's own: those of a cache, or the last ones alone."""

import pytest
import torch
from helpers.language import VOCABULARY, crudely_quantized, tiny_model, token_batches
from helpers.vectors import compensated
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig

import bc_plugin
from bc_plugin import BiasCompensationError

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4}
LATENT = {
    **{"intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 4},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    **{"v_head_dim": 8, "head_dim": 8, "first_k_dense_replace": 2, "pad_token_id": 0},
}
# The last two layers attend to keys of the first three, so of a prompt they run the last token.
SHARED = {
    **{"intermediate_size": 48, "num_hidden_layers": 5, "num_key_value_heads": 2, "head_dim": 8},
    **{"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "sliding_window": 8},
    "layer_types": ["full_attention" if i in (1, 4) else "sliding_attention" for i in range(5)],
    **{"vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 8, "pad_token_id": 0},
}
MODELS = {"deepseek_v3": LATENT, "gemma4_text": SHARED}


def random_model(kind, settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "norm" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_decoding_equals_prefill(kind, positions, cache):
    model = compensated(random_model(kind, MODELS[kind]), positions=positions)
    ids, mask = (torch.cat(t) for t in zip(*map(_padded, (0, 2)), strict=True))
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    out = model.generate(
        ids,
        attention_mask=mask,
        cache_implementation=cache,
        disable_compile=True,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    for row, pad in enumerate((0, 2)):
        with torch.no_grad():
            whole = model(out.sequences[row : row + 1, pad:]).logits[0, 8 - pad : -1]
        step_by_step = torch.stack(out.logits, 1)[row]
        torch.testing.assert_close(step_by_step, whole, rtol=1e-3, atol=1e-3)


def _padded(pad):
    ids = token_batches(1, length=9, seed=1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    ids[:, :pad] = mask[:, :pad] = 0
    return ids, mask


def test_continuous_batching_equals_generate():
    model = compensated(tiny_model())
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    prompts = [token_batches(1, length=n, seed=n)[0]["input_ids"] for n in (14, 7)]
    alone = {
        tuple(ids[0].tolist()): model.generate(ids, **settings)[0, ids.shape[1] :].tolist()
        for ids in prompts
    }
    config = GenerationConfig(**settings, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch([ids[0].tolist() for ids in prompts], generation_config=config)
    for answer in found.values():
        assert answer.generated_tokens == alone[tuple(answer.prompt_ids)]


def test_the_cache_of_several_sequences_is_not_taken_for_that_of_one():
    model = compensated(random_model("deepseek_v3", LATENT))
    ids, cache = token_batches(1, length=9)[0]["input_ids"], DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(BiasCompensationError, match="a site gives tokens of shape"):
            model(
                ids[:, :1],
                past_key_values=cache,
                position_ids=torch.tensor([[9]]),
                cu_seq_lens_q=torch.tensor([0, 1]),
            )


def test_fewer_tokens_than_asked_for_are_refused():
    model = compensated(random_model("gemma4_text", SHARED))
    layer = model.model.layers[4].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: (args[0][:, -2:],))
    ids = token_batches(1)[0]["input_ids"]
    with pytest.raises(BiasCompensationError, match="a site gives tokens of shape"):
        model(ids, logits_to_keep=3)


def test_blocks_that_return_lists():
    float_model = random_model("openai-gpt", {"n_layer": 3, "n_head": 4, "n_embd": 32})
    model = compensated(float_model, positions=1)
    plain = crudely_quantized(float_model)
    ids = token_batches(1)[0]["input_ids"]
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, plain(ids).logits)


def test_several_streams_are_refused_by_name():
    settings = {
        **{"attn_layers": ["local", "local"], "axial_pos_embds": False, "is_decoder": True},
        **{"feed_forward_size": 48, "attention_head_size": 8, "local_attn_chunk_length": 8},
    }
    model = random_model("reformer", settings)
    with pytest.raises(BiasCompensationError, match="'prev_attn_output' before its hidden states"):
        bc_plugin.compensate(crudely_quantized(model), model, token_batches(length=8), {})


def test_time_first_is_refused_with_positions():
    settings = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    model = random_model("xlnet", settings)
    quantized, alone = crudely_quantized(model), {"held_out": 0, "batch_tokens": 1}
    with pytest.raises(BiasCompensationError, match=r"Compensate with positions=0"):
        bc_plugin.compensate(quantized, model, token_batches(), alone)
    bc_plugin.compensate(quantized, model, token_batches(), {**alone, "positions": 0})
