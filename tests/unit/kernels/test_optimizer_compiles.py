"""The device code compiles for a GPU: the interpreter accepts more than the compiler does.

Triton brings ptxas along, so no GPU is needed; but it interprets in the process of the other tests,
so a process of its own compiles.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from everstep.kernels.optimizer_program_triton import advance
from everstep.kernels.optimizer_work import METHODS

class Driver:
    # As much of one as device code asks what it is compiled for.
    arch = 90

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

active = Driver()
driver.set_active(active)

POINTERS = {"owners": "*i32", "table": "*i64"}
DIRECTED = {"adam_direction": "written", "momentum_direction": "written", "apply": "read"}
BLOCKS = {"int8": 64, "dynamic": 256, "fourbit": 128, "fp8": 128}

def ptx(method, kind, flat, vector, types, arch=90):
    active.arch = arch
    codecs = [
        kind if kind not in BLOCKS else kind + ("_second" if name in "vh" else "_signed")
        for name in METHODS[method].states
    ]
    codecs += [""] * (3 - len(codecs))
    blocks = [BLOCKS.get(kind, 0) if codec else 0 for codec in codecs]
    width = max(blocks) or 128
    read, written, gradients = types
    constants = dict(
        METHOD=method, READ=read, WRITTEN=written, GRADIENTS=gradients,
        DIRECTED=DIRECTED.get(method, ""), CODEC_A=codecs[0], CODEC_B=codecs[1], CODEC_C=codecs[2],
        BLOCK_A=blocks[0], BLOCK_B=blocks[1], BLOCK_C=blocks[2], WIDTH=width,
        BLOCKS=1024 // width, TILES=2, FLAT=flat, VECTOR=vector, GUARDED=True,
    )
    names = advance.arg_names
    signature = {name: POINTERS.get(name, "*fp32") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()}
    options = dict(num_warps=4, num_stages=1, enable_fp_fusion=False)
    source = ASTSource(advance, signature, values, {})
    target = active.get_current_target()
    return triton.compile(source, target=target, options=options).asm["ptx"]

words = ["div.rn", "div.full", "sqrt.rn", "sqrt.approx", ".ftz", "st.local", "e4m3x2"]
for case in json.loads(sys.argv[1]):
    text = ptx(*case)
    print(json.dumps({word: text.count(word) for word in words}), flush=True)
"""

PLAIN = ["fp32", "fp32", "fp32"]
CASES = [
    ["adam", "int8", True, 4, PLAIN],
    ["adam", "dynamic", False, 4, PLAIN],
    ["adam", "fourbit", False, 1, PLAIN],
    ["adam", "fp8", True, 4, PLAIN],
    ["adam", "bf16_int8", False, 8, ["split", "split", "bf16"]],
    ["adam", "bf16", True, 8, ["bf16", "random", "fp16"]],
    ["ademamix", "int8", True, 4, PLAIN],
    ["exadam", "fp32", True, 4, PLAIN],
    ["lion", "fourbit", True, 4, PLAIN],
    ["sgd", "fp8", False, 4, PLAIN],
    ["adam", "fp8", False, 1, PLAIN],
    ["adam", "fp8", True, 4, PLAIN, 80],
    ["sophia", "int8", True, 4, PLAIN],
    ["hessian", "fourbit", True, 4, ["", "", "fp32"]],
    ["spam", "fp32", True, 4, PLAIN],
    ["adam_direction", "bf16", True, 4, ["fp32", "", "fp32"]],
    ["momentum_direction", "int8", True, 4, ["", "", "bf16"]],
    ["apply", "fp32", True, 4, ["split", "split", ""]],
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_method_and_codec_compiles(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(CASES)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    made = [json.loads(line) for line in child.stdout.splitlines()]
    for case, counts in zip(CASES, made, strict=True):
        assert counts["div.full"] == counts["sqrt.approx"] == counts["st.local"] == 0, case
        # Only the words of PTX that are written out: near logarithms and reciprocals.
        assert counts[".ftz"] == 0 or case[1] in ("int8", "fp8"), case
        # Only where the target has it.
        assert (counts["e4m3x2"] > 0) == (case[1] == "fp8" and 80 not in case), case
    assert made[0]["div.rn"] > 0
    assert made[0]["sqrt.rn"] > 0
