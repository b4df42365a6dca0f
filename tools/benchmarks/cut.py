"""Values of a step without their history, as leaves of a new graph."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor

#: Tensors by id, with what they became.
Known = dict[int, tuple[Tensor, Tensor]]


def cut(value: Any, recording: bool = True, known: Known | None = None
        ) -> Any:
    """The same value, cut off from the graph that it comes from.

    Args:
        value (Any): A tensor, or dicts, lists, tuples and dataclasses that
            hold some; anything else stays what it is.
        recording (bool): Whether what needed gradients does so again.
        known (dict, optional): Filled as it goes: a tensor that is met twice
            becomes one leaf.
    """
    known = {} if known is None else known
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = value, value.detach().requires_grad_(
                recording and value.requires_grad)
        return known[id(value)][1]
    if isinstance(value, dict):
        return {key: cut(one, recording, known)
                for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(cut(one, recording, known) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{
            one.name: cut(getattr(value, one.name), recording, known)
            for one in fields(value)})
    return value
