"""Flow-Attention in a torch module of your own: all tokens at once to train, one at a time to generate.

python scripts/examples/attention_in_a_module.py 1000
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from flowrl import flow_attention, flow_attention_step


class FlowAttention(nn.Module):
    """Causal multi-head self-attention whose cost is linear in length."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same; linear in length."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (batch, length, 3, heads, head_dim)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, length, head_dim) each
        return self.project(flow_attention(queries, keys, values).transpose(1, 2).flatten(2))

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token, (batch, width), and the state after the tokens before it, whose size is constant."""
        queries, keys, values = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        output, state = flow_attention_step(queries, keys, values, state)
        return self.project(output.flatten(1)), state


if __name__ == "__main__":
    module, tokens = FlowAttention(width=64, heads=4), torch.randn(1, int(sys.argv[1]), 64)
    outputs, state = [], None
    with torch.no_grad():
        for token in tokens.unbind(1):
            output, state = module.step(token, state)
            outputs.append(output)
        difference = (torch.stack(outputs, 1) - module(tokens)).abs().max()
    print(f"{tokens.shape[1]} tokens at once and one at a time differ by at most {difference:.1e}")
