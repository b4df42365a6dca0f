"""Vectors in the plane: PCA and t-SNE, in numpy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

_TINY = 1e-12
# The paper's momentum, and where it rises (section 3.4).
_MOMENTUM = (0.5, 0.8)
_RISE = 250


@dataclass
class Axes:
    """Directions of largest variance.

    Args:
        mean (Array): ``(D,)``.
        directions (Array): Orthonormal rows, ``(K, D)``.
        shares (Array): Part of the whole variance along each, ``(K,)``.
    """

    mean: Array
    directions: Array
    shares: Array

    def project(self, points: Array) -> Array:
        """Coordinates along the directions, ``(N, K)``.

        Args:
            points (Array): ``(N, D)``.
        """
        return (points - self.mean) @ self.directions.T


def pca(points: Array, components: int = 2) -> Axes:
    """Directions of largest variance, by a singular value decomposition.

    The largest entry of each direction is positive, so that pictures of the
    same vectors are not mirrored. What the vectors have too few dimensions
    for is 0.

    Args:
        points (Array): ``(N, D)``, N >= 1.
        components (int): Number of directions K, >= 1.

    Returns:
        Axes: float64.

    Raises:
        ValueError: If there are no points or no components.
    """
    if components < 1 or not len(points):
        raise ValueError(f'pca needs points and components, got '
                         f'{len(points)} and {components}')
    points = np.asarray(points, np.float64)
    mean = points.mean(0)
    _, lengths, rows = np.linalg.svd(points - mean, full_matrices=False)
    power = lengths**2
    directions = np.zeros((components, points.shape[1]))
    shares = np.zeros(components)
    found = min(components, len(rows))
    directions[:found] = rows[:found]
    shares[:found] = power[:found] / max(power.sum(), _TINY)
    largest = np.abs(directions).argmax(1)
    signs = np.sign(directions[np.arange(components), largest])
    return Axes(mean, directions * signs[:, None], shares)


def tsne(points: Array,
         perplexity: float = 30.,
         iterations: int = 500,
         exaggeration: float = 12.,
         exaggerated: int = 125,
         learning_rate: float | None = None) -> Array:
    """Map that keeps neighbours: t-SNE (van der Maaten and Hinton, 2008).

    Gradient descent on the Kullback-Leibler divergence between how likely
    two vectors are neighbours (normal distributions of a common perplexity)
    and how likely two points of the plane are (Student's t). All pairs are
    compared: time and memory are O(N^2), about 25 s for 2,000 points on one
    core. It starts at the PCA, so nothing is drawn at random; equal vectors
    stay at one point.

    Args:
        points (Array): ``(N, D)``.
        perplexity (float): Effective number of neighbours, >= 1; at most
            ``(N - 1) / 3`` is used.
        iterations (int): Steps, >= 1.
        exaggeration (float): Factor of the attraction in the first steps, so
            that clusters find together (12 in the author's later code, 4 in
            the paper).
        exaggerated (int): Steps with it.
        learning_rate (float, optional): None is ``N / exaggeration``, at
            least 10 (Belkina et al., 2019).

    Returns:
        Array: float64, ``(N, 2)``, with mean 0.

    Raises:
        ValueError: If an argument is out of range.
    """
    if perplexity < 1 or iterations < 1 or exaggeration < 1:
        raise ValueError(
            'tsne needs perplexity, iterations and exaggeration >= 1, got '
            f'{perplexity}, {iterations} and {exaggeration}')
    number = len(points)
    points = np.asarray(points, np.float64)
    if number < 4:  # no neighbours to speak of
        return pca(points).project(points) if number else np.zeros((0, 2))
    likely = joint_probabilities(
        squared_distances(points), min(perplexity, (number - 1) / 3))
    plane = pca(points).project(points)
    plane *= 1e-4 / max(plane[:, 0].std(), _TINY)
    rate = learning_rate or max(number / exaggeration, 10.)
    velocity = np.zeros_like(plane)
    gains = np.ones_like(plane)
    for step in range(iterations):
        factor = exaggeration if step < exaggerated else 1.
        gradient = kl_gradient(factor * likely, plane)
        # Jacobs' rule: faster where the direction stays the same.
        same = np.sign(gradient) != np.sign(velocity)
        gains = np.maximum(np.where(same, gains + 0.2, gains * 0.8), 0.01)
        momentum = _MOMENTUM[step >= _RISE]
        velocity = momentum * velocity - rate * gains * gradient
        plane += velocity
        plane -= plane.mean(0)
    return plane


def squared_distances(points: Array) -> Array:
    """Squared Euclidean distances of all pairs, ``(N, N)``, >= 0.

    Args:
        points (Array): ``(N, D)``.
    """
    norms = np.einsum('nd,nd->n', points, points)
    distances = norms[:, None] + norms - 2 * points @ points.T
    np.fill_diagonal(distances, 0)
    return np.maximum(distances, 0)


def joint_probabilities(distances: Array, perplexity: float,
                        steps: int = 50) -> Array:
    """How likely two vectors are neighbours.

    Each vector's normal distribution is as wide as gives the entropy
    ``log(perplexity)``, found by bisection for all vectors at once.

    Args:
        distances (Array): Squared, ``(N, N)``.
        perplexity (float): In [1, N - 1].
        steps (int): Of the bisection.

    Returns:
        Array: Symmetric, ``(N, N)``, 0 on the diagonal, with sum 1.
    """
    number = len(distances)
    others = ~np.eye(number, dtype=bool)
    # Only differences matter: the nearest neighbour has an exponent of 0.
    nearest = np.where(others, distances, np.inf).min(1, keepdims=True)
    gaps = np.where(others, distances - nearest, 0)
    low = np.zeros((number, 1))
    high = np.full((number, 1), np.inf)
    precision = np.full((number, 1), 1 / max(gaps[others].mean(), _TINY))
    for _ in range(steps):
        weights = np.exp(-gaps * precision) * others
        total = weights.sum(1, keepdims=True)
        entropy = np.log(total) + precision * (
            gaps * weights).sum(1, keepdims=True) / total
        wide = entropy > np.log(perplexity)
        low = np.where(wide, precision, low)
        high = np.where(wide, high, precision)
        precision = np.where(
            np.isinf(high), 2 * precision,
            (low + np.where(np.isinf(high), 0, high)) / 2)
        # Equal vectors have no width of that entropy.
        precision = np.minimum(precision, 1e30)
    weights = np.exp(-gaps * precision) * others
    conditional = weights / weights.sum(1, keepdims=True)
    return (conditional + conditional.T) / (2 * number)


def kl_divergence(likely: Array, plane: Array) -> float:
    r"""The divergence that t-SNE makes small.

    .. math::
        KL(P, Q) = \sum_{i \ne j} p_{ij} \log \frac{p_{ij}}{q_{ij}}

    Args:
        likely (Array): P, ``(N, N)``.
        plane (Array): ``(N, 2)``.
    """
    near = _student(plane)
    mine = near / near.sum()
    pairs = likely > 0
    return float((likely[pairs] * np.log(
        likely[pairs] / np.maximum(mine[pairs], _TINY**2))).sum())


def kl_gradient(likely: Array, plane: Array) -> Array:
    r"""Gradient of the divergence with respect to the points of the plane.

    .. math::
        4 \sum_j (p_{ij} - q_{ij}) (y_i - y_j) (1 + |y_i - y_j|^2)^{-1}

    Args:
        likely (Array): P, ``(N, N)``; for early exaggeration its sum is more
            than 1.
        plane (Array): ``(N, 2)``.

    Returns:
        Array: ``(N, 2)``.
    """
    near = _student(plane)
    pull = (likely - near / near.sum()) * near
    return 4 * (pull.sum(1, keepdims=True) * plane - pull @ plane)


def _student(plane: Array) -> Array:
    """Student's t with one degree of freedom, not scaled, 0 with itself."""
    near = 1 / (1 + squared_distances(plane))
    np.fill_diagonal(near, 0)
    return near
