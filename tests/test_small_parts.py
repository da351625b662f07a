"""Config, site names, calibration data, evaluation and structure."""

import itertools
import math

import pytest
import torch
from models import crudely_quantized, tiny_model, token_batches
from torch import nn

import bc_plugin
from bc_plugin import BiasCompensationConfig, BiasCompensationError
from bc_plugin.calibration.batches import rebatch, split_held_out, spread
from bc_plugin.calibration.sample import sample_from
from bc_plugin.calibration.text import read_text, windows
from bc_plugin.models.blocks import find_blocks
from bc_plugin.vectors.short_names import collapse, expand

# Config


@pytest.mark.parametrize("value", [None, False])
def test_no_flag_means_no_config(value):
    assert BiasCompensationConfig.parse(value) is None


def test_a_config_survives_its_dict():
    config = BiasCompensationConfig(positions="all", sites="block", keep_only_if_better=True)
    assert BiasCompensationConfig.parse(config.to_dict()) == config
    assert BiasCompensationConfig.parse(True) == BiasCompensationConfig()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"positions": -1}, "positions=-1"),
        ({"positions": True}, "positions=True"),
        ({"positions": "some"}, "positions='some'"),
        ({"sites": ("attention",)}, "sites="),
        ({"sites": ()}, "sites="),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"held_out": 0, "keep_only_if_better": True}, "held_out=0"),
        ({"batch_tokens": 0}, "batch_tokens=0"),
        ({"max_tokens": "8192"}, "max_tokens='8192'"),
        ({"joint": "false"}, "joint='false'"),  # a string that would count as true
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"position": 1}, r"unknown keys \['position'\]"),
        ("yes", "of type str"),
    ],
)
def test_a_wrong_flag_is_refused(value, message):
    with pytest.raises(BiasCompensationError, match=message):
        BiasCompensationConfig.parse(value)


# Site names


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.0", "model.layers.1", "model.layers.2"],
        ["h.0.mlp", "h.2.mlp", "h.3.mlp", "h.10.mlp", "h.0", "h.10"],
        ["encoder", "decoder.block"],
        ["a.0.experts.1.up", "a.0.experts.2.up", "a.1.experts.1.up"],
        [],
    ],
)
def test_short_names_stand_for_all_names(names):
    groups = collapse(names)
    assert sorted(itertools.chain(*groups.values())) == sorted(names)
    for short, members in groups.items():
        assert expand(short) == members


def test_short_names_are_short():
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(30) if i != 7]
    assert list(collapse(names)) == ["model.layers.[0-6,8-29].mlp.down_proj"]


# Calibration data


class _Tokenizer:
    """One token for each letter, and nothing around them."""

    all_special_ids = (0, 1, 2)

    def __call__(self, text, return_tensors=None, **kwargs):
        ids = [ord(c) for c in text]
        return {"input_ids": ids if return_tensors is None else torch.tensor([ids])}


def test_windows_follow_each_other():
    found = windows("abcdefgh", _Tokenizer(), length=3, skip=1)
    assert [w["input_ids"].tolist() for w in found] == [[[100, 101, 102]]]
    assert found[0]["attention_mask"].tolist() == [[1, 1, 1]]


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(BiasCompensationError, match="2 tokens"):
        windows("ab", _Tokenizer(), length=3)


def test_text_is_read_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_text(str(tmp_path / "a.txt")) == "one\ntwo"
    assert read_text(str(tmp_path / "b.jsonl")) == "one\n\ntwo"
    with pytest.raises(BiasCompensationError, match="neither a file nor"):
        read_text(str(tmp_path / "c.txt"))


def test_calibration_data_that_the_model_writes_itself():
    model, tokenizer = tiny_model(), _Tokenizer()
    found = sample_from(model, tokenizer, length=12, count=5, batch=2)
    again = sample_from(model, tokenizer, length=12, count=5, batch=2)
    other = sample_from(model, tokenizer, length=12, count=5, batch=2, seed=1)
    assert [item["input_ids"].shape for item in found] == [(1, 12)] * 5
    assert all(item["attention_mask"].all() for item in found)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, again, strict=True)
    )
    assert not torch.equal(found[0]["input_ids"], other[0]["input_ids"])
    assert len({tuple(item["input_ids"][0].tolist()) for item in found}) == 5
    assert all(item["input_ids"][0, 0] > 2 for item in found)


def test_rebatch_joins_what_has_one_shape():
    items = token_batches(3, length=4) + token_batches(2, length=5)
    sizes = [tuple(batch["input_ids"].shape) for batch in rebatch(items, batch_tokens=8)]
    assert sorted(sizes) == [(1, 4), (1, 5), (1, 5), (2, 4)]
    assert [b.shape for b in rebatch([torch.zeros(1, 2), torch.zeros(1, 2)], 99)] == [(2, 2)]


def test_images_are_batched_by_their_patches_and_all_used():
    images = [{"pixel_values": torch.zeros(1, 3, 32, 64)} for _ in range(5)]  # 8 patches each
    sizes = [len(batch["pixel_values"]) for batch in rebatch(images, batch_tokens=16)]
    assert sizes == [2, 2, 1]
    assert len(spread(images, max_tokens=16)) == 5


@pytest.mark.parametrize(
    ("count", "share", "apart"), [(32, 0.125, 4), (1, 0.5, 0), (2, 0.01, 1), (9, 0, 0)]
)
def test_held_out_items(count, share, apart):
    kept, held_out = split_held_out(list(range(count)), share)
    assert len(held_out) == apart
    assert sorted(kept + held_out) == list(range(count))


# Structure


def test_two_lists_of_blocks_must_be_told_apart():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision = nn.ModuleList([nn.Linear(2, 2)])
            self.text = nn.ModuleList([nn.Linear(2, 2)])

    with pytest.raises(BiasCompensationError, match=r"\['vision', 'text'\]"):
        find_blocks(Two())
    assert find_blocks(Two(), "text").names == ("text.0",)
    with pytest.raises(BiasCompensationError, match="'middle' is not a list"):
        find_blocks(Two(), "middle")


# Evaluation


def test_perplexity_kl_and_agreement_are_what_they_are_defined_to_be():
    model = tiny_model()
    quantized = crudely_quantized(model)
    batches = token_batches(3)
    found = bc_plugin.evaluate(quantized, batches, model)
    p, q, targets = [], [], []
    with torch.no_grad():
        for batch in batches:
            p.append(quantized(**batch).logits[0, :-1].double().log_softmax(-1))
            q.append(model(**batch).logits[0, :-1].double().log_softmax(-1))
            targets.append(batch["input_ids"][0, 1:])
    p, q, targets = torch.cat(p), torch.cat(q), torch.cat(targets)
    assert found.tokens == len(targets) == 45
    loss = -p.gather(1, targets[:, None]).mean().item()
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.kl == pytest.approx((q.exp() * (q - p)).sum(1).mean().item(), rel=1e-4)
    assert found.top1 == pytest.approx((p.argmax(1) == q.argmax(1)).double().mean().item())


def test_a_model_does_not_differ_from_itself():
    model = tiny_model()
    found = bc_plugin.evaluate(model, token_batches(2), model)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.top1 == 1


def test_padding_does_not_count():
    model = tiny_model()
    (batch,) = token_batches(1, length=8)
    padded = {key: nn.functional.pad(value, (0, 5)) for key, value in batch.items()}
    assert bc_plugin.evaluate(model, [padded]).perplexity == pytest.approx(
        bc_plugin.evaluate(model, [batch]).perplexity, rel=1e-5
    )


def test_nothing_to_predict_is_refused():
    with pytest.raises(BiasCompensationError, match="no token to predict"):
        bc_plugin.evaluate(tiny_model(), token_batches(1, length=1))
