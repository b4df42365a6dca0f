"""Synthetic negatives between a bank and the loss."""

from __future__ import annotations

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..ops import hardest_negatives, mixed_energies, send
from ..ops.pair_relation import PairRule


@MODELS.register_module()
class HardNegativeMixing(nn.Module):
    """Mixes the hardest negatives of each anchor into more negatives.

    MoCHi (Kalantidis et al., NeurIPS 2020), with keys of other classes as
    negatives; for any bank. Anchors should be a sample: the mixes take
    memory of the size ``N x (mixes + query_mixes) x D``. Keys and anchors
    should have length 1, as the mixes have.

    Args:
        hardest (int): Negatives that are mixed, at most.
        mixes (int): Mixes of two of them.
        query_mixes (int): Mixes of one of them with the anchor.
        max_query_share (float): Largest share of the anchor in those.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self,
                 hardest: int = 32,
                 mixes: int = 16,
                 query_mixes: int = 16,
                 max_query_share: float = 0.5) -> None:
        super().__init__()
        name = 'HardNegativeMixing'
        if hardest < 1:
            raise ValueError(
                f'{name}.hardest must be at least 1, got {hardest}')
        if min(mixes, query_mixes) < 0 or mixes + query_mixes == 0:
            raise ValueError(
                f'{name}.mixes and query_mixes must be at least 0 and not '
                f'both 0, got {mixes} and {query_mixes}')
        if not 0 < max_query_share <= 1:
            raise ValueError(f'{name}.max_query_share must lie in (0, 1], '
                             f'got {max_query_share}')
        self.hardest = hardest
        self.mixes = mixes
        self.query_mixes = query_mixes
        self.max_query_share = max_query_share

    def draw(self,
             number: int,
             generator: torch.Generator,
             device: torch.device | str = 'cpu') -> Tensor:
        """What :meth:`forward` chooses with.

        Args:
            number (int): Anchors N.
            generator (torch.Generator): CPU generator.
            device (torch.device or str): Where the result is sent.

        Returns:
            Tensor: Uniform numbers in [0, 1), see
            :func:`mmseg_contrast.ops.mixed_energies`.
        """
        return send(torch.rand(
            number, 3 * self.mixes + 2 * self.query_mixes,
            generator=generator), device)

    def forward(self, anchors: Tensor, keys: Tensor, relation: PairRule,
                tau: float, draws: Tensor | None) -> Tensor:
        """One more energy of each anchor, for the denominator of its loss.

        Args:
            anchors (Tensor): ``(N, D)``; the gradient is theirs alone.
            keys (Tensor): ``(M, D)``.
            relation (PairRule): Which keys are negatives.
            tau (float): Temperature, > 0.
            draws (Tensor): From :meth:`draw`.

        Returns:
            Tensor: ``(N,)``, minus infinity without a negative.

        Raises:
            ValueError: If there are no draws.
        """
        if draws is None:
            raise ValueError('HardNegativeMixing needs draws: pass what its '
                             'draw(number, generator) gives')
        hardest, count = hardest_negatives(
            anchors, keys, relation, self.hardest)
        return mixed_energies(
            anchors, keys, hardest, count, draws, self.mixes,
            self.query_mixes, self.max_query_share, tau)
