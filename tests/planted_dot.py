"""Products of fused_kernels.py with a fault each: what tl.dot could silently become."""

from __future__ import annotations

import triton
import triton.language as tl
from prefkern.kernels.primitives import narrow, widen


@triton.jit
def bf16_sums(a, b, acc):
    """The accumulators have 8 bits."""
    a, b = widen(a, tl.float32), widen(b, tl.float32)
    return widen(narrow(tl.dot(a, b, acc, input_precision="ieee"), tl.bfloat16), tl.float32)


@triton.jit
def tf32_products(a, b, acc):
    """Operands are cut to the 10 bits that a tensor core keeps of an fp32 number."""
    a = (a.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    b = (b.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    return tl.dot(a, b, acc, input_precision="ieee")
