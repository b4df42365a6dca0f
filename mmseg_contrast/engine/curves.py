"""Validation curves of several runs as one picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Curve = tuple[Sequence[float], Sequence[float]]


def read_curve(path: str | Path,
               key: str = 'mIoU') -> tuple[list[int], list[float]]:
    """Read a validation metric over iterations from mmengine's scalars.

    Args:
        path (str or Path): A ``vis_data/scalars.json``.
        key (str): Name of the metric, such as ``mIoU`` or ``teacher/mIoU``.

    Returns:
        tuple: Iterations and values, sorted by iteration; both empty when
        the metric was never logged.
    """
    points: dict[int, float] = {}
    trained = 0
    for line in Path(path).read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the last line of a killed run
            continue
        if 'iter' in record:
            trained = int(record['iter'])
        elif key in record:
            # `step` is the epoch when log_metric_by_epoch=True
            points[max(int(record.get('step', 0)), trained)] = record[key]
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def distinct_colors(number: int) -> list[Any]:
    """Colours that can be told apart, up to twenty; then they repeat.

    Args:
        number (int): How many are wanted.

    Returns:
        list: Colours, as matplotlib takes them.
    """
    import matplotlib
    name = 'tab10' if number <= 10 else 'tab20'
    colors = matplotlib.color_sequences[name]
    return [colors[at % len(colors)] for at in range(number)]


def draw_curves(curves: Mapping[str, Sequence[Curve]],
                out_png: str | Path,
                title: str = '',
                ylabel: str = 'target mIoU') -> None:
    """Draw curves, those of one label in one colour.

    Args:
        curves (Mapping): Label to a list of ``(iterations, values)``, one for
            every run (seed).
        out_png (str or Path): Picture to write; folders are made.
        title (str): Title of the picture.
        ylabel (str): What is drawn.
    """
    # Figure without pyplot: no global state, no display, works in a hook.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.5, 4.2), dpi=90)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = distinct_colors(len(curves))
    for (label, runs), color in zip(curves.items(), colors, strict=True):
        for number, (steps, values) in enumerate(runs):
            axes.plot(steps, values, marker='o', ms=3, lw=1.4,
                      color=color, alpha=0.8,
                      label=label if number == 0 else None)
    axes.set_xlabel('iteration')
    axes.set_ylabel(ylabel)
    if title:
        axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    if curves:
        # Beside the curves: with many labels it would hide them.
        axes.legend(fontsize=8, loc='upper left', bbox_to_anchor=(1, 1))
    figure.tight_layout()
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, metadata={'Software': None})


def plot_curves(scalars_json_paths: Sequence[str | Path],
                labels: Sequence[str],
                out_png: str | Path,
                key: str = 'mIoU',
                title: str = '') -> None:
    """Draw a validation metric of several runs over the iterations.

    Args:
        scalars_json_paths (Sequence): A ``vis_data/scalars.json`` per run.
        labels (Sequence[str]): A label per run; runs of one label (seeds)
            share its colour.
        out_png (str or Path): Picture to write.
        key (str): Name of the metric.
        title (str): Title of the picture.

    Raises:
        ValueError: If the numbers of runs and labels differ.
    """
    if len(scalars_json_paths) != len(labels):
        raise ValueError(
            f'plot_curves got {len(scalars_json_paths)} scalars.json files '
            f'but {len(labels)} labels; give one label per file.')
    curves: dict[str, list[Curve]] = {}
    for path, label in zip(scalars_json_paths, labels, strict=True):
        curves.setdefault(label, []).append(read_curve(path, key))
    draw_curves(curves, out_png, title=title, ylabel=f'target {key}')
