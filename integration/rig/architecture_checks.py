"""Whether compensation is right for a model, found out from outside.

Nothing here knows how vectors are computed: each check holds them against what the float model
itself does, or the compensated model against itself.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from bc_plugin import Compensation

CLOSE = 1e-3
PROMPT, NEW = 9, 5


def _clone(value: Any) -> Any:
    # Not deepcopy alone: what a block is given need not be a leaf of a graph.
    return copy.deepcopy(value)


def _hidden(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def shift_left(
    model: nn.Module,
    compensated: nn.Module,
    compensation: Compensation,
    batches: Iterable[dict[str, Tensor]],
) -> float:
    """The largest share of a site's mean shift that its vectors leave, ``positions=0``.

    A site is fed what the float model itself gives to it in an ordinary forward pass, so there must
    be none left if the vectors were computed on the float model's stream.
    """
    left = {name: [] for name in compensation.vectors}

    def watch(name: str, stack: ExitStack) -> None:
        module, other = model.get_submodule(name), compensated.get_submodule(name)
        given: list[Any] = []

        def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
            given.append(_clone((args, kwargs)))

        def after(_: nn.Module, args: tuple, output: Any) -> None:
            own_args, own_kwargs = given.pop()
            shift = _hidden(output) - _hidden(other(*own_args, **own_kwargs))
            left[name].append(shift.flatten(0, -2).double())

        handles = [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]
        for handle in handles:
            stack.callback(handle.remove)

    with ExitStack() as stack, torch.no_grad():
        for name in compensation.vectors:
            watch(name, stack)
        for batch in batches:
            model(**batch)
    shares = [
        (torch.cat(shifts).mean(0).norm() / compensation.vectors[name][-1].double().norm()).item()
        for name, shifts in left.items()
    ]
    return max(shares)


@torch.no_grad()
def decoding_differs(model: nn.Module, ids: Tensor) -> float:
    """How far logits token by token are from those of one forward pass."""
    found = model.generate(
        ids[:, :PROMPT],
        attention_mask=torch.ones_like(ids[:, :PROMPT]),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    whole = model(input_ids=found.sequences).logits[:, PROMPT - 1 : -1]
    return (torch.stack(found.logits, 1) - whole).abs().max().item()


@torch.no_grad()
def padding_differs(model: nn.Module, ids: Tensor) -> float:
    """How far the logits of a left-padded sequence are from those of the sequence alone."""
    pad = 4
    both = ids.repeat(2, 1)
    both[1, :pad] = 0
    both[1, pad:] = ids[0, :-pad]
    mask = torch.ones_like(both)
    mask[1, :pad] = 0
    inputs = {"input_ids": both, "attention_mask": mask}
    alone = {"input_ids": ids[:, :-pad], "attention_mask": torch.ones_like(ids[:, :-pad])}
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        alone["position_ids"] = torch.arange(alone["input_ids"].shape[1])[None]
    padded = model(**inputs).logits[1, pad:]
    return (padded - model(**alone).logits[0]).abs().max().item()


def compared(check: Any, plain: nn.Module, compensated: nn.Module, ids: Tensor) -> str:
    """``"same"``, ``"differs"``, or what the model without vectors does already."""
    try:
        before = check(plain, ids)
    except Exception as error:
        return f"not by itself ({type(error).__name__})"
    if not before < CLOSE:
        return "not by itself"
    try:
        after = check(compensated, ids)
    except Exception as error:
        return f"differs ({type(error).__name__}: {error})"[:200]
    return "same" if after < CLOSE else f"differs by {after:.2g}"
