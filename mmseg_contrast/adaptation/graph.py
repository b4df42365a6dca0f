"""The graph of views and pseudo-labels, checked before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .segmentor import UDASegmentor


def check(model: UDASegmentor) -> list[str]:
    """Check all names, and say in which order objectives are evaluated.

    The order depends on the graph and the names alone, not on the order in
    which configs were merged: views nearer to the loader come first.

    Args:
        model (UDASegmentor): With all its parts.

    Returns:
        list[str]: Names of the objectives.

    Raises:
        ValueError: If a name is unknown or views need each other.
    """
    for name, policy in model.pseudo_labels.items():
        teacher = getattr(policy, 'teacher', None)
        if teacher is not None and teacher not in model.teachers:
            raise ValueError(
                f'model.pseudo_labels.{name}.teacher = {teacher!r} is not in '
                f'model.teachers ({sorted(model.teachers)}).')
    for name, view in model.views.items():
        for policy in getattr(view, 'needs_pseudo_labels', ()):
            if policy not in model.pseudo_labels:
                raise ValueError(
                    f'model.views.{name}.pseudo_label = {policy!r} is not in '
                    f'model.pseudo_labels ({sorted(model.pseudo_labels)}).')
    _check_contrast(model)
    _check_state(model)
    depths = {name: max((_depth(model, view, ())
                         for view in objective.needs), default=0)
              for name, objective in model.objectives.items()}
    _check_folding(model)
    _check_joint(model)
    return sorted(depths, key=lambda name: (depths[name], name))


def groups(objectives: Mapping[str, nn.Module], order: list[str],
           joint_views: Sequence[str] = ()) -> list[list[str]]:
    """Objectives that have a pass of the student in common.

    Args:
        objectives (Mapping[str, nn.Module]): With the views that they need.
        order (list[str]): Names in the order of evaluation.
        joint_views (Sequence[str]): Views that share a pass.

    Returns:
        list[list[str]]: Names in that order; no two groups share a view.
    """
    found: list[tuple[set[str], list[str]]] = []
    for name in order:
        views, names = set(objectives[name].needs), [name]
        if views & set(joint_views):
            views |= set(joint_views)
        apart = []
        for others, members in found:
            if others & views:
                views, names = views | others, members + names
            else:
                apart.append((others, members))
        found = [*apart, (views, names)]
    ordered = [sorted(names, key=order.index) for _, names in found]
    return sorted(ordered, key=lambda names: order.index(names[0]))


def _parents(model: UDASegmentor, view: str) -> list[str]:
    """Views that a view is made from; a stream has none."""
    if view not in model.views:
        return []
    module = model.views[view]
    parents = list(module.needs)
    for policy in getattr(module, 'needs_pseudo_labels', ()):
        parents.extend(model.pseudo_labels[policy].needs)
    return parents


def _depth(model: UDASegmentor, view: str, path: tuple[str, ...]) -> int:
    """Steps from the loader's streams to a view."""
    if view in path:
        raise ValueError('model.views need each other in a circle: '
                         + ' -> '.join([*path, view]) + '.')
    parents = _parents(model, view)
    return max((1 + _depth(model, parent, (*path, view))
                for parent in parents), default=0)


def streams_needed(model: UDASegmentor) -> set[str]:
    """Names that only the loader can supply."""
    needed: set[str] = set()
    todo = [view for one in model.objectives.values() for view in one.needs]
    while todo:
        view = todo.pop()
        if view in model.views:
            todo.extend(_parents(model, view))
        else:
            needed.add(view)
    return needed


def _check_state(model: UDASegmentor) -> None:
    """Prototypes that a policy or an objective reads are there."""
    for group in ('pseudo_labels', 'objectives'):
        for name, part in getattr(model, group).items():
            state = getattr(part, 'state', None)
            if state is not None and state not in model.state:
                raise ValueError(
                    f'model.{group}.{name}.state = {state!r} is not in '
                    f'model.state ({sorted(model.state)}).')


def _check_contrast(model: UDASegmentor) -> None:
    """Each ContrastHead has one objective, and this has what it names."""
    claims: dict[str, str] = {}
    for name, objective in model.objectives.items():
        where = f'model.objectives.{name}'
        for policy in getattr(objective, 'needs_pseudo_labels', ()):
            if policy not in model.pseudo_labels:
                raise ValueError(
                    f'{where}.pseudo_labels names {policy!r}, which is not '
                    'in model.pseudo_labels '
                    f'({sorted(model.pseudo_labels)}).')
        teacher = getattr(objective, 'needs_teacher', None)
        if teacher is not None and teacher not in model.teachers:
            raise ValueError(
                f'{where}.teacher = {teacher!r} is not in model.teachers '
                f'({sorted(model.teachers)}).')
        head = getattr(objective, 'head', None)
        if head is None:
            continue
        if head in claims:
            raise ValueError(
                f'model.objectives.{claims[head]} and {where} both claim the '
                f'head {head!r}: its bank would be filled twice. Name all '
                'views in one objective, or give each a head of its own.')
        claims[head] = name
    for head in model.adapter.contrast:
        if head not in claims:
            raise ValueError(
                'model.segmentor.auxiliary_head has a ContrastHead that no '
                "objective uses: add model.objectives.contrast=dict(type="
                f"'Contrast', head={head!r}).")


def _check_joint(model: UDASegmentor) -> None:
    """Views that share a pass are seen anyway, by a student that can."""
    if not model.joint_views:
        return
    seen = {view for one in model.objectives.values() for view in one.needs}
    unknown = sorted(set(model.joint_views) - seen)
    if unknown or len(set(model.joint_views)) < max(
            2, len(model.joint_views)):
        raise ValueError(
            f'model.joint_views = {list(model.joint_views)} must name two or '
            f'more of the views that objectives see ({sorted(seen)}).')
    model.adapter.check_joint()


def _check_folding(model: UDASegmentor) -> None:
    """A weight for each sample can't be folded into a label map."""
    heads = model.adapter.folding_heads
    for name, policy in model.pseudo_labels.items():
        if heads and getattr(policy, 'scope', None) == 'sample':
            raise ValueError(
                f"model.pseudo_labels.{name}.scope = 'sample' weighs each "
                f'image, but {heads[0]} has a loss that takes no weight '
                "map: use scope='batch' or CrossEntropyLoss.")
