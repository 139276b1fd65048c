"""Update rules as device code: a few lines of arithmetic on a tile of decoded values.

Owns `update`, which chooses a method of `optimizer_work.METHODS` by its name at compile time, and
gives the bits of `client/optim/methods`: every bracket counts, and no multiplication may be fused
with an addition. A new method is a branch.
"""

import triton
import triton.language as tl


@triton.jit
def _sign(x):
    """1, -1 or 0; NaN of a NaN."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, tl.where(x == x, 0.0, x)))


@triton.jit
def _adam(scalars, p, g, m, v):
    """The moments after a step, and the direction in which they point."""
    m = m * tl.load(scalars + 3) + g * tl.load(scalars + 4)
    v = v * tl.load(scalars + 5) + (g * g) * tl.load(scalars + 6)
    below = tl.sqrt_rn(v) * tl.load(scalars + 7) + tl.load(scalars + 8)
    return m, v, tl.div_rn(m, below)


@triton.jit
def _ademamix(scalars, g, fast, slow, v):
    """The averages after a step, and the direction in which they point."""
    fast = fast * tl.load(scalars + 3) + g * tl.load(scalars + 4)
    v = v * tl.load(scalars + 5) + (g * g) * tl.load(scalars + 6)
    slow = slow * tl.load(scalars + 7) + g * tl.load(scalars + 8)
    above = fast * tl.load(scalars + 9) + slow * tl.load(scalars + 10)
    below = tl.sqrt_rn(v) * tl.load(scalars + 11) + tl.load(scalars + 12)
    return fast, slow, v, tl.div_rn(above, below)


@triton.jit
def _exadam(scalars, g, m, v):
    """The moments after a step, and the direction in which they point."""
    inverse1, inverse2 = tl.load(scalars + 7), tl.load(scalars + 8)
    eps = tl.load(scalars + 11)
    m = m * tl.load(scalars + 3) + g * tl.load(scalars + 4)
    v = v * tl.load(scalars + 5) + (g * g) * tl.load(scalars + 6)
    q = m * m
    d1 = tl.div_rn(v, v + eps) * tl.load(scalars + 10) + 1.0
    d2 = tl.div_rn(q, q + eps) * tl.load(scalars + 9) + 1.0
    t = inverse1 * d1
    above = m * t + g * t
    below = tl.sqrt_rn((v * inverse2) * d2) + eps
    return m, v, tl.div_rn(above, below)


@triton.jit
def update(METHOD: tl.constexpr, scalars, p, g, a, b, c, direction):
    """One step of a tile.

    Args:
        METHOD: One of `optimizer_work.METHODS`.
        scalars: Of this tensor, in the method's order.
        p: The parameter.
        g: The gradient, scaled.
        a: The method's states, in its order; whatever else where it has none.
        b: As `a`.
        c: As `a`.
        direction: What an earlier launch has written.

    Returns:
        The new p, a, b, c and direction.
    """
    if METHOD == "hessian":
        a = a * tl.load(scalars) + (g * g) * tl.load(scalars + 1)
    elif METHOD == "momentum_direction":
        a = a * tl.load(scalars) + g * tl.load(scalars + 1)
        direction = g * tl.load(scalars + 2) + a * tl.load(scalars + 3)
    elif METHOD == "apply":
        p = p * tl.load(scalars + 1) - tl.load(scalars) * direction
    else:
        step_size = tl.load(scalars)
        g = g + p * tl.load(scalars + 2)
        p = p * tl.load(scalars + 1)
        if METHOD == "adam":
            a, b, step = _adam(scalars, p, g, a, b)
        elif METHOD == "spam":
            theta = tl.load(scalars + 9)
            limit = tl.where(theta > 0.0, b * theta, float("inf"))
            g = tl.where(g * g > limit, _sign(g) * tl.sqrt_rn(limit), g)
            a, b, step = _adam(scalars, p, g, a, b)
        elif METHOD == "adam_direction":
            a, b, direction = _adam(scalars, p, g, a, b)
            step = direction
        elif METHOD == "lion":
            step = _sign(a * tl.load(scalars + 3) + g * tl.load(scalars + 4))
            a = a * tl.load(scalars + 5) + g * tl.load(scalars + 6)
        elif METHOD == "sgd":
            a = a * tl.load(scalars + 3) + g * tl.load(scalars + 4)
            step = g * tl.load(scalars + 5) + a * tl.load(scalars + 6)
        elif METHOD == "ademamix":
            a, b, c, step = _ademamix(scalars, g, a, b, c)
        elif METHOD == "exadam":
            a, b, step = _exadam(scalars, g, a, b)
        else:
            tl.static_assert(METHOD == "sophia")
            a = a * tl.load(scalars + 3) + g * tl.load(scalars + 4)
            share = tl.div_rn(tl.abs(a), b * tl.load(scalars + 5) + 1e-15)
            # A NaN goes on: the hardware's minimum would drop it.
            share = tl.where(share > 1.0, 1.0, share)
            step = _sign(a) * share
        p = p - step_size * step
    return p, a, b, c, direction
