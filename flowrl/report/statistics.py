"""Statistics over few runs of several tasks, in plain numpy.

Scores are a list with one array (runs,) per task; tasks may have different numbers of runs. Interquartile
means and probabilities of improvement: Agarwal et al. 2021 (arXiv 2108.13264).
"""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 5000
CONFIDENCE = 0.95
PULLS = (1, 2, 5, 10, 20, 50, 100, 200)  # online episodes after which a bandit's choice is scored
BANDIT_REPEATS = 1000
BANDIT_ALPHA = 2.0

Scores = Sequence[np.ndarray]


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half over the last axis: a quarter of the values, rounded down, cut at each end."""
    count = scores.shape[-1]
    cut = count // 4
    return np.sort(scores, axis=-1)[..., cut : count - cut].mean(axis=-1)


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


def bandit_scores(policies: Scores, seed: int = 0) -> np.ndarray:
    """Scores of the policies that a bandit prefers after some online episodes, (BANDIT_REPEATS, len(PULLS)).

    Each pull draws one of a policy's episodes, with replacement. The upper confidence bound of a policy is
    mean + sqrt(alpha ln(t) / pulls); the score of the policy of highest mean so far is its mean over all
    its episodes. Source: Jackson et al. 2025 (arXiv 2504.11453, section 4), whose scores are normalised:
    elsewhere they must be of that scale, from about 0 to 100.

    Args:
        policies: one array (episodes,) per policy.
        seed: of the draws; all repeats differ.
    """
    random = np.random.default_rng(seed)
    counts = np.array([len(episodes) for episodes in policies])
    episodes = np.zeros((len(policies), counts.max()))
    for row, values in zip(episodes, policies, strict=True):
        row[: len(values)] = values
    true_means = np.array([values.mean() for values in policies])
    trial = np.arange(BANDIT_REPEATS)
    pulls, sums = np.zeros((2, BANDIT_REPEATS, len(policies)))
    scores = []
    for t in range(1, max(PULLS) + 1):
        means = sums / np.maximum(pulls, 1)
        widths = np.sqrt(BANDIT_ALPHA * np.log(t) / np.maximum(pulls, 1))
        bounds = np.where(pulls == 0, np.inf, means + widths)
        ties = random.random(bounds.shape) * (bounds == bounds.max(axis=1, keepdims=True))
        pulled = ties.argmax(axis=1)
        drawn = (random.random(BANDIT_REPEATS) * counts[pulled]).astype(np.int64)
        sums[trial, pulled] += episodes[pulled, drawn]
        pulls[trial, pulled] += 1
        if t in PULLS:
            means = np.where(pulls == 0, -np.inf, sums / np.maximum(pulls, 1))
            scores.append(true_means[means.argmax(axis=1)])
    return np.stack(scores, axis=1)


def mean_interval(samples: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrapped percentile interval of the mean of (samples, n) over its first axis; both bounds (n,)."""
    count = len(samples)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=count)
    return _interval(weights @ samples / count)


def difference_interval(differences: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Bootstrapped percentile interval of the mean of paired differences (pairs,)."""
    return _interval(_resample(differences, np.random.default_rng(seed)).mean(axis=1))


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation; NaN where one of the two does not vary."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def _resample(task: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(RESAMPLES, runs): runs of one task drawn with replacement."""
    return task[random.integers(len(task), size=(RESAMPLES, len(task)))]


def _interval(estimates: np.ndarray) -> tuple:
    """Bounds over the first axis."""
    low, high = np.quantile(estimates, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high
