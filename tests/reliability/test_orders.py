"""Attach, detach, copy, save and load in every short order: what is in place is computed."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from helpers.language import crudely_quantized, tiny_model, token_batches
from helpers.reliability.cases import HARMLESS, Case, chosen
from helpers.reliability.counts import hold
from helpers.vectors import logits

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation

LENGTH = 3


class Walk:
    """A model, and what it should compute: ``state`` names the vectors that are in place."""

    def __init__(self, room):
        model = tiny_model("qwen2", num_hidden_layers=2)
        self.model = crudely_quantized(model)
        self.vectors = {
            name: bc_plugin.compensate(
                self.model, model, token_batches(seed=seed), {"positions": positions}
            )
            for name, seed, positions in (("a", 0, 1), ("b", 5, 0))
        }
        self.room, self.state = room, None
        self.expected = {None: logits(self.model)}
        for name, vectors in self.vectors.items():
            vectors.attach(self.model)
            self.expected[name] = logits(self.model)
            vectors.detach(self.model)

    def attach(self, name):
        if self.state is not None:
            _refused(lambda: self.vectors[name].attach(self.model))
        else:
            self.vectors[name].attach(self.model)
            self.state = name

    def detach(self, name=None):
        """What is in place, or vectors by their name."""
        attached = Compensation.attached_to(self.model)
        vectors = self.vectors[name] if name else attached or self.vectors["a"]
        if self.state is None or name not in (None, self.state):
            _refused(lambda: vectors.detach(self.model))
        else:
            vectors.detach(self.model)
            self.state = None

    def copy(self):
        old, self.model = self.model, copy.deepcopy(self.model)
        attached = Compensation.attached_to(old)
        if attached is not None:  # the copy has its own
            attached.detach(old)

    def pickle(self):
        self.model = pickle.loads(pickle.dumps(self.model))

    def state_dict(self):
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        file.seek(0)
        self.model.load_state_dict(torch.load(file))

    def save(self):
        """The vectors that are in place by themselves, and those instead of them."""
        attached = Compensation.attached_to(self.model)
        if attached is None:
            return
        attached.save(self.room)
        attached.detach(self.model)
        Compensation.load(self.room).attach(self.model)

    def recompute(self):
        """What comes to ``a``; a model that is compensated is refused."""
        original, settings = tiny_model("qwen2", num_hidden_layers=2), {"positions": 1}
        if self.state is not None:
            _refused(lambda: bc_plugin.compensate(self.model, original, token_batches(), settings))
            return
        bc_plugin.compensate(self.model, original, token_batches(), settings).attach(self.model)
        self.state = "a"


def _refused(call):
    with pytest.raises(BiasCompensationError):
        call()


STEPS = {
    "attach a": lambda walk: walk.attach("a"),
    "attach b": lambda walk: walk.attach("b"),
    "detach": Walk.detach,
    "detach a": lambda walk: walk.detach("a"),
    "copy": Walk.copy,
    "pickle": Walk.pickle,
    "state dict": Walk.state_dict,
    "save and load": Walk.save,
    "recompute": Walk.recompute,
}


def _walk(steps):
    def run(room):
        walk = Walk(room)
        found, expected = [], []
        for step in steps:
            STEPS[step](walk)
            found.append(logits(walk.model))
            expected.append(walk.expected[walk.state])
        return torch.cat(found), torch.cat(expected)

    return run


# The first one puts something in place, so that every order has something to lose.
ORDERS = [("attach a", *rest) for rest in itertools.product(STEPS, repeat=LENGTH - 1)]
CASES = [Case("orders", ", ".join(order), _walk(order), HARMLESS) for order in ORDERS]


@pytest.mark.parametrize("case", chosen(CASES), ids=str)
def test_orders(case, tmp_path):
    hold(case, tmp_path)
