"""Does the compiler compute correctly? Small programs such as models are made of, against NumPy in float64.

jaxlib 0.10.2 computes wrong results on CPU without a word: a matrix product of each of many rows that is reduced at
once loses the last rows (https://github.com/jax-ml/jax/issues/39103). Tests of formulas miss such a fault, because it
depends on array sizes. These programs have sizes that show it, and sizes that may show others: just above powers of
two, odd, long.
"""

import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = {"float32": 2e-5, "float64": 1e-12}
"""The largest error of a correct program, as a share of the largest value. The fault above makes 2e-3 to 1."""

KNOWN_WRONG = {"0.10.2": "jax-ml/jax#39103"}
"""Versions of jaxlib that compute wrong results on CPU, and where that is reported."""


class Outcome(NamedTuple):
    """What one program computed."""

    name: str
    error: float
    """The largest difference from NumPy's float64 result, as a share of its largest value."""
    right: bool


class Program(NamedTuple):
    """A function to compile, and the same in NumPy; both take `inputs`."""

    name: str
    compiled: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: tuple[np.ndarray, ...]


def warn_of_known_fault() -> None:
    """Warns in one line if the installed jaxlib is known to compute wrong results on this backend."""
    version = importlib.metadata.version("jaxlib")
    if version in KNOWN_WRONG and jax.default_backend() == "cpu":
        warnings.warn(
            f"jaxlib {version} computes wrong results on CPU ({KNOWN_WRONG[version]}): install another version",
            stacklevel=3,
        )


def run_programs() -> tuple[Outcome, ...]:
    """Compiles and runs every program on the default device; takes a few seconds."""
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        return tuple(_outcome(program) for program in _programs())


def _outcome(program: Program) -> Outcome:
    wide = [x.astype(np.float64) if x.dtype == np.float32 else x for x in program.inputs]
    expected = np.asarray(program.reference(*wide))
    result = np.asarray(jax.jit(program.compiled)(*program.inputs))
    error = float(np.max(np.abs(result - expected)) / np.max(np.abs(expected)))
    return Outcome(program.name, error, bool(error <= TOLERANCE[str(result.dtype)]))  # NaN is not right


def _programs() -> list[Program]:
    """Every program. `both` makes one whose formula reads the same in JAX and in NumPy."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def both(name: str, function: Callable[..., Any], *inputs: np.ndarray) -> Program:
        return Program(
            name, lambda *arrays: function(jnp, *arrays), lambda *arrays: function(np, *arrays), tuple(inputs)
        )

    return [
        *(_reported(both, dtype, rows) for dtype, rows in (("float64", 16_385), ("float32", 32_769))),
        # Products that are reduced at once. XLA fuses a product with 3 columns into the reduction.
        Program(
            "RMS norm of a 3 x 3 product for each row",
            _row_rms_norm,
            _row_rms_norm_reference,
            (normal(32_769, 3), normal(3, 3)),
        ),
        both("squares of a product, summed a row", _row_squares, normal(32_769, 3), normal(3, 3)),
        both("squares of a batched product, summed", _batched_squares, normal(4_097, 5, 7), normal(4_097, 7, 3)),
        both("norms of the rows of a product", _row_norms, normal(16_385, 32), normal(32, 48)),
        both("mean of a product over the rows", _product_mean, normal(8_193, 24), normal(24, 65)),
        both("largest of a product a row", _row_maxima, normal(8_193, 24), normal(24, 65)),
        # Long sums.
        both("sum of 2^16 + 1 numbers", lambda xp, x: x.sum(), np.abs(normal(65_537))),
        both("sums of columns", lambda xp, x: x.sum(axis=0), np.abs(normal(70_001, 3))),
        both("sums of rows of 2^16 + 3", lambda xp, x: x.sum(axis=1), np.abs(normal(5, 65_539))),
        both("running sum", lambda xp, x: xp.cumsum(x, axis=1), np.abs(normal(3, 5_001))),
        both("sum over the middle of five axes", _middle_sum, normal(10, 4, 6, 9, 11), normal(10, 4, 6, 9, 11)),
        # Parts of a transformer.
        both("layer norm", _layer_norm, normal(4_099, 192)),
        both("log of a sum of exponentials", _logsumexp, normal(1_025, 5_003)),
        Program(
            "cross entropy", _cross_entropy(jnp), _cross_entropy(np), (normal(2_049, 65), rng.integers(65, size=2_049))
        ),
        Program(
            "masked softmax of long rows", _attention(jnp), _attention(np), (normal(2, 513, 12), normal(2, 513, 12))
        ),
        Program(
            "weight gradient",
            jax.grad(_mlp_loss(jnp), argnums=1),
            _mlp_weight_grad,
            (normal(4_097, 33), normal(33, 65)),
        ),
        Program("bias gradient", jax.grad(_bias_loss, argnums=1), _bias_grad, (normal(64, 67, 65), normal(65))),
        Program(
            "embedding gradient",
            jax.grad(_embedding_loss),
            _embedding_grad,
            (normal(65, 17), rng.integers(65, size=8_193)),
        ),
        # A cache, and loops.
        Program(
            "scatter into a cache",
            _scatter,
            _scatter_reference,
            (normal(8, 33, 4), normal(8, 4), np.arange(8) * 5 % 33),
        ),
        Program("gather from a cache", _gather, _gather, (normal(8, 513, 12), rng.integers(513, size=(8, 7)))),
        Program("while loop of products", _power(True), _power(False), (normal(17, 17) / 8, normal(17))),
        Program("scan of a recurrent cell", _cell(True), _cell(False), (normal(101, 5, 16), normal(16, 16) / 4)),
    ]


def _reported(both: Callable[..., Program], dtype: str, rows: int) -> Program:
    """The program of jax-ml/jax#39103: each row times a 3 x 3 matrix, then the sum of its squares."""
    x = np.zeros((rows, 3), dtype)
    x[:, 0] = np.arange(rows)

    def function(xp: Any, x: Any, matrix: Any) -> Any:
        return ((x[:, None, :] * matrix).sum(axis=-1) ** 2).sum(axis=-1)

    def compiled(x: Any, matrix: Any) -> Any:
        return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(x)

    program = both(f"a 3 x 3 product for each of {rows:,} rows, {dtype}", function, x, np.eye(3, dtype=dtype))
    return program._replace(compiled=compiled)


def _row_rms_norm(x, matrix):
    def norm(row):
        return (matrix @ row) / jnp.sqrt(jnp.mean((matrix @ row) ** 2) + 1e-5)

    return jax.vmap(norm)(x)


def _row_rms_norm_reference(x, matrix):
    products = x @ matrix.T
    return products / np.sqrt(np.square(products).mean(axis=-1, keepdims=True) + 1e-5)


def _row_squares(xp, x, kernel):
    return ((x @ kernel) ** 2).sum(axis=-1)


def _batched_squares(xp, x, y):
    return (xp.matmul(x, y) ** 2).sum(axis=(1, 2))


def _row_norms(xp, x, kernel):
    return xp.sqrt(xp.square(x @ kernel).sum(axis=-1))


def _product_mean(xp, x, kernel):
    return xp.abs(x @ kernel).mean(axis=0)


def _row_maxima(xp, x, kernel):
    return (x @ kernel).max(axis=-1)


def _middle_sum(xp, x, y):
    return (x * y).sum(axis=2)


def _layer_norm(xp, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / xp.sqrt(xp.square(centred).mean(axis=-1, keepdims=True) + 1e-5)


def _logsumexp(xp, x):
    largest = x.max(axis=-1, keepdims=True)
    return xp.log(xp.exp(x - largest).sum(axis=-1)) + largest[:, 0]


def _cross_entropy(xp):
    return lambda logits, targets: _logsumexp(xp, logits) - logits[xp.arange(len(targets)), targets]


def _attention(xp):
    def function(queries, keys):
        scores = xp.einsum("btd,bsd->bts", queries, keys)
        seen = xp.tril(xp.ones(scores.shape[1:], bool))[None]
        scores = xp.where(seen, scores, -1e30)
        weights = xp.exp(scores - scores.max(axis=-1, keepdims=True))
        return xp.einsum("bts,bsd->btd", weights / weights.sum(axis=-1, keepdims=True), keys)

    return function


def _mlp_loss(xp):
    return lambda x, kernel: xp.square(xp.tanh(x @ kernel)).sum()


def _mlp_weight_grad(x, kernel):
    hidden = np.tanh(x @ kernel)
    return x.T @ (2 * hidden * (1 - hidden**2))


def _bias_loss(x, bias):
    return jnp.square(x + bias[None, None]).sum() / 2


def _bias_grad(x, bias):
    return (x + bias).sum(axis=(0, 1))


def _embedding_loss(table, tokens):
    return jnp.square(table[tokens]).sum() / 2


def _embedding_grad(table, tokens):
    return table * np.bincount(tokens, minlength=len(table))[:, None]


def _scatter(cache, new, slots):
    return cache.at[jnp.arange(len(new)), slots].set(new)


def _scatter_reference(cache, new, slots):
    cache = cache.copy()
    cache[np.arange(len(new)), slots] = new
    return cache


def _gather(cache, slots):
    return cache[np.arange(len(slots))[:, None], slots]


def _power(compiled):
    """Twelve times: multiply by a matrix, divide by the norm."""

    def step(xp, matrix, x):
        x = xp.einsum("ij,j->i", matrix, x)
        return x / xp.sqrt(xp.square(x).sum())

    def in_jax(matrix, x):
        return jax.lax.while_loop(lambda c: c[0] < 12, lambda c: (c[0] + 1, step(jnp, matrix, c[1])), (0, x))[1]

    def in_numpy(matrix, x):
        for _ in range(12):
            x = step(np, matrix, x)
        return x

    return in_jax if compiled else in_numpy


def _cell(compiled):
    """h = tanh(x + h W) over a sequence; the sum of h a step."""

    def step(xp, state, x, kernel):
        return xp.tanh(x + state @ kernel)

    def in_jax(xs, kernel):
        def body(state, x):
            state = step(jnp, state, x, kernel)
            return state, state.sum(axis=-1)

        return jax.lax.scan(body, jnp.zeros_like(xs[0]), xs)[1]

    def in_numpy(xs, kernel):
        state, sums = np.zeros_like(xs[0]), []
        for x in xs:
            state = step(np, state, x, kernel)
            sums.append(state.sum(axis=-1))
        return np.stack(sums)

    return in_jax if compiled else in_numpy
