"""Flow-Attention straight from its formula: the oracle that every fast form is tested against.

Slow on purpose (each sum is written out with a mask) and quadratic in length. Never used in training.
Source: Flowformer (arXiv 2202.06258), Eq. 4-9, and the causal form of its reinforcement-learning
experiments, where sums run over the past and n_i = i counts the tokens seen so far.
"""

import torch
from torch import Tensor


def naive_flow_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    causal: bool = True,
    clamp: float = 10.0,
    eps: float = 1e-6,
) -> Tensor:
    """Return Flow-Attention of (batch, heads, length, head_dim) tensors given before the sigmoid.

    ``values`` may have another width; the result is (batch, heads, sinks, value_dim). The bidirectional
    form accepts a number of sources different from the number of sinks.
    """
    sinks, sources = queries.sigmoid(), keys.sigmoid()
    if causal:
        return _naive_causal(sinks, sources, values, clamp, eps)
    return _naive_bidirectional(sinks, sources, values, clamp, eps)


def _naive_causal(q: Tensor, k: Tensor, v: Tensor, clamp: float, eps: float) -> Tensor:
    length = q.shape[-2]
    n = torch.arange(1, length + 1, dtype=q.dtype, device=q.device)  # n_i = i
    seen = torch.ones(length, length, dtype=q.dtype, device=q.device).tril()  # seen[i, j] = 1 where j <= i

    def past_sum(x: Tensor) -> Tensor:  # (..., length, width) -> sums over j <= i
        return seen @ x

    incoming = ((q + eps) * (past_sum(k) + eps)).sum(-1)  # I_i
    outgoing = ((k + eps) * (past_sum(q) + eps)).sum(-1)  # O_j
    conserved_sink = ((q + eps) * (past_sum((n / outgoing)[..., None] * k) + eps)).sum(-1) / n
    conserved_source = ((k + eps) * (past_sum((n / incoming)[..., None] * q) + eps)).sum(-1) / n
    exponential = conserved_source.clamp(-clamp, clamp).exp()
    competition = n * exponential / past_sum(exponential[..., None])[..., 0]  # C_j
    weights = (q @ k.transpose(-1, -2)) * seen  # q_i . k_j for j <= i
    aggregated = weights @ (competition[..., None] * v)
    return conserved_sink.sigmoid()[..., None] * aggregated / incoming[..., None]


def _naive_bidirectional(q: Tensor, k: Tensor, v: Tensor, clamp: float, eps: float) -> Tensor:
    num_sinks, num_sources = q.shape[-2], k.shape[-2]
    incoming = ((q + eps) * (k.sum(-2, keepdim=True) + eps)).sum(-1)  # Eq. 4
    outgoing = ((k + eps) * (q.sum(-2, keepdim=True) + eps)).sum(-1)
    conserved_sink = ((q + eps) * ((k / outgoing[..., None]).sum(-2, keepdim=True) + eps)).sum(-1)  # Eq. 7
    conserved_source = ((k + eps) * ((q / incoming[..., None]).sum(-2, keepdim=True) + eps)).sum(-1)
    competition = num_sources * conserved_source.clamp(-clamp, clamp).softmax(-1)  # Eq. 8
    aggregated = (q @ k.transpose(-1, -2)) @ (competition[..., None] * v)
    allocation = (conserved_sink * num_sinks / num_sources).sigmoid()  # Eq. 9
    return allocation[..., None] * aggregated / incoming[..., None]
