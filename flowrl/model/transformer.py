"""The sequence model, read top to bottom: attention, pre-LayerNorm blocks, embeddings, tanh head.

Two token layouts. ``interleaved`` is the Decision Transformer's (arXiv 2106.01345): three tokens a timestep,
return-to-go, observation, action; the action is predicted from the observation's token. ``fused`` is one
token a timestep, the sum of the embeddings of the return-to-go, the observation and the previous action, so
that the return reaches every action undiluted and the sequence is a third as long.
"""

from typing import Literal, NamedTuple

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flowrl.attention.kinds import SOURCE_CLAMP, AttentionName, State, attention_kind
from flowrl.attention.linear import MAX_TOKENS
from flowrl.attention.precision import without_autocast
from flowrl.model.action_model import ActingState, ActionModel
from flowrl.options import STRICT, ConvolutionWidth, NumLayers, Probability, Size, SourceClamp
from flowrl.window import Window

MixerName = Literal[AttentionName, "gru"]
TokenLayout = Literal["interleaved", "fused"]
TOKENS_PER_TIMESTEP: dict[TokenLayout, int] = {"interleaved": 3, "fused": 1}
TimeEncoding = Literal["learned", "sinusoidal", "none"]
INIT_STD = 0.02
LONGEST_WAVE = 10_000  # timesteps, over 2 pi, of the slowest sinusoid


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The shape of a model. Defaults: the paper's reinforcement-learning experiments."""

    observation_dim: Size
    action_dim: Size
    max_timesteps: Size
    """Longest episode the timestep embedding covers; later timesteps use its last row."""
    attention: MixerName = "flow"
    token_layout: TokenLayout = "interleaved"
    num_layers: NumLayers = 3
    embed_dim: Size = 256
    num_heads: Size = 4
    dropout: Probability = 0.1
    action_choices: tuple[Size, ...] = ()
    """Numbers of choices of discrete actions, whose one-hot vectors make up ``action_dim``."""
    context_tokens: Size = MAX_TOKENS
    """Tokens of the longest context in training: cosFormer's M, of no effect on other kinds."""
    time_encoding: TimeEncoding = "learned"
    source_clamp: SourceClamp = SOURCE_CLAMP
    """Bound on Flow-Attention's conserved source before its exponential, of no effect on other kinds."""
    convolution_width: ConvolutionWidth = 0
    """Tokens that the causal convolution before the blocks spans; 0: there is none."""

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}")
        if self.action_choices and sum(self.action_choices) != self.action_dim:
            raise ValueError(
                f"action_choices {self.action_choices} must add up to action_dim {self.action_dim}"
            )


class SelfAttention(nn.Module):
    """Multi-head causal attention of the configured kind."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.attention != "gru"
        self.kind = attention_kind(config.attention, config.context_tokens, config.source_clamp)
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.project = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, read: slice) -> Tensor:
        """(batch, length, embed_dim) -> the same, of the tokens in ``read`` alone."""
        outputs = self.kind.parallel(*self._heads(x))
        return self.project(outputs[:, :, read].transpose(1, 2).flatten(2))

    def step(self, x: Tensor, state: State | None, read: slice) -> tuple[Tensor, State]:
        """The same from the state after earlier tokens, and the state after all of these."""
        outputs = []
        for query, key, value in zip(*(part.unbind(2) for part in self._heads(x)), strict=True):
            output, state = self.kind.step(query, key, value, state)
            outputs.append(output.flatten(1))
        return self.project(torch.stack(outputs[read], dim=1)), state

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (batch, heads, length, head_dim)."""
        queries, keys, values = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return queries, keys, values


class GRUState(NamedTuple):
    """All that a GRU remembers."""

    hidden: Tensor  # (batch, embed_dim)


class GRU(nn.Module):
    """torch's gated recurrent unit in the place of attention: the baseline with a state of constant size.

    Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder" (arXiv 1406.1078).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gru = nn.GRU(config.embed_dim, config.embed_dim, batch_first=True)

    def forward(self, x: Tensor, read: slice) -> Tensor:
        return self.step(x, None, read)[0]

    def step(self, x: Tensor, state: GRUState | None, read: slice) -> tuple[Tensor, GRUState]:
        with without_autocast(x):  # which would compute in float16 on CUDA, whatever its dtype
            x = x.to(next(self.gru.parameters()).dtype)
            outputs, hidden = self.gru(x, None if state is None else state.hidden[None])
        return outputs[:, read], GRUState(hidden[0])


class Block(nn.Module):
    """Pre-LayerNorm transformer block: attention, then a four times wider MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.attention_norm = nn.LayerNorm(width)
        self.attention = GRU(config) if config.attention == "gru" else SelfAttention(config)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, read: slice = slice(None)) -> Tensor:
        """(batch, length, embed_dim) -> the same, of the tokens in ``read`` alone."""
        x = x[:, read] + self.dropout(self.attention(self.attention_norm(x), read))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def step(self, x: Tensor, state: State | None, read: slice) -> tuple[Tensor, State]:
        """The same from the state after earlier tokens, and the state after all of these."""
        attended, state = self.attention.step(self.attention_norm(x), state, read)
        x = x[:, read] + attended
        return x + self.mlp(self.mlp_norm(x)), state


class SinusoidalTime(nn.Module):
    """Sines and cosines of the timestep, defined for any. Source: Vaswani et al. (2017), section 3.5.

    A learned scale begins at the size of the other embeddings, which the waves would drown.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.scale = nn.Parameter(torch.full((), INIT_STD * 2**0.5))

    def forward(self, timesteps: Tensor) -> Tensor:
        """(...) int64 -> (..., width)."""
        waves = torch.arange((self.width + 1) // 2, device=timesteps.device)
        angles = timesteps[..., None] * LONGEST_WAVE ** (-2 * waves / self.width)
        return self.scale * torch.cat((angles.sin(), angles.cos()), dim=-1)[..., : self.width]


class RecentTokens(NamedTuple):
    """All that a convolution remembers."""

    tokens: Tensor  # (batch, width - 1, embed_dim); zeros stand for those before the first one


class TokenConvolution(nn.Module):
    """Adds to each token a linear map of itself and the few before it.

    Attention by sums over the whole past hardly singles out the last token but one, and a velocity takes two
    positions. Source: Kim et al., "Decision ConvFormer" (arXiv 2310.03022), has convolutions alone.
    """

    def __init__(self, embed_dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.map = nn.Linear(width * embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, embed_dim) -> the same."""
        return self.step(x, None)[0]

    def step(self, x: Tensor, state: RecentTokens | None) -> tuple[Tensor, RecentTokens]:
        """The same from the state after earlier tokens, and the state after all of these."""
        batch, length, embed_dim = x.shape
        before = x.new_zeros(batch, self.width - 1, embed_dim) if state is None else state.tokens
        tokens = torch.cat((before, x), dim=1)
        spans = [tokens[:, first : first + length] for first in range(self.width)]
        return x + self.map(torch.cat(spans, dim=-1)), RecentTokens(tokens[:, length:])


class SequenceModel(ActionModel):
    """Predicts the action of every timestep from the return-to-go and the history so far."""

    has_memory = True
    return_scale: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.observation_dim, config.action_dim, config.action_choices)
        self.config = config
        width = config.embed_dim
        self.embed_return = nn.Linear(1, width)
        self.embed_observation = nn.Linear(config.observation_dim, width)
        self.embed_action = nn.Linear(config.action_dim, width)
        if config.time_encoding == "learned":
            self.embed_timestep: nn.Module = nn.Embedding(config.max_timesteps, width)
        elif config.time_encoding == "sinusoidal":
            self.embed_timestep = SinusoidalTime(width)
        if config.token_layout == "fused":  # stands for the previous action at an episode's first timestep
            self.start_token = nn.Parameter(INIT_STD * torch.randn(width))
        if config.convolution_width > 0:
            self.convolution = TokenConvolution(width, config.convolution_width)
        self.embed_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.final_norm = nn.LayerNorm(width)
        self.predict_action = nn.Linear(width, config.action_dim)
        self.register_buffer("return_scale", torch.ones(()))
        self.apply(_initialize)

    def forward(self, window: Window) -> Tensor:
        """Return the actions (batch, length, action_dim) in [-1, 1], or the logits of discrete ones."""
        x = self._embed(window)  # (batch, tokens, embed_dim)
        if self.config.convolution_width > 0:
            x = self.convolution(x)
        x = self.dropout(self.embed_norm(x))
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, self._action_tokens)
        return self._predict(x)

    @property
    def _action_tokens(self) -> slice:
        """The tokens that actions are predicted from: the last block computes no others."""
        return slice(1, None, 3) if self.config.token_layout == "interleaved" else slice(None)

    def _embed(self, window: Window) -> Tensor:
        """The tokens of a window (batch, tokens, embed_dim)."""
        time = self._embed_time(window.timesteps)
        returns = self._embed_return(window.returns_to_go) + time
        observations = self._embed_observation(window.observations)
        if self.config.token_layout == "fused":
            return returns + observations + self._embed_previous(window.previous_actions, window.timesteps)
        actions = self._embed_action(window.actions) + time
        tokens = torch.stack((returns, observations + time, actions), dim=2)  # (batch, length, 3, embed_dim)
        return tokens.flatten(1, 2)[:, :-1]  # no prediction depends on the last action

    # One timestep at a time -------------------------------------------------------------------------------

    def start(self, batch: int) -> ActingState:
        parts = self.config.num_layers + (self.config.convolution_width > 0)
        return super().start(batch)._replace(layers=(None,) * parts)

    def step(
        self, observations: Tensor, returns_to_go: Tensor, timesteps: Tensor, state: ActingState
    ) -> tuple[Tensor, ActingState]:
        """See :meth:`ActionModel.step`.

        The interleaved layout reads the previous actions together with this timestep's return and
        observation, while they are pending.
        """
        time = self._embed_time(timesteps)
        returns = self._embed_return(returns_to_go) + time
        observed = self._embed_observation(observations)
        if self.config.token_layout == "fused":
            tokens = [returns + observed + self._embed_previous(state.previous_actions, timesteps)]
        else:
            tokens = [returns, observed + time]
            if state.pending:
                tokens.insert(0, self._embed_pending(state, timesteps))
        x, layers = self._read(torch.stack(tokens, dim=1), state.layers)
        pending = self.config.token_layout == "interleaved"
        return self._predict(x), state._replace(layers=layers, pending=pending)

    def restart(self, state: ActingState, rows: Tensor, timesteps: Tensor) -> ActingState:
        """See :meth:`ActionModel.restart`. The rows that continue read their pending actions first."""
        if state.pending:
            tokens = self._embed_pending(state, timesteps)[:, None]
            state = state._replace(layers=self._read(tokens, state.layers)[1], pending=False)
        return state.clear(rows)

    def _read(self, tokens: Tensor, layers: tuple) -> tuple[Tensor, tuple]:
        """Pass new tokens through the convolution, whose state is the first in ``layers``, and the blocks."""
        if self.config.convolution_width == 0:
            return self.read(self.embed_norm(tokens), layers)
        tokens, recent = self.convolution.step(tokens, layers[0])
        last, layers = self.read(self.embed_norm(tokens), layers[1:])
        return last, (recent, *layers)

    def read(self, tokens: Tensor, layers: tuple) -> tuple[Tensor, tuple]:
        """Pass new tokens through the blocks; ``flowrl.native.accelerate`` may replace this method.

        ``tokens`` are (batch, tokens, embed_dim), ``layers`` the attention states before them. Returns the
        last token's (batch, embed_dim), and the states after all of them.
        """
        states, x = [], tokens
        for index, (block, state) in enumerate(zip(self.blocks, layers, strict=True)):
            last = index == len(self.blocks) - 1
            assert isinstance(block, Block)
            x, state = block.step(x, state, slice(-1, None) if last else slice(None))
            states.append(state)
        return x[:, -1], tuple(states)

    def _predict(self, x: Tensor) -> Tensor:
        outputs = self.predict_action(self.final_norm(x))
        return outputs if self.action_choices else torch.tanh(outputs)

    # Parts of tokens ---------------------------------------------------------------------------------------

    def _embed_time(self, timesteps: Tensor) -> Tensor:
        if self.config.time_encoding == "none":
            return self.return_scale.new_zeros(())
        if self.config.time_encoding == "learned":  # one row for all later timesteps
            timesteps = timesteps.clamp(max=self.config.max_timesteps - 1)
        return self.embed_timestep(timesteps)

    def _embed_return(self, returns_to_go: Tensor) -> Tensor:
        return self.embed_return((returns_to_go / self.return_scale)[..., None])

    def _embed_observation(self, observations: Tensor) -> Tensor:
        return self.embed_observation(self.normalize_observations(observations))

    def _embed_action(self, actions: Tensor) -> Tensor:
        return self.embed_action(self.normalize_actions(actions))

    def _embed_previous(self, previous_actions: Tensor, timesteps: Tensor) -> Tensor:
        embedded = self._embed_action(previous_actions)
        return torch.where((timesteps > 0)[..., None], embedded, self.start_token.to(embedded.dtype))

    def _embed_pending(self, state: ActingState, timesteps: Tensor) -> Tensor:
        return self._embed_action(state.previous_actions) + self._embed_time(timesteps - 1)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
