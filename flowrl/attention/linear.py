"""Linear attention with the features elu(x) + 1 (Katharopoulos et al. 2020, arXiv 2006.16236).

Queries and keys are not scaled: the features are no exponentials of their product.
"""

from torch import Tensor

from flowrl.attention.causal_linear import LinearState, causal_linear_attention, causal_linear_attention_step


def linear_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal linear attention of (batch, heads, length, head_dim) tensors; see ``causal_linear.py``."""
    return causal_linear_attention(queries, keys, values, elu_features)


def linear_attention_step(
    query: Tensor, key: Tensor, value: Tensor, state: LinearState | None = None
) -> tuple[Tensor, LinearState]:
    """One token in, one out: (batch, heads, head_dim) tensors; constant time and memory."""
    return causal_linear_attention_step(query, key, value, state, elu_features)


def elu_features(queries: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """elu(x) + 1 of both, (..., head_dim); the same at every position."""
    return _elu_plus_one(queries), _elu_plus_one(keys)


def _elu_plus_one(x: Tensor) -> Tensor:
    # x + 1 above 0 and exp(x) below; elu(x) itself rounds to -1 long before its sum with 1 should vanish.
    return x.relu() + x.clamp(max=0).exp()
