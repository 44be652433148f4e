"""Device maths shared by the kernels: dot products and what follows them. No loads, no stores."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, MATH_MODE: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b in fp32, of int8 in int32. UPCAST is for the interpreter, whose bf16 dot returns
    garbage (error 1e9 with triton 3.6 and 3.8)."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if MATH_MODE == "tf32":
        return tl.dot(a, b, acc, input_precision="tf32")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def relu(z):
    """max(z, 0), NaN passed on as torch does."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(z, slope, ACTIVATION: tl.constexpr):
    """The activation of that name (activation.ACTIVATIONS) of z, in fp32.

    `slope` multiplies negative values of leaky_relu (a number) and prelu (it broadcasts over the
    channels of z).
    """
    if ACTIVATION == "relu":
        z = relu(z)
    elif ACTIVATION == "relu6":
        z = tl.minimum(relu(z), 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "leaky_relu" or ACTIVATION == "prelu":
        z = tl.where(z > 0, z, z * slope)
    elif ACTIVATION == "sigmoid":
        z = 1.0 / (1.0 + tl.exp(-z))
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh u) is sigmoid(2 u)
        z = z / (1.0 + tl.exp(-1.5957691216057308 * z * (1.0 + 0.044715 * z * z)))
    elif ACTIVATION == "hardswish" or ACTIVATION == "hardsigmoid":
        gate = tl.minimum(relu(z + 3.0), 6.0, propagate_nan=tl.PropagateNan.ALL)
        z = (z * gate if ACTIVATION == "hardswish" else gate) / 6.0
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
    return z
