"""The Mix Transformer of SegFormer's release and mmseg 1.x's."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Depths and channels of the stages of the published variants.
VARIANTS = {
    'mit_b0': ((2, 2, 2, 2), (32, 64, 160, 256)),
    'mit_b1': ((2, 2, 2, 2), (64, 128, 320, 512)),
    'mit_b2': ((3, 4, 6, 3), (64, 128, 320, 512)),
    'mit_b3': ((3, 4, 18, 3), (64, 128, 320, 512)),
    'mit_b4': ((3, 8, 27, 3), (64, 128, 320, 512)),
    'mit_b5': ((3, 6, 40, 3), (64, 128, 320, 512)),
}

_PATCH = re.compile(r'patch_embed(\d+)\.(proj|norm)\.(weight|bias)')
_BLOCK = re.compile(r'block(\d+)\.(\d+)\.([\w.]+)\.(weight|bias)')
_NORM = re.compile(r'norm(\d+)\.(weight|bias)')
_IN_BLOCK = {
    'norm1': 'norm1.',
    'attn.q': 'attn.attn.in_proj_',
    'attn.kv': 'attn.attn.in_proj_',
    'attn.proj': 'attn.attn.out_proj.',
    'attn.sr': 'attn.sr.',
    'attn.norm': 'attn.norm.',
    'norm2': 'norm2.',
    'mlp.fc1': 'ffn.layers.0.',
    'mlp.dwconv.dwconv': 'ffn.layers.1.',
    'mlp.fc2': 'ffn.layers.4.',
}
_POINTWISE = re.compile(r'.*\.ffn\.layers\.[04]\.weight')


@dataclass(frozen=True)
class MitShape:
    """What the shapes of published weights say of a Mix Transformer.

    Attributes:
        in_channels (int): Channels of the images.
        channels (tuple[int, ...]): Channels of each stage.
        depths (tuple[int, ...]): Blocks of each stage.
        patch_sizes (tuple[int, ...]): Kernel of each patch embedding.
        sr_ratios (tuple[int, ...]): Spatial reduction of each stage.
        mlp_ratio (int): Hidden channels of the feed-forward net.
        qkv_bias (bool): Whether queries, keys and values have a bias.
    """

    in_channels: int
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    patch_sizes: tuple[int, ...]
    sr_ratios: tuple[int, ...]
    mlp_ratio: int
    qkv_bias: bool

    @property
    def variant(self) -> str | None:
        """Name of the published variant, None if it is none of them."""
        for name, shape in VARIANTS.items():
            if shape == (self.depths, self.channels):
                return name
        return None

    def config(self) -> dict[str, Any]:
        """The backbone's config, without ``type``.

        Heads and strides are in no shape. mmseg has the same channels per
        head in all stages, so the fewest heads that allow this are assumed;
        for the published variants they are the right ones. So are the
        strides 4, 2, 2, ...
        """
        width = math.gcd(*self.channels)
        return dict(
            in_channels=self.in_channels,
            embed_dims=width,
            num_layers=self.depths,
            num_heads=tuple(wide // width for wide in self.channels),
            patch_sizes=self.patch_sizes,
            strides=(4, *[2] * (len(self.depths) - 1)),
            sr_ratios=self.sr_ratios,
            out_indices=tuple(range(len(self.depths))),
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias)


def is_published_mit(keys: Iterable[str]) -> bool:
    """Whether a backbone's keys are those of SegFormer's release."""
    return any(_PATCH.fullmatch(key) for key in keys)


def mit_key(key: str) -> str | None:
    """Name in mmseg 1.x.

    Args:
        key (str): Name in SegFormer's release, without ``backbone.``.

    Returns:
        str or None: Queries and keys-and-values have the same new name. None
        if it is no name of a Mix Transformer, such as its classifier.
    """
    if found := _PATCH.fullmatch(key):
        stage, part, rest = found.groups()
        part = 'projection' if part == 'proj' else part
        return f'layers.{int(stage) - 1}.0.{part}.{rest}'
    if found := _NORM.fullmatch(key):
        return f'layers.{int(found[1]) - 1}.2.{found[2]}'
    if (found := _BLOCK.fullmatch(key)) and found[3] in _IN_BLOCK:
        stage, block, part, rest = found.groups()
        return f'layers.{int(stage) - 1}.1.{block}.{_IN_BLOCK[part]}{rest}'
    return None


def convert_mit(weights: Mapping[str, Tensor]
                ) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """Rename and reshape a backbone of SegFormer's release.

    Args:
        weights (Mapping[str, Tensor]): By name, without ``backbone.``.

    Returns:
        dict: For each new name the tensor and the names it came from. What
        has no new name keeps its own.

    Raises:
        ValueError: If queries and keys-and-values don't belong together.
    """
    sources: dict[str, list[str]] = {}
    for key in weights:
        sources.setdefault(mit_key(key) or key, []).append(key)
    converted = {}
    for target, keys in sources.items():
        if '.in_proj_' in target:
            value = _join_attention(weights, keys)
        else:
            value = weights[keys[0]]
        if _POINTWISE.fullmatch(target) and value.ndim == 2:
            # Linear layers there, 1 x 1 convolutions here.
            value = value[:, :, None, None]
        converted[target] = (value, tuple(keys))
    return converted


def mit_shape(weights: Mapping[str, Tensor]) -> MitShape:
    """Find out which Mix Transformer published weights are of.

    Args:
        weights (Mapping[str, Tensor]): By name, without ``backbone.``.

    Returns:
        MitShape: From the shapes of the tensors.

    Raises:
        ValueError: If stages or blocks are missing, or mmseg has no such
            backbone.
    """
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    stages = _numbers(_PATCH, shapes)
    if not stages:
        raise ValueError('there is no patch_embed1.proj.weight in it, so it '
                         'is no Mix Transformer of SegFormer\'s release.')
    if stages != list(range(1, len(stages) + 1)):
        raise ValueError(f'it has the stages {stages}, which is not a row '
                         'from 1.')
    channels, depths, patches, reductions, ratios = [], [], [], [], []
    for stage in stages:
        blocks = _numbers(
            re.compile(rf'block{stage}\.(\d+)\..+'), shapes)
        if not blocks or blocks != list(range(len(blocks))):
            raise ValueError(f'stage {stage} has the blocks {blocks}, which '
                             'is not a row from 0.')
        patch = _shape(shapes, f'patch_embed{stage}.proj.weight', 4)
        first = f'block{stage}.0.'
        hidden = _shape(shapes, first + 'mlp.fc1.weight', 2)
        channels.append(patch[0])
        patches.append(patch[2])
        depths.append(len(blocks))
        reductions.append(
            _shape(shapes, first + 'attn.sr.weight', 4)[2]
            if first + 'attn.sr.weight' in shapes else 1)
        ratios.append(hidden[0] / hidden[1])
    if len(set(ratios)) > 1 or ratios[0] != int(ratios[0]):
        raise ValueError(
            f'its stages have the mlp ratios {ratios}; mmseg\'s backbone has '
            'one whole number for all.')
    return MitShape(
        in_channels=_shape(shapes, 'patch_embed1.proj.weight', 4)[1],
        channels=tuple(channels),
        depths=tuple(depths),
        patch_sizes=tuple(patches),
        sr_ratios=tuple(reductions),
        mlp_ratio=int(ratios[0]),
        qkv_bias='block1.0.attn.q.bias' in shapes)


def _join_attention(weights: Mapping[str, Tensor],
                    keys: list[str]) -> Tensor:
    """Rows of the queries, then the keys, then the values."""
    kinds = {key.rsplit('.', 2)[-2]: key for key in keys}
    if set(kinds) != {'q', 'kv'}:
        other = keys[0].replace('.q.', '.kv.') if 'q' in kinds else (
            keys[0].replace('.kv.', '.q.'))
        raise ValueError(f'it has {keys[0]} but no {other}.')
    query, both = weights[kinds['q']], weights[kinds['kv']]
    if tuple(both.shape) != (2 * query.shape[0], *query.shape[1:]):
        raise ValueError(
            f'{kinds["q"]} is {tuple(query.shape)} and {kinds["kv"]} is '
            f'{tuple(both.shape)}, which is not twice as many rows.')
    return torch.cat([query, both])


def _numbers(pattern: re.Pattern[str], keys: Iterable[str]) -> list[int]:
    found = (pattern.fullmatch(key) for key in keys)
    return sorted({int(match[1]) for match in found if match})


def _shape(shapes: Mapping[str, tuple[int, ...]], key: str,
           ndim: int) -> tuple[int, ...]:
    if key not in shapes:
        raise ValueError(f'it has no {key}.')
    if len(shapes[key]) != ndim:
        raise ValueError(f'{key} is {shapes[key]}, not {ndim} numbers.')
    return shapes[key]
