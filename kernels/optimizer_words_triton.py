"""Words of PTX that Triton has no name for, each beside what it means in the interpreter.

Owns `look_up`, a load from a small table, and `divide_tame`, a division without exceptional cases.
Promises the same bits either way.
"""

import triton
import triton.language as tl


@triton.jit
def _compiled():
    pass


# Triton decides at its import whether to compile or to interpret.
COMPILED = tl.constexpr(isinstance(_compiled, triton.JITFunction))


@triton.jit
def look_up(table, index):
    """Entries of a fp32 table that stays as it is while the program runs.

    A load of Triton's would take the tile to another layout, and back through shared memory.
    """
    if COMPILED:
        value = tl.inline_asm_elementwise(
            """
            {
            .reg .b64 place;
            mul.wide.u32 place, $2, 4;
            add.s64 place, place, $1;
            ld.global.nc.f32 $0, [place];
            }
            """,
            "=f,l,r",
            [table.to(tl.int64), index],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        value = tl.load(table + index)
    return value


@triton.jit
def look_up_pair(table, index):
    """Pairs of a fp32 number and an int32 in a table as `look_up` has; it begins at 8 bytes."""
    if COMPILED:
        number, whole = tl.inline_asm_elementwise(
            """
            {
            .reg .b64 place;
            mul.wide.u32 place, $3, 8;
            add.s64 place, place, $2;
            ld.global.nc.v2.b32 {$0, $1}, [place];
            }
            """,
            "=r,=r,l,r",
            [table.to(tl.int64), index],
            dtype=(tl.float32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        number = tl.load(table + index * 2)
        whole = tl.load(table + index * 2 + 1).to(tl.int32, bitcast=True)
    return number, whole


@triton.jit
def divide_tame(a, b):
    """``a / b`` to the nearest, for b between 2**-60 and 2**60 and a between 2**-60 and 2**60.

    What `tl.div_rn` does where nothing overflows, without the branch for where something does: the
    elements of a thread can overtake each other. Where `a` is smaller the quotient may be off.
    """
    if COMPILED:
        quotient = tl.inline_asm_elementwise(
            """
            {
            .reg .f32 inverse, error, near;
            rcp.approx.ftz.f32 inverse, $2;
            neg.f32 error, $2;
            fma.rn.f32 near, error, inverse, 0f3F800000;
            fma.rn.f32 inverse, inverse, near, inverse;
            mul.rn.f32 near, $1, inverse;
            fma.rn.f32 $0, error, near, $1;
            fma.rn.f32 near, inverse, $0, near;
            fma.rn.f32 $0, error, near, $1;
            fma.rn.f32 $0, inverse, $0, near;
            }
            """,
            "=&f,f,f",
            [a, b],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        quotient = tl.div_rn(a, b)
    return quotient
