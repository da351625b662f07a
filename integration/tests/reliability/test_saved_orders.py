"""What is attached is what is saved, whatever came before, with transformers and with GPTQModel."""

import copy
import itertools
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.reliability.cases import EITHER, HARMLESS, Case, chosen
from helpers.reliability.counts import hold

pytest.importorskip("gptqmodel", reason="needs the gptq extra")

from gptqmodel import GPTQModel
from rig.subjects.tiny import logits, sequences
from transformers import AutoModel, AutoModelForCausalLM

import bc_plugin
from bc_plugin import Compensation, RefinementConfig


class Walk:
    """A loaded checkpoint that things are done to; ``with_gptqmodel`` by GPTQModel."""

    def __init__(self, subject, room, with_gptqmodel=False):
        self.subject, self.room, self.with_gptqmodel = subject, room, with_gptqmodel
        self.load(subject.folder)

    def load(self, folder):
        if self.with_gptqmodel:
            self.whole = GPTQModel.load(str(folder), device="cpu")
            self.model = self.whole.model
        else:
            self.whole = self.model = AutoModelForCausalLM.from_pretrained(folder)

    def save(self, name="saved", **how):
        folder = self.room / name
        if self.with_gptqmodel:
            self.whole.save(str(folder))
        else:
            self.model.save_pretrained(folder, **how)
        for path in self.subject.folder.glob("tokenizer*"):
            shutil.copy2(path, folder / path.name)
        return folder

    def again(self):
        self.load(self.save("between"))

    def detach(self):
        attached = Compensation.attached_to(self.model)
        if attached is not None:
            attached.detach(self.model)

    def others(self):
        self.detach()
        Compensation.load(self.subject.others["vectors"]).attach(self.model)

    def float_model(self):
        return AutoModelForCausalLM.from_pretrained(self.subject.others["float"])

    def recompute(self):
        self.detach()
        made = bc_plugin.compensate(self.model, self.float_model(), sequences(seed=9))
        made.attach(self.model)

    def refine(self):
        if Compensation.attached_to(self.model) is not None:
            config = RefinementConfig(steps=2, learning_rate=0.5)
            bc_plugin.refine(self.model, self.float_model(), sequences(), config)

    def expected(self):
        """Of what is in place now: the same vectors in a model loaded anew."""
        attached = Compensation.attached_to(self.model)
        attached = copy.deepcopy(attached)
        fresh = Walk(self.subject, self.room)
        fresh.detach()
        if attached is not None:
            attached.attach(fresh.model)
        return logits(fresh.model)

    def outcome(self):
        """What is loaded from what was saved, and what should be.

        GPTQModel writes its own copy of the source's weights, in another type: there, vectors.
        """
        if self.with_gptqmodel:
            expected = self.in_place()
            self.load(self.save())
            return self.in_place(), expected
        expected = self.expected()
        self.load(self.save())
        return logits(self.model), expected

    def in_place(self):
        attached = Compensation.attached_to(self.model)
        vectors = {} if attached is None else attached.vectors
        return {name: tensor.tolist() for name, tensor in vectors.items()}


STEPS = {
    "detach": Walk.detach,
    "other vectors": Walk.others,
    "recompute": Walk.recompute,
    "refine": Walk.refine,
    "save and load": Walk.again,
}
ORDERS = [(), *((step,) for step in STEPS), *itertools.permutations(STEPS, 2)]


def _order(steps, with_gptqmodel):
    def run(subject, room):
        walk = Walk(subject, room, with_gptqmodel)
        for step in steps:
            STEPS[step](walk)
        return walk.outcome()

    return run


def _after_running(subject, room):
    walk = Walk(subject, room)
    logits(walk.model)  # this kernel repacks its weights when first run
    return walk.outcome()


def _base(subject, room):
    base = AutoModel.from_pretrained(subject.folder)
    base.save_pretrained(room / "base")
    whole = AutoModelForCausalLM.from_pretrained(room / "base")
    found = AutoModel.from_pretrained(room / "base")
    with torch.no_grad():
        states = [m(**sequences(1)[0]).last_hidden_state for m in (found, whole.model, base)]
    return torch.stack(states[:2]), torch.stack([states[2]] * 2)


def _copied(subject, room):
    walk = Walk(subject, room)
    original, walk.model = walk.model, copy.deepcopy(walk.model)
    Compensation.attached_to(original).detach(original)
    return walk.outcome()


def _twice(subject, room):
    walk = Walk(subject, room)
    walk.save()
    walk.others()
    return walk.outcome()


def _in_shards(subject, room):
    walk = Walk(subject, room)
    walk.save()
    walk.others()
    expected = walk.expected()
    walk.load(walk.save(max_shard_size="50KB"))
    return logits(walk.model), expected


def _detached(subject, room):
    walk = Walk(subject, room)
    walk.detach()
    folder = walk.save()
    text = (folder / "config.json").read_text()
    return "bias_compensation" in text or b"bias_compensation" in (
        folder / "model.safetensors"
    ).read_bytes(), False


def _without_config(subject, room):
    model = AutoModelForCausalLM.from_pretrained(subject.others["float"])
    rounded = copy.deepcopy(model)
    for block in rounded.model.layers:
        block.mlp.down_proj.weight.data = (block.mlp.down_proj.weight.data * 8).floor() / 8
    bc_plugin.compensate(rounded, model, sequences()).attach(rounded)
    rounded.save_pretrained(room / "saved")
    return logits(AutoModelForCausalLM.from_pretrained(room / "saved")), logits(rounded)


NAMES = ("quantization_config|repack|file|shard|safetensors",)
CASES = [
    *(
        Case(f"saved by {who}", ", ".join(steps) or "as loaded", _order(steps, own), HARMLESS)
        for who, own in (("transformers", False), ("GPTQModel", True))
        for steps in ORDERS
    ),
    Case("saved", "a copy, the original detached", _copied, HARMLESS),
    Case("saved", "twice into one folder", _twice, HARMLESS),
    Case("saved", "in shards over a single file", _in_shards, EITHER, NAMES),
    Case("saved", "after detaching", _detached, HARMLESS),
    Case("saved", "after running", _after_running, EITHER, NAMES),
    Case("saved", "without a head", _base, HARMLESS),
    Case("saved", "without a quantization config", _without_config, EITHER, NAMES),
]


@pytest.mark.parametrize("case", chosen(CASES), ids=str)
def test_saved(case, checkpoint, enabled, tmp_path):
    hold(replace(case, run=lambda room: case.run(checkpoint, room)), tmp_path)
