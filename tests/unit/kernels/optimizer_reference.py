"""Works with random tensors, and what a step makes of them, in torch: the arithmetic of `adam` etc.

Codecs are those of `client/optim`, so that kernels are compared with what users have elsewhere.
"""

import copy
import struct

import torch

from everstep.client.optim.codecs.codec import Codec, Parts, Role
from everstep.client.optim.codecs.companded import Companded
from everstep.client.optim.codecs.corrected import Corrected, joined, split
from everstep.client.optim.codecs.dynamic import Dynamic
from everstep.client.optim.codecs.fourbit import FourBit
from everstep.client.optim.codecs.fp8 import Fp8
from everstep.kernels.optimizer_work import METHODS, CodedState, Work

CODED: dict[str, tuple[Codec, Role]] = {
    "bf16_int8": (Corrected(), "weight"),
    "int8_signed": (Companded(), "signed"),
    "int8_second": (Companded(), "second"),
    "dynamic_signed": (Dynamic(), "signed"),
    "dynamic_second": (Dynamic(), "second"),
    "fourbit_signed": (FourBit(), "signed"),
    "fourbit_second": (FourBit(), "second"),
    "fp8_signed": (Fp8(), "signed"),
    "fp8_second": (Fp8(), "second"),
}
BLOCKS = {"int8": 64, "dynamic": 256, "fourbit": 128, "fp8": 128}
SECOND = {"v", "h"}

SCALARS = {
    "step_size": 0.01, "decay": 0.999, "l2": 0.01, "b1": 0.9, "c1": 0.1, "b2": 0.99, "c2": 0.01,
    "root": 1.7, "eps": 1e-8, "momentum": 0.9, "x": 0.5, "y": 0.9, "b3": 0.9999, "c3": 0.0001,
    "inverse1": 3.0, "inverse2": 2.5, "alpha": 5.0, "b1t": 0.7, "b2t": 0.97, "rho": 0.04,
    "theta": 50.0,
}  # fmt: skip


def single(value: float) -> float:
    """Rounded to fp32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def encode(codec: str, block: int, values: torch.Tensor) -> CodedState:
    """A state that stands for fp32 [rows, row]."""
    if codec in ("fp32", "bf16"):
        return CodedState(codec, 0, values.clone() if codec == "fp32" else values.bfloat16())
    coder, role = CODED[codec]
    parts = coder.encode(values, role, block)
    return CodedState(codec, block, parts.codes, parts.scales, parts.correction)


def decode(state: CodedState, rows: int, row: int) -> torch.Tensor:
    """The fp32 [rows, row] that a state stands for."""
    if state.codec in ("fp32", "bf16"):
        return state.codes.float().reshape(rows, row)
    coder, role = CODED[state.codec]
    parts = Parts(state.codes, state.scales, state.correction)
    return coder.decode(parts, role, state.block, (rows, row))


def make_work(
    method: str,
    codec: str,
    shape: tuple[int, int] = (3, 300),
    types: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    *,
    corrected: bool = False,
    seed: int = 0,
    draw: int = 1,
    **scalars: float,
) -> Work:
    """A work with random tensors; `codec` without a role."""
    generator = torch.Generator().manual_seed(draw)

    def noise() -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        return values * torch.exp(3 * torch.randn(shape, generator=generator))

    known = METHODS[method]
    states = []
    for name in known.states:
        values = noise() ** 2 if name in SECOND else noise()
        role = "_second" if name in SECOND else "_signed"
        full = codec if codec in ("fp32", "bf16", "bf16_int8") else codec + role
        states.append(encode(full, BLOCKS.get(codec, 0), values * 0.01))
    parameter = noise()
    low, correction = split(parameter) if corrected else (None, None)
    return Work(
        rows=shape[0],
        row=shape[1],
        parameter=parameter.to(types[0]) if low is None else low,
        gradient=None if method == "apply" else noise().to(types[1]),
        states=tuple(states),
        scalars=tuple(single(scalars.get(name, SCALARS[name])) for name in known.scalars),
        correction=correction,
        direction=noise() if method == "apply" or "direction" in method else None,
        seed=seed,
    )


def step(work: Work, method: str, grad_scale: float = 1.0) -> Work:
    """What a step makes of a work; the work stays as it is."""
    work = copy.deepcopy(work)
    shape = (work.rows, work.row)
    states = [decode(state, *shape) for state in work.states]
    p = joined(work.parameter, work.correction) if work.correction is not None else work.parameter
    g = torch.zeros(shape) if work.gradient is None else work.gradient.float()
    p, states, direction = update(
        method, dict(zip(METHODS[method].scalars, work.scalars, strict=True)),
        p.float(), g * single(grad_scale), states, work.direction,
    )  # fmt: skip
    for place, values in enumerate(states):
        if not (method == "sophia" and place == 1):
            state = work.states[place]
            fresh = encode(state.codec, state.block, values)
            state.codes, state.scales, state.correction = (
                fresh.codes, fresh.scales, fresh.correction,
            )  # fmt: skip
    work.direction = direction
    if method in ("hessian", "adam_direction", "momentum_direction"):
        return work
    if work.correction is not None:
        work.parameter, work.correction = split(p)
    elif work.seed and work.parameter.dtype == torch.bfloat16:
        work.parameter = round_at_random(p, work.seed)
    else:
        work.parameter = p.to(work.parameter.dtype)
    return work


def sign(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isnan(), x, torch.sign(x))


def root_of(x: torch.Tensor) -> torch.Tensor:
    """To the nearest, which torch's own is not on CPUs."""
    return x.double().sqrt().float()


def update(method, s, p, g, states, direction):  # type: ignore[no-untyped-def]
    """The lines of the design, operation by operation."""
    m, *rest = states or [None]
    if method == "hessian":
        return p, [m * s["b2"] + (g * g) * s["c2"]], direction
    if method == "momentum_direction":
        m = m * s["b1"] + g * s["c1"]
        return p, [m], g * s["x"] + m * s["y"]
    if method == "apply":
        return p * s["decay"] - direction * s["step_size"], [], direction
    g = g + p * s["l2"]
    p = p * s["decay"]
    if method == "lion":
        u = m * s["b1"] + g * s["c1"]
        return p - sign(u) * s["step_size"], [m * s["b2"] + g * s["c2"]], direction
    if method == "sgd":
        m = m * s["momentum"] + g * s["c1"]
        return p - (g * s["x"] + m * s["y"]) * s["step_size"], [m], direction
    if method == "sophia":
        m = m * s["b1"] + g * s["c1"]
        share = torch.div(m.abs(), rest[0] * s["rho"] + single(1e-15))
        share = torch.minimum(share, torch.ones_like(share))
        return p - (sign(m) * share) * s["step_size"], [m, rest[0]], direction
    v = rest[-1]
    if method == "spam":
        limit = v * s["theta"]
        spike = (g * g > limit) & (s["theta"] > 0)
        g = torch.where(spike, sign(g) * root_of(limit), g)
    m = m * s["b1"] + g * s["c1"]
    v = v * s["b2"] + (g * g) * s["c2"]
    if method == "exadam":
        d1 = torch.div(v, v + s["eps"]) * s["b2t"] + 1.0
        q = m * m
        d2 = torch.div(q, q + s["eps"]) * s["b1t"] + 1.0
        t = d1 * s["inverse1"]
        below = root_of((v * s["inverse2"]) * d2) + s["eps"]
        return p - torch.div(m * t + g * t, below) * s["step_size"], [m, v], direction
    below = root_of(v) * s["root"] + s["eps"]
    if method == "ademamix":
        slow = rest[0] * s["b3"] + g * s["c3"]
        step = torch.div(m * s["inverse1"] + slow * s["alpha"], below)
        return p - step * s["step_size"], [m, slow, v], direction
    step = torch.div(m, below)
    if method == "adam_direction":
        return p, [m, v], step
    return p - step * s["step_size"], [m, v], direction


def round_at_random(values: torch.Tensor, seed: int) -> torch.Tensor:
    """bf16 by the words of Philox4x32-10, key `seed`, counter the flat index."""
    mask = 0xFFFFFFFF
    bits = values.contiguous().view(torch.int32).flatten().tolist()
    found = []
    for index, word in enumerate(bits):
        word &= mask
        counter, key = [index, 0, 0, 0], [seed & mask, seed >> 32 & mask]
        for _ in range(10):
            high = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
            counter = [
                high[1] >> 32 ^ counter[1] ^ key[0], high[1] & mask,
                high[0] >> 32 ^ counter[3] ^ key[1], high[0] & mask,
            ]  # fmt: skip
            key = [key[0] + 0x9E3779B9 & mask, key[1] + 0xBB67AE85 & mask]
        if word & 0x7F800000 != 0x7F800000:
            word = word + (counter[0] & 0xFFFF) & mask
        found.append((word >> 16) - (word >> 16 & 0x8000) * 2)
    made = torch.tensor(found, dtype=torch.int16).view(torch.bfloat16).reshape(values.shape)
    return torch.where(values.isnan(), torch.tensor(torch.nan, dtype=torch.bfloat16), made)
