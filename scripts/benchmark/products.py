"""The matrix products that an update cannot do without, and how long this machine takes for them alone.

Counted from the model's shapes, not from what the code does: work done twice or in vain is not "needed".
At a share of 100% an update would do these products at the speed of the sgemm routine, and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from workload import num_tokens

from flowrl.model.transformer import SequenceModel
from flowrl.native.linear import library_is_held_back, onednn_product

ONE_BLOCK = 128  # tokens up to which the attention's Gram matrix is one block's; else blocks of head_dim


@dataclass(frozen=True)
class Product:
    """``times`` products of (batch, rows, inner) and (batch, inner, columns) matrices, as BLAS gets them."""

    batch: int
    rows: int
    inner: int
    columns: int
    times: int = 1
    left_transposed: bool = False
    right_transposed: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.rows * self.inner * self.columns * self.times


class ProductRunner:
    """Runs a list's products of single matrices, the linear layers', on operands that are made once.

    Attention's are many small ones that no library does at its full rate: they are taken to need the time of
    as many operations of the others, :attr:`scale` times that of a call altogether.
    """

    def __init__(self, products: list[Product]) -> None:
        self.flops = sum(product.flops for product in products)
        single = [product for product in products if product.batch == 1]
        self.scale = self.flops / sum(product.flops for product in single)
        self._work: list[tuple[int, Callable[[], Tensor]]] = []
        for product in single:
            left = _operand(product.rows, product.inner, product.left_transposed)
            right = _operand(product.inner, product.columns, product.right_transposed)
            self._work.append((product.times, _routine(product, left, right)))

    def __call__(self) -> None:
        for times, routine in self._work:
            for _ in range(times):
                routine()


def needed_products(model: SequenceModel, batch_size: int, timesteps: int) -> list[Product]:
    """The products of one update, forward and backward, on ``batch_size`` windows of ``timesteps``.

    Linear layers: the outputs, the weights' gradient and, but for the embeddings of data, the inputs'
    gradient. Attention: per block of C tokens the Gram matrix and its product with the values, each with
    two gradients; where there are several blocks, also the (head_dim, head_dim) memory's two products. In
    the last block only the tokens that an action is read from go on to the projection and the MLP.
    """
    config = model.config
    width, read = config.embed_dim, batch_size * timesteps
    length = num_tokens(model, timesteps)
    tokens = batch_size * length
    products: list[Product] = []
    for inputs in (1, config.observation_dim, config.action_dim):
        products += _linear(read, inputs, width, input_gradient=False)
    for rows, layers in ((tokens, config.num_layers - 1), (read, 1)):
        products += _linear(rows, width, width, times=layers)
        products += _linear(rows, width, 4 * width, times=layers)
        products += _linear(rows, 4 * width, width, times=layers)
    products += _linear(tokens, width, 3 * width, times=config.num_layers)
    products += _linear(read, width, config.action_dim)
    head_dim = width // config.num_heads
    products += _attention(batch_size * config.num_heads, length, head_dim, config.num_layers)
    return [product for product in products if product.times]


def _linear(
    rows: int, inputs: int, outputs: int, *, times: int = 1, input_gradient: bool = True
) -> list[Product]:
    forward = Product(1, rows, inputs, outputs, times, right_transposed=True)
    weights = Product(1, outputs, rows, inputs, times, left_transposed=True)
    return [forward, weights] + [Product(1, rows, outputs, inputs, times)] * input_gradient


def _attention(sequences: int, length: int, head_dim: int, layers: int) -> list[Product]:
    block = length if length <= ONE_BLOCK else head_dim
    blocks = sequences * -(-length // block)
    gram = Product(blocks, block, head_dim, block, 2 * layers, right_transposed=True)  # G, gradient of G
    applied = Product(blocks, block, block, head_dim, 4 * layers)  # G v, gradients of v, q and k
    if length <= ONE_BLOCK:
        return [gram, applied]
    return [gram, applied, Product(blocks, block, head_dim, head_dim, 6 * layers)]  # with the memory


def _routine(product: Product, left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    """The product by the library that updates use on this machine."""
    if library_is_held_back():
        return partial(onednn_product, left, right.mT)
    return partial(torch.mm, left, right)


def _operand(rows: int, columns: int, transposed: bool) -> Tensor:
    return torch.randn(columns, rows).mT if transposed else torch.randn(rows, columns)
