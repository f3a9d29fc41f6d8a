"""Statistics over few runs of several tasks, after Agarwal et al. 2021 (arXiv 2108.13264), in plain numpy.

Scores are a list with one array (runs,) per task; tasks may have different numbers of runs.
"""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 5000
CONFIDENCE = 0.95

Scores = Sequence[np.ndarray]


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half over the last axis: a quarter of the values, rounded down, cut at each end."""
    count = scores.shape[-1]
    cut = count // 4
    return np.sort(scores, axis=-1)[..., cut : count - cut].mean(axis=-1)


def standard_error(values: np.ndarray) -> float:
    """Sample standard deviation over the square root of the count; NaN for a single value."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def improvement(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Share of pairs (..., m) x (..., n) in which ``first`` is higher, ties for a half; shape (...)."""
    a, b = first[..., :, None], second[..., None, :]
    return ((a > b) + 0.5 * (a == b)).mean(axis=(-2, -1))


def probability_of_improvement(first: Scores, second: Scores) -> float:
    """Probability that a run of ``first`` scores higher than one of ``second``, averaged over tasks."""
    return float(np.mean([improvement(a, b) for a, b in zip(first, second, strict=True)]))


def interquartile_mean_interval(scores: Scores, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the interquartile mean over all runs, resampling runs within each task."""
    random = np.random.default_rng(seed)
    resampled = np.concatenate([_resample(task, random) for task in scores], axis=1)  # (resamples, runs)
    return _interval(interquartile_mean(resampled))


def improvement_interval(first: Scores, second: Scores, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of :func:`probability_of_improvement`, resampling runs within each task."""
    random = np.random.default_rng(seed)
    per_task = [
        improvement(_resample(a, random), _resample(b, random)) for a, b in zip(first, second, strict=True)
    ]
    return _interval(np.mean(per_task, axis=0))


def _resample(task: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(RESAMPLES, runs): runs of one task drawn with replacement."""
    return task[random.integers(len(task), size=(RESAMPLES, len(task)))]


def _interval(estimates: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(estimates, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
