"""The sequence model, read top to bottom: embeddings, pre-LayerNorm blocks, tanh head.

Two token layouts. ``interleaved`` is the Decision Transformer's (arXiv 2106.01345): three tokens a timestep,
return-to-go, observation, action; the action is read from the observation's token. ``fused`` is one token
a timestep, the sum of the embeddings of the return-to-go, the observation and the previous action, so that
the return reaches every action undiluted and the sequence is a third as long.

Everything enters and leaves in the data's own units: observation normalisation, return scale and action
bounds are buffers of the model (see ``action_model.py``), so they travel with its weights.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from flowrl.attention.cosformer import MAX_TOKENS
from flowrl.attention.heads import split_heads
from flowrl.attention.kinds import AttentionName, State, attention_kind
from flowrl.model.action_model import ActionModel
from flowrl.native.acting import PackedBlocks, can_act, can_pack
from flowrl.native.pointwise import Dropout, add_linear, linear_relu
from flowrl.native.products import Linear

TokenLayout = Literal["interleaved", "fused"]
TOKENS_PER_TIMESTEP: dict[TokenLayout, int] = {"interleaved": 3, "fused": 1}
INIT_STD = 0.02


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Defaults: the paper's reinforcement-learning experiments."""

    observation_dim: int
    action_dim: int
    max_timesteps: int
    """Longest episode the timestep embedding covers; later timesteps use its last row."""
    attention: AttentionName = "flow"
    token_layout: TokenLayout = "interleaved"
    num_layers: int = 3
    embed_dim: int = 256
    num_heads: int = 4
    dropout: float = 0.1
    context_tokens: int = MAX_TOKENS
    """Tokens of the longest context in training: cosFormer's M, of no effect on other kinds."""


class Window(NamedTuple):
    """Consecutive timesteps of one episode per row, padded on the right; in the data's units."""

    observations: Tensor  # (batch, length, observation_dim)
    actions: Tensor  # (batch, length, action_dim)
    previous_actions: Tensor  # (batch, length, action_dim), whatever at an episode's first timestep
    returns_to_go: Tensor  # (batch, length)
    timesteps: Tensor  # (batch, length) int64, counted from the episode's start


class SelfAttention(nn.Module):
    """Multi-head causal attention of the configured kind."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = attention_kind(config.attention, config.context_tokens)
        self.num_heads = config.num_heads
        self.qkv = Linear(config.embed_dim, 3 * config.embed_dim)
        self.project = Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, read: slice) -> Tensor:
        """(batch, length, embed_dim) -> what the heads gathered for the tokens in ``read``, unprojected."""
        queries, keys, values = split_heads(self.qkv(x), self.num_heads)  # (batch, heads, length, head_dim)
        outputs = self.kind.parallel(queries, keys, values)
        return outputs[:, :, read].transpose(1, 2).flatten(2)

    def steps(self, x: Tensor, state: State | None, read: slice) -> tuple[Tensor, State]:
        """The same of (tokens, batch, embed_dim), and the state after all tokens."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (tokens, batch, 3, heads, head_dim)
        queries, keys, values = qkv.permute(2, 1, 3, 0, 4)  # each (batch, heads, tokens, head_dim)
        outputs, state = self.kind.steps(queries, keys, values, state)
        return outputs[:, :, read].permute(2, 0, 1, 3).flatten(2), state


class Block(nn.Module):
    """Pre-LayerNorm transformer block: attention, then a four times wider MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.embed_dim)
        self.attention = SelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.embed_dim)
        widen = Linear(config.embed_dim, 4 * config.embed_dim)
        narrow = Linear(4 * config.embed_dim, config.embed_dim)
        self.mlp = nn.Sequential(widen, nn.ReLU(), narrow)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, read: slice = slice(None)) -> Tensor:
        """(batch, length, embed_dim) -> the same, of the tokens in ``read`` alone."""
        gathered = self.attention(self.attention_norm(x), read)
        x = add_linear(x[:, read], gathered, self.attention.project, self.dropout)
        widen, _, narrow = cast(list[nn.Linear], list(self.mlp))
        hidden = linear_relu(self.mlp_norm(x), widen)
        return add_linear(x, hidden, narrow, self.dropout)

    @property
    def parts(self) -> list[nn.Linear | nn.LayerNorm]:
        """The modules with weights, in the order of use."""
        widen, _, narrow = cast(list[nn.Linear], list(self.mlp))
        attention = self.attention
        return [self.attention_norm, attention.qkv, attention.project, self.mlp_norm, widen, narrow]

    def steps(self, x: Tensor, state: State | None, read: slice) -> tuple[Tensor, State]:
        """(tokens, batch, embed_dim) -> the same, of the tokens in ``read``, and the state after all."""
        gathered, state = self.attention.steps(self.attention_norm(x), state, read)
        x = x[read] + self.attention.project(gathered)
        return x + self.mlp(self.mlp_norm(x)), state


class SequenceModel(ActionModel):
    """Predicts the action of every timestep from the return-to-go and the history so far."""

    return_scale: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.observation_dim, config.action_dim)
        self.config = config
        self._packed: PackedBlocks | None = None  # see prepare_to_act
        width = config.embed_dim
        self.embed_return = Linear(1, width)
        self.embed_observation = Linear(config.observation_dim, width)
        self.embed_action = Linear(config.action_dim, width)
        self.embed_timestep = nn.Embedding(config.max_timesteps, width)
        if config.token_layout == "fused":
            self.start_token = nn.Parameter(
                INIT_STD * torch.randn(width)
            )  # where there is no previous action
        self.embed_norm = nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.final_norm = nn.LayerNorm(width)
        self.predict_action = Linear(width, config.action_dim)
        self.register_buffer("return_scale", torch.ones(()))
        self.apply(_initialise)

    def forward(self, window: Window) -> Tensor:
        """Return the actions (batch, length, action_dim) in [-1, 1], where -1 and 1 stand for the bounds."""
        x = self.embed_norm(self._embed(window))  # (batch, tokens, embed_dim)
        x = self.dropout(x)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, self._read)
        return torch.tanh(self.predict_action(self.final_norm(x)))

    def loss(self, window: Window, valid: Tensor) -> Tensor:
        """Mean squared error over the valid timesteps, (batch, length) bool."""
        return self.mean_squared_error(self(window), window.actions, valid)

    @property
    def _read(self) -> slice:
        """The tokens that an action is read from."""
        return slice(1, None, 3) if self.config.token_layout == "interleaved" else slice(None)

    def _embed(self, window: Window) -> Tensor:
        time = self._embed_time(window.timesteps)
        returns = self.embed_return(self._scale_returns(window.returns_to_go)) + time
        observations = self.embed_observation(self.normalize_observations(window.observations))
        if self.config.token_layout == "fused":
            started = (window.timesteps > 0)[..., None]
            return returns + observations + self._embed_previous(window.previous_actions, started)
        actions = self._embed_action(window.actions, time)
        tokens = torch.stack((returns, observations + time, actions), dim=2)  # (batch, length, 3, embed_dim)
        return tokens.flatten(1, 2)[:, :-1]  # nobody reads the final action

    # One timestep at a time -------------------------------------------------------------------------------

    def prepare_to_act(self) -> None:
        """Copy the blocks' weights for faster steps without gradients, where C++ can take them.

        Steps go by the copies until the next call of this method or :meth:`train`.
        """
        config, blocks = self.config, cast(list[Block], list(self.blocks))
        packs = config.attention == "flow" and can_pack(
            config.embed_dim, config.num_heads, self.embed_return.weight
        )
        self._packed = PackedBlocks([b.parts for b in blocks], config.num_heads) if packs else None

    def train(self, mode: bool = True) -> Self:
        """Switch dropout on, and forget what :meth:`prepare_to_act` copied; or off, with ``mode`` False."""
        if mode:
            self._packed = None
        return super().train(mode)

    def step(
        self,
        returns_to_go: Tensor,
        observations: Tensor,
        previous_actions: Tensor | None,
        timesteps: Tensor,
        states: list,
    ) -> tuple[Tensor, list]:
        """The recurrent form of :meth:`forward`: read a timestep's (batch, ...) inputs, return its actions.

        ``states`` holds one attention state a layer, None before the first token; it must not be used again.
        The interleaved layout reads the actions taken at ``timesteps - 1`` here, in one go with the rest;
        None where there are none or :meth:`step_action` has told them. The fused layout always takes them.
        """
        time = self._embed_time(timesteps)
        returns = self.embed_return(self._scale_returns(returns_to_go)) + time
        observed = self.embed_observation(self.normalize_observations(observations))
        if self.config.token_layout == "fused":
            assert previous_actions is not None
            tokens = [returns + observed + self._embed_previous(previous_actions, (timesteps > 0)[:, None])]
        else:
            tokens = [returns, observed + time]
            if previous_actions is not None:
                tokens.insert(0, self._embed_action(previous_actions, self._embed_time(timesteps - 1)))
        x, states = self._steps(torch.stack(tokens), states)
        return torch.tanh(self.predict_action(self.final_norm(x))), states

    def step_action(self, actions: Tensor, timesteps: Tensor, states: list) -> list:
        """Tell an interleaved model the (batch, action_dim) actions taken at ``timesteps`` by themselves."""
        return self._steps(self._embed_action(actions, self._embed_time(timesteps))[None], states)[1]

    def _steps(self, tokens: Tensor, states: list) -> tuple[Tensor, list]:
        """(tokens, batch, embed_dim) -> the last token's (batch, embed_dim), and the states after all."""
        x, new_states = self.embed_norm(tokens), []
        if self._packed is not None and can_act(x, states):
            return self._packed.act(x, states)
        blocks = cast(list[Block], list(self.blocks))
        for block, state in zip(blocks, states, strict=True):
            x, state = block.steps(x, state, slice(None) if block is not blocks[-1] else slice(-1, None))
            new_states.append(state)
        return x[-1], new_states

    # Parts of tokens ---------------------------------------------------------------------------------------

    def _scale_returns(self, returns_to_go: Tensor) -> Tensor:
        return (returns_to_go / self.return_scale)[..., None]

    def _embed_time(self, timesteps: Tensor) -> Tensor:
        return self.embed_timestep(timesteps.clamp(max=self.config.max_timesteps - 1))

    def _embed_action(self, actions: Tensor, time: Tensor) -> Tensor:
        return self.embed_action(self.normalize_actions(actions)) + time

    def _embed_previous(self, previous_actions: Tensor, started: Tensor) -> Tensor:
        embedded = self.embed_action(self.normalize_actions(previous_actions))
        return torch.where(started, embedded, self.start_token.to(embedded.dtype))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
