"""Calibration data and float models that cannot be right are refused by name."""

import copy

import pytest
import torch
from helpers.language import LetterTokenizer, crudely_quantized, tiny_model, token_batches
from helpers.reliability.cases import DAMAGED, HARMLESS, Case, chosen
from helpers.reliability.counts import hold
from helpers.vectors import logits

import bc_plugin
from bc_plugin.calibration import read_text, windows

IDS = token_batches(1)[0]["input_ids"]
ITEM = "item 1|input_ids|attention_mask|calibration"


def _pair():
    model = tiny_model("qwen2", num_hidden_layers=2)
    return crudely_quantized(model), model


def _compensated(quantized, float_model, data, **config):
    """Logits with the vectors in place."""
    settings = {"positions": 1, **config}
    bc_plugin.compensate(quantized, float_model, data, settings).attach(quantized)
    return logits(quantized)


def _with(item):
    """That for the second sequence of six."""
    return [*token_batches(1), item, *token_batches(4, seed=2)]


def _ids(ids, **more):
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


ITEMS = {
    "ids with an axis too many": _ids(IDS[None]),
    "no tokens": _ids(IDS[:, :0]),
    "no sequences": _ids(IDS[:0]),
    "ids that are floats": _ids(IDS.float()),
    "ids that are booleans": _ids(IDS > 3),
    "an id out of the vocabulary": _ids(IDS.clone().fill_(5000)),
    "an id of the vocabulary's size": _ids(IDS.clone().fill_(96)),
    "a negative id": _ids(IDS - 90),
    "a mask that is shorter": {"input_ids": IDS, "attention_mask": torch.ones_like(IDS[:, 1:])},
    "a mask that is longer": {"input_ids": IDS, "attention_mask": torch.ones(1, 17).long()},
    "a mask for two": {"input_ids": IDS, "attention_mask": torch.ones(2, 16).long()},
    "a mask of zeros": {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)},
    "text": {"input_ids": "one two three"},
    "a list of texts": {"input_ids": ["one", "two"]},
    "None": None,
    "a number": 3,
    "a text": "one two three",
    "nothing in a dict": {},
    "ids that are None": {"input_ids": None},
    "embeddings that are NaN": {"inputs_embeds": torch.full((1, 16, 32), float("nan"))},
    "embeddings that are too wide": {"inputs_embeds": torch.zeros(1, 16, 33)},
    "positions of another length": _ids(IDS, position_ids=torch.arange(9)[None]),
}
FINE = {
    "a generator": lambda: (batch for batch in token_batches()),
    "a tuple": lambda: tuple(token_batches()),
    "one batch of six": lambda: token_batches(1, batch=6),
    "several lengths": lambda: [*token_batches(3), *token_batches(3, length=9)],
    "tensors of ids": lambda: [batch["input_ids"] for batch in token_batches()],
    "lists of ids": lambda: [{"input_ids": b["input_ids"][0].tolist()} for b in token_batches()],
    "ids as int32": lambda: [_ids(batch["input_ids"].int()) for batch in token_batches()],
    "no masks": lambda: [{"input_ids": batch["input_ids"]} for batch in token_batches()],
    "masks of booleans": lambda: [
        {**batch, "attention_mask": batch["attention_mask"].bool()} for batch in token_batches()
    ],
    "one sequence": lambda: token_batches(1),
}
EMPTY = {
    "an empty list": lambda: [],
    "an empty generator": lambda: iter(()),
    "sequences of one token": lambda: token_batches(length=1),
    "one text": lambda: "one two three",
    "a dict": lambda: token_batches(1)[0],
    "None": lambda: None,
    "a number": lambda: 7,
}


def _nan(name):
    def change(model):
        dict(model.named_parameters())[name].data.view(-1)[7::64] = float("nan")
        return model

    return change


def _infinite(model):
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("inf")
    return model


LINEAR = "model.layers.1.self_attn.v_proj.weight"
FLOAT = {  # and what a refusal names
    "NaN in a linear": (_nan(LINEAR), "model.layers.1"),
    "NaN in a norm": (_nan("model.layers.0.input_layernorm.weight"), "model.layers.0"),
    "NaN in the embeddings": (_nan("model.embed_tokens.weight"), "embed_tokens|model.layers.0"),
    "infinity in a linear": (_infinite, "model.layers.1"),
    "of other weights": (lambda m: tiny_model("qwen2", 1, num_hidden_layers=2), "float"),
    "with a block more": (lambda m: tiny_model("qwen2", num_hidden_layers=3), "blocks"),
    "with a block less": (lambda m: tiny_model("qwen2", num_hidden_layers=1), "blocks"),
    "of another width": (
        lambda m: tiny_model("qwen2", num_hidden_layers=2, hidden_size=48),
        "model.layers.0|hidden_size",
    ),
    "of another inner width": (
        lambda m: tiny_model("qwen2", num_hidden_layers=2, intermediate_size=64),
        "model.layers.0|intermediate_size",
    ),
    "of another vocabulary": (
        lambda m: tiny_model("qwen2", num_hidden_layers=2, vocab_size=64),
        "embed_tokens|vocab_size|float|quantized",
    ),
    "of another architecture": (lambda m: tiny_model("llama", num_hidden_layers=2), "model_type"),
    "of another family": (lambda m: tiny_model("gpt2"), "model.layers|blocks"),
    "the quantized one itself": (crudely_quantized, "float"),
    "a text": (lambda m: "./float", "float"),
    "None": (lambda m: None, "float"),
    "its config": (lambda m: m.config, "float"),
    "on the meta device": (lambda m: copy.deepcopy(m).to("meta"), "meta|float"),
}
FLOAT_FINE = {
    "in training mode": lambda model: model.train(),
    "frozen": lambda model: model.requires_grad_(False),
    "a copy": copy.deepcopy,
}
TEXTS = {  # a file's name and bytes
    "empty": ("text.txt", b""),
    "no UTF-8": ("text.txt", b"caf\xe9 " * 40),
    "UTF-16": ("text.txt", ("word " * 40).encode("utf-16")),
    "zeros": ("text.txt", bytes(400)),
    "lines that are no JSON": ("text.jsonl", b"one\ntwo\n"),
    "lines without a text": ("text.jsonl", b'{"title": "x"}\n'),
    "a line that is cut": ("text.jsonl", b'{"text": "one"}\n{"text": "tw'),
    "lines of lists": ("text.jsonl", b'["one", "two"]\n'),
    "texts that are numbers": ("text.jsonl", b'{"text": 3}\n'),
    "texts that are null": ("text.jsonl", b'{"text": null}\n'),
    "a table": ("text.csv", b"id,text\n1,one\n" * 20),
    "a zip file": ("text.zip", b"PK\x03\x04" + bytes(range(256))),
}


def _read(name, data):
    def run(room):
        if data is not None:
            (room / name).write_bytes(data)
        windows(read_text(str(room / name)), LetterTokenizer(), 16)
        return None, None

    return run


def _items(make):
    return lambda room: (_compensated(*_pair(), make()), None)


def _float(change):
    def run(room):
        quantized, model = _pair()
        return _compensated(quantized, change(model), token_batches()), None

    return run


def _as_usual(call):
    return lambda room: (call(), _compensated(*_pair(), token_batches()))


def _fine(make):
    """Finite logits will do, where the data is another."""
    return lambda room: (bool(torch.isfinite(_compensated(*_pair(), make())).all()), True)


CASES = [
    *(
        Case("a calibration item", k, _items(lambda v=v: _with(v)), DAMAGED, (ITEM,))
        for k, v in ITEMS.items()
    ),
    *(Case("calibration data", k, _items(v), DAMAGED, ("calibration",)) for k, v in EMPTY.items()),
    *(Case("calibration that is fine", k, _fine(v), HARMLESS) for k, v in FINE.items()),
    *(Case("float models", k, _float(v), DAMAGED, (names,)) for k, (v, names) in FLOAT.items()),
    *(
        Case(
            "float models that are fine",
            k,
            _as_usual(lambda v=v: _compensated(_pair()[0], v(_pair()[1]), token_batches())),
            HARMLESS,
        )
        for k, v in FLOAT_FINE.items()
    ),
    *(Case("text", k, _read(*v), DAMAGED, (v[0],)) for k, v in TEXTS.items()),
    Case("text", "a folder", _read("", None), DAMAGED, ("dataset|folder",)),
    Case("text", "too short", _read("text.txt", b"ab"), DAMAGED, ("the text",)),
    Case("text", "missing", _read("missing.txt", None), DAMAGED, ("missing.txt",)),
]


@pytest.mark.parametrize("case", chosen(CASES), ids=str)
def test_inputs(case, tmp_path):
    hold(case, tmp_path)
