"""Elementary functions that portable Triton lacks, for float32 and float64: to the last digits, without libdevice.

Where a formula needs a number that depends on the type, the type decides at compile time.
"""

import triton
import triton.language as tl

# What a kernel is not compiled anew for: sizes, strides and numbers, and whether a tensor begins at a 16-byte boundary.
RUN_TIME = (
    "rows", "row_stride", "dense_stride", "class_stride", "upstream_stride", "ignore_index", "V", "count", "programs",
    "transform", "numbers", "temperature", "reference_stride",
)  # fmt: skip
ANYWHERE = ("x", "target", "dense", "class_weight", "logit_scale", "upstream", "gradient", "coefficient_tensor",
            "reference")  # fmt: skip


@triton.jit
def lowest(A: tl.constexpr):
    """The most negative finite number of the type A: a maximum of nothing; −inf − (−inf) would be NaN."""
    return -1.7976931348623157e308 if A == tl.float64 else -3.4028234663852886e38


@triton.jit
def least_exponent(A: tl.constexpr):
    """A t whose exp(t) is 0 in the type A, subnormals included: where t stands beside exp(t), 0·(−inf) would be NaN."""
    return -800.0 if A == tl.float64 else -106.0


@triton.jit
def zero_of(x):
    """0 in x's type and shape, whatever x holds."""
    return tl.where(x > 0, 0.0, 0.0).to(x.dtype)


@triton.jit
def exp(x):
    """exp(x) for x ≤ 100 with an error that does not grow with |x|: for numbers of a row.

    On GPUs `tl.exp` is 2^(x·log2 e) with the product rounded, a relative error of |x|·2⁻²⁴. That is good enough for
    elements, whose weight falls faster than their digits; −log p_y at a margin of 80 is exp(−80) and nothing else.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        bounded = tl.where(x < -110.0, -110.0, x)
        n = tl.floor(bounded * 1.4426950408889634 + 0.5)
        r = bounded - n * 0.693145751953125  # log 2 in two parts: n times the first is exact
        r = r - n * 1.4286068203094172e-6
        return tl.exp(r) * tl.exp2(n)


@triton.jit
def log1p_of_unit(x):
    """log(1 + x) for 0 ≤ x ≤ 1: 2 atanh(s) with s = x / (2 + x) ≤ 1/3, by its series."""
    s = x / (2.0 + x)
    square = s * s
    LAST: tl.constexpr = 31 if x.dtype == tl.float64 else 15
    total = 1.0 / LAST
    for i in tl.static_range((LAST - 3) // 2):
        total = total * square + 1.0 / (LAST - 2 - 2 * i)
    return 2.0 * s + 2.0 * s * (total * square)


@triton.jit
def expm1(x):
    """exp(x) − 1: its series where the difference would cancel."""
    LAST: tl.constexpr = 18 if x.dtype == tl.float64 else 10
    series = 1.0
    for i in tl.static_range(LAST - 1):
        series = 1.0 + series * x / (LAST - i)
    return tl.where(tl.abs(x) < 0.7, x * series, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    """x + x³ P(x²) near 0; else 1 − 2e / (1 + e) with e = exp(−2|x|). In float64 all of it from expm1."""
    size = tl.abs(x)
    if x.dtype == tl.float64:
        e = expm1(-2.0 * size)
        far = -e / (2.0 + e)
        return tl.where(x < 0, -far, far)
    else:
        square = x * x
        p = square * -5.70498872745e-3 + 2.06390887954e-2
        p = p * square - 5.37397155531e-2
        p = p * square + 1.33314422036e-1
        p = p * square - 3.33332819422e-1
        e = tl.exp(-2.0 * size)
        far = 1.0 - (e + e) / (1.0 + e)
        return tl.where(size < 0.625, x + x * (p * square), tl.where(x < 0, -far, far))


@triton.jit
def number(words, place: tl.constexpr):
    """The float64 number at a place of a tuple of `launch.words`, three words each."""
    low = (words[3 * place] >> 2).to(tl.int64)
    middle = (words[3 * place + 1] >> 2).to(tl.int64)
    high = (words[3 * place + 2] >> 2).to(tl.int64)
    return ((high << 42) | (middle << 21) | low).to(tl.float64, bitcast=True)
