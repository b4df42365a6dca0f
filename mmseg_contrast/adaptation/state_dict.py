"""Checkpoints that stock configs load, and that load from stock configs.

In memory the student lives under ``segmentor.``; in a checkpoint its keys are
those of the plain config. All else has a reserved root.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .segmentor import UDASegmentor

STUDENT = 'segmentor.'
RESERVED_ROOTS = ('teachers', 'objectives', 'views', 'pseudo_labels', 'state',
                  'clock')


def is_reserved(key: str) -> bool:
    """Whether a checkpoint's key is not the student's."""
    return key.split('.', 1)[0] in RESERVED_ROOTS


def transparent_state_dict(model: UDASegmentor) -> None:
    """Install the two hooks that strip and add the student's prefix."""
    model._register_state_dict_hook(_strip_prefix)
    model._register_load_state_dict_pre_hook(_add_prefix, with_module=True)


def _rename(mapping: MutableMapping[str, Any], old: str, new: str) -> None:
    value = mapping[old]
    del mapping[old]
    mapping[new] = value


def _strip_prefix(module: nn.Module, state_dict: MutableMapping, prefix: str,
                  local_metadata: dict) -> None:
    full = prefix + STUDENT
    for mapping in (state_dict, getattr(state_dict, '_metadata', {})):
        # The student's own entry of the metadata (its root) is dropped in
        # favour of the wrapper's.
        mapping.pop(full[:-1], None)
        for key in list(mapping):
            if key.startswith(full):
                _rename(mapping, key, prefix + key[len(full):])


def _add_prefix(module: nn.Module, state_dict: MutableMapping, prefix: str,
                local_metadata: dict, strict: bool, missing_keys: list,
                unexpected_keys: list, error_msgs: list) -> None:
    full = prefix + STUDENT
    keys = [key[len(prefix):] for key in state_dict
            if key.startswith(prefix)]
    if not any(is_reserved(key) for key in keys):
        _adopt_plain(module, state_dict, prefix, keys)
    for key in keys:
        if not is_reserved(key) and not key.startswith(STUDENT):
            _rename(state_dict, prefix + key, full + key)
    metadata = getattr(state_dict, '_metadata', None)
    if metadata is not None:
        for key in list(metadata):
            rest = key[len(prefix):]
            if (key.startswith(prefix) and rest and not is_reserved(rest)
                    and not rest.startswith(STUDENT)):
                metadata.setdefault(full + rest, metadata[key])


def _adopt_plain(module: nn.Module, state_dict: MutableMapping, prefix: str,
                 keys: list[str]) -> None:
    """A plain checkpoint fills the teachers too; the rest stays as it is."""
    own = {}
    for root in RESERVED_ROOTS:
        part = getattr(module, root, None)
        if isinstance(part, nn.Module):
            own.update(part.state_dict(prefix=f'{root}.'))
    given = {key.removeprefix(STUDENT) for key in keys}
    for key, value in own.items():
        root, *rest = key.split('.', 3)
        student_key = rest[2] if (
            root == 'teachers' and len(rest) == 3 and rest[1] == 'model'
        ) else None
        if student_key in given:
            source = student_key if student_key in keys else (
                STUDENT + student_key)
            value = state_dict[prefix + source]
        state_dict[prefix + key] = value
