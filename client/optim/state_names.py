"""What optimizers of torch and others call their states, and what kind of number each holds.

Owns the table. Promises no guess: a name that is not in it has no role, and such state stays as it
is until somebody says (`compress(roles=...)`). Left out on purpose, since rounding after each step
breaks them: sums without decay (Adagrad's `sum`), step sizes (Rprop), what is counted or drawn.
"""

SIGNED = "signed"
SECOND = "second"
WEIGHT = "weight"

ROLE_OF_STATE = {
    "exp_avg": SIGNED,
    "exp_avg_fast": SIGNED,
    "exp_avg_slow": SIGNED,
    "grad_avg": SIGNED,
    "hessian_momentum": SIGNED,
    "m": SIGNED,
    "momentum": SIGNED,
    "momentum_buffer": SIGNED,
    "prev": SIGNED,
    "acc_delta": SECOND,
    "exp_avg_sq": SECOND,
    "exp_avg_var": SECOND,
    "exp_hessian_diag_sq": SECOND,
    "exp_inf": SECOND,
    "hessian": SECOND,
    "hessian_moment": SECOND,
    "max_exp_avg_sq": SECOND,
    "square_avg": SECOND,
    "v": SECOND,
    "ax": WEIGHT,
    "master": WEIGHT,
    "p0": WEIGHT,
    "z": WEIGHT,
}

LEFT_AS_THEY_ARE = {
    "sum": "a sum without decay: rounded each step, it would stop growing",
    "step_size": "step sizes change by factors, which codes would round away",
}
"""Known, and not to be compressed; the reason."""
