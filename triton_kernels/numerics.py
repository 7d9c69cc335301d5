"""Scalar mathematics of the kernels, in the type of its first argument: float32 or float64.

NaN goes through everywhere, unless a function says otherwise.
"""

import triton
import triton.language as tl

NAN: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def at_most_finite(x):
    """Replace +inf by the largest finite number."""
    top = 3.4028234663852886e38 if x.dtype == tl.float32 else 1.7976931348623157e308
    return tl.minimum(x, top, propagate_nan=NAN)


@triton.jit
def finite(z):
    """Treat +-inf as the limit of ever larger logits."""
    return -at_most_finite(-at_most_finite(z))


@triton.jit
def exponential(x):
    """``exp(x)``. In float32 as a power of 2, which is one instruction on a GPU."""
    if x.dtype == tl.float32:
        result = tl.exp2(x * 1.4426950408889634)
    else:
        result = tl.exp(x)
    return result


@triton.jit
def reciprocal(x):
    """``1 / x`` for 1 <= x < 1e30. The square of a reciprocal root takes two instructions on a GPU
    in float32, the division nine.
    """
    if x.dtype == tl.float32:
        root = tl.rsqrt(x)
        result = root * root
    else:
        result = 1.0 / x
    return result


@triton.jit
def sigmoid(z):
    """``sigmoid(z)``, ``sigmoid(-z)`` and ``exp(-|z|)``, none of them a difference."""
    e = exponential(-tl.abs(z))
    high = reciprocal(1.0 + e)
    low = e * high
    return tl.where(z > 0, high, low), tl.where(z > 0, low, high), e


@triton.jit
def sigmoid_alone(z):
    """``sigmoid(z)`` to the bits of ``sigmoid``, in a form that holds one predicate less for long:
    where nothing else is needed of it, a thread with many values takes a fifth fewer registers.
    """
    e = exponential(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) * reciprocal(1.0 + e)


@triton.jit
def log_one_plus(x):
    """``log(1 + x)`` for 0 <= x <= 1 to 1.5 units in the last place in float32."""
    if x.dtype == tl.float32:
        # Relative minimax polynomial of log1p(x) / x: no special function unit, no branch.
        y = 0.005232690833508968 * x - 0.029505228623747826
        y = y * x + 0.07822594791650772
        y = y * x - 0.13663245737552643
        y = y * x + 0.19106008112430573
        y = y * x - 0.2484298199415207
        y = y * x + 0.3331909775733948
        y = y * x - 0.4999949336051941
        y = y * x + 0.9999999403953552
        result = y * x
    else:
        result = log_of_sum(1.0, x, 1.0 + x)
    return result


@triton.jit
def log_of_sum(a, b, total):
    """``log(a + b)`` given the rounded ``total`` >= 1; accurate near 1 to relative precision."""
    return tl.log(total) + (b - (total - a)) * reciprocal(total)


@triton.jit
def power(base, exponent, inverse, GAMMA: tl.constexpr):
    """``base ** gamma``, or ``base ** (gamma - 1)`` with ``inverse``, for base > 0 or gamma > 0."""
    if GAMMA == 2:
        result = base if inverse else base * base
    elif GAMMA == 1:
        result = tl.full([1, 1], 1.0, base.dtype) if inverse else base
    else:
        n = tl.full([1, 1], exponent, base.dtype)
        n = n - 1.0 if inverse else n
        result = tl.exp2(n * tl.log2(base))
    return result
