"""A compensation put in place in a model, and taken out again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import BiasCompensationError
from ..models.blocks import find_block_lists
from ..models.modules import device_of, dtype_of
from ..models.offloaded import outwards
from ..models.tracker import PositionTracker, Tracking
from .contents import Contents
from .entry import entry_of, set_entry
from .in_place import AttachedConvolution, AttachedSite

ATTRIBUTE = "_bias_compensation"


@dataclass
class Attachment:
    """A compensation in place in a model, with what is needed to take it out again.

    The model itself has it, as ``_bias_compensation``, so that a copy of the model has its own.
    """

    compensation: Contents
    sites: list[AttachedSite | AttachedConvolution]
    trackings: list[Tracking]

    def undo(self) -> None:
        """Take out everything."""
        for tracking in self.trackings:
            tracking.undo()
        for site in reversed(self.sites):
            site.detach()


def attach(compensation: Contents, model: nn.Module) -> None:
    """See ``Compensation.attach_unchecked``."""
    if _holder(model) is not None:
        raise BiasCompensationError("the model is compensated already; detach that first.")
    attachment = Attachment(compensation, [], [])
    try:
        _put_in_place(attachment, model)
        set_entry(model, entry_of(compensation))
    except BaseException:
        attachment.undo()
        raise
    setattr(model, ATTRIBUTE, attachment)


def _put_in_place(attachment: Attachment, model: nn.Module) -> None:
    compensation, dtype = attachment.compensation, dtype_of(model)
    tracker = PositionTracker(compensation.positions)
    for name, vectors in compensation.vectors.items():
        module = model.get_submodule(name)
        vectors = vectors.to(_device_at(model, name))
        if compensation.kinds[name] == "convolution":
            attachment.sites.append(AttachedConvolution(module, vectors))
        else:
            attachment.sites.append(AttachedSite(module, vectors, tracker, dtype))
    # After the sites: a block run again has to find its rows first.
    for blocks in find_block_lists(model, compensation.blocks):
        owner = model.get_submodule(blocks.owner)
        attachment.trackings.append(Tracking(owner, blocks.modules(model), tracker))


def _device_at(model: nn.Module, name: str) -> torch.device:
    """Where the module of this path computes, also if one around it is lent its weights."""
    devices = (device_of(model.get_submodule(path)) for path in outwards(name))
    return next((device for device in devices if device.type != "meta"), torch.device("meta"))


def detach(compensation: Contents, model: Any) -> nn.Module:
    """See ``Compensation.detach``; returns the module itself that they were attached to."""
    attached = attached_to(model)
    if attached is None or entry_of(attached) != entry_of(compensation):
        raise BiasCompensationError(
            "these vectors are not attached to the model; what is can be taken out with "
            "Compensation.attached_to(model).detach(model)."
            if attached is not None
            else "this compensation is not attached to the model, which has none."
        )
    holder = _holder(model)
    getattr(holder, ATTRIBUTE).undo()
    delattr(holder, ATTRIBUTE)
    set_entry(holder, None)
    return holder


def attached_to(model: Any) -> Any:
    """The compensation in place in ``model``, None where there is none."""
    holder = _holder(model)
    return None if holder is None else getattr(holder, ATTRIBUTE).compensation


def _holder(model: Any) -> Any:
    """The module that vectors are attached to: ``model``, or what a toolkit has wrapped in it."""
    modules = model.modules() if isinstance(model, nn.Module) else (getattr(model, "model", None),)
    return next(
        (module for module in modules if ATTRIBUTE in getattr(module, "__dict__", ())), None
    )
