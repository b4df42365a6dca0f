"""What the fuzz tests share: sizes, kinds of numbers, degenerate labels.

Each example is few numbers drawn by hypothesis and tensors made of them, so
that what fails is printed in a line. ``MMSEG_CONTRAST_FUZZ=20`` runs twenty
times as many examples, other ones each time.
"""

import os

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FACTOR = int(os.environ.get('MMSEG_CONTRAST_FUZZ', '1'))
NAN, INF = float('nan'), float('inf')
IGNORE = 255

POISON = st.sampled_from([NAN, INF, -INF])
HALF = (torch.float16, torch.bfloat16)
DTYPES = st.sampled_from([torch.float32, torch.float64, *HALF])
SEEDS = st.integers(0, 2**31)
LABELS = st.sampled_from(['any', 'ignored', 'one class', 'out of range'])
TAUS = st.sampled_from([0.01, 0.07, 0.1, 1., 100.])


def fuzz(examples):
    """As many examples, the same ones each time unless there are more."""
    return settings(
        max_examples=examples * FACTOR, deadline=None, database=None,
        derandomize=FACTOR == 1,
        suppress_health_check=[HealthCheck.too_slow,
                               HealthCheck.data_too_large])


class Draw:
    """Tensors that are a function of a seed."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape, dtype=torch.float32):
        return torch.rand(*shape, generator=self.generator).to(dtype)

    def normal(self, *shape, dtype=torch.float32, scale=1.):
        return (torch.randn(*shape, generator=self.generator)
                * scale).to(dtype)

    def integers(self, high, *shape):
        return torch.randint(high, shape, generator=self.generator)

    def chance(self, *shape):
        return self.uniform(*shape) < 0.5

    def labels(self, kind, classes, *shape):
        """Labels of a kind; those of 'any' are ignored in places."""
        labels = self.integers(classes, *shape)
        if kind == 'ignored':
            return torch.full_like(labels, IGNORE)
        if kind == 'one class':
            return torch.full_like(labels, classes - 1)
        if kind == 'out of range':
            odd = torch.tensor([IGNORE, -1, classes, 254, 0])
            return odd[self.integers(len(odd), *shape)]
        return labels.masked_fill(self.uniform(*shape) < 0.2, IGNORE)

    def probabilities(self, *shape, dtype=torch.float32):
        return (4 * self.normal(*shape)).softmax(1).to(dtype)


def finite(*tensors):
    """Whether nothing in them is NaN or infinite."""
    return all(bool(one.isfinite().all()) for one in tensors
               if one is not None)


def gradients(loss, *leaves):
    """Gradients of a loss; None where it does not depend on a leaf."""
    return torch.autograd.grad(loss, leaves, allow_unused=True)
