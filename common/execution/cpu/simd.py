"""A vector of float32 as a Numba type, so that a kernel in Python says exactly which SIMD work it wants.

LLVM maps a `<64 x float>` to the registers at hand: four of AVX-512, eight of AVX2, sixteen of NEON. Left to itself,
LLVM vectorises only loops of unknown length with a slow scalar rest, and a 16-token tile is nothing but rest.

A width is a tuple of `n / 16` zeros: its *length* belongs to its type, which makes `n` a constant to the compiler
(and one cached compilation for each head dimension). Arrays are flat; their dtype says how the bits are read:
float32; uint16 holds bfloat16; int16 holds float16; uint32 holds pairs of bfloat16, which are multiplied two by two;
whole numbers are stored as int8. All other arithmetic is in float32, whatever the storage.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.extending import models, register_model
from numba.np import arrayobj

# pyright: basic
# Numba and llvmlite carry no types.

intrinsic: Any = extending.intrinsic

LANES = 16
F32, I32, I16 = ir.FloatType(), ir.IntType(32), ir.IntType(16)
DOT_PAIRS = "llvm.x86.avx512bf16.dpbf16ps.512"
LOG2E = 1.4426950408889634
FAST = ("fast",)  # the order of a sum is free, and nothing is NaN
EXP2_POLYNOMIAL = (2.1702252e-4, 1.2439689e-3, 9.6788409e-3, 5.5483342e-2, 2.4022984e-1, 6.9314698e-1, 1.0)
"""2^x on [0, 1), highest power first; a minimax fit, exact to float32."""


def width(lanes: int) -> tuple[int, ...]:
    """The tuple that stands for `lanes` (a multiple of 16) in a kernel's type."""
    return (0,) * (lanes // LANES)


@cache
def lanes_for(size: int) -> tuple[int, ...] | None:
    """The widest vectors of which a row of `size` numbers is made; None: of none."""
    return next((width(n) for n in (64, 32, LANES) if size % n == 0), None)


class Vector(types.Type):
    """`lanes` numbers of float32 in registers."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"float32x{lanes}")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(F32, vector.lanes))


def call(builder: Any, name: str, result: Any, *args: Any, fast: bool = True) -> Any:
    signature = ir.FunctionType(result, [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, args, fastmath=FAST if fast else ())


def constant(kind: Any, lanes: int, value: float) -> Any:
    return ir.Constant(ir.VectorType(kind, lanes), [value] * lanes)


def splat(builder: Any, scalar: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(first, undefined, constant(I32, lanes, 0))


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call(builder, f"llvm.fma.v{a.type.count}f32", a.type, a, b, c, fast=False)


def pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, target: Any) -> Any:
    data = arrayobj.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), ir.PointerType(target))


@intrinsic
def at_address(_typing: Any, address: Any, like: Any) -> tuple[Any, Callable[..., Any]]:
    """The memory at an address, in the format of the array `like`. The caller keeps it alive, and knows its length.
    (A tensor's address costs a tenth of its NumPy array, and a token takes hundreds of calls.)"""
    array = types.Array(like.dtype, 1, "C")

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        made = arrayobj.make_array(array)(context, builder)
        size = context.get_constant(types.intp, like.dtype.bitwidth // 8)
        arrayobj.populate_array(
            made,
            data=builder.inttoptr(args[0], made.data.type),
            shape=[context.get_constant(types.intp, 2**62)],
            strides=[size],
            itemsize=size,
            meminfo=None,
        )
        return made._getvalue()

    return array(types.intp, like), generate


@intrinsic
def packed(_typing: Any, array: Any) -> tuple[Any, Callable[..., Any]]:
    """How many numbers an element of the array holds: 2 of pairs, else 1; a constant to the compiler."""
    count = 2 if array.dtype == types.uint32 else 1
    return types.intp(array), lambda context, builder, signature, args: context.get_constant(types.intp, count)


@intrinsic
def load(_typing: Any, array: Any, index: Any, shape: Any) -> tuple[Any, Callable[..., Any]]:
    """`array[index : index + n]`, widened to float32; shape = width(n). Pairs stay as they are."""
    lanes = shape.count * LANES

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0].dtype
        whole = kind in (types.float32, types.uint32)
        stored = F32 if whole else I16 if kind == types.uint16 else ir.HalfType()
        where = pointer(context, builder, signature.args[0], args[0], args[1], ir.VectorType(stored, lanes))
        value = builder.load(where, align=kind.bitwidth // 8)
        floats, ints = ir.VectorType(F32, lanes), ir.VectorType(I32, lanes)
        if kind == types.uint16:  # bfloat16 is the upper half of a float32
            return builder.bitcast(builder.shl(builder.zext(value, ints), constant(I32, lanes, 16)), floats)
        return value if whole else builder.fpext(value, floats)

    return Vector(lanes)(array, types.intp, shape), generate


@intrinsic
def store(_typing: Any, array: Any, index: Any, vector: Any) -> tuple[Any, Callable[..., Any]]:
    """`array[index : index + n] = vector`, rounded to the array's format (to nearest, ties to even); of pairs half as
    many, each of two neighbours."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, value, lanes = signature.args[0].dtype, args[2], vector.lanes
        if kind == types.uint16:
            bits = builder.bitcast(value, ir.VectorType(I32, lanes))
            odd = builder.and_(builder.lshr(bits, constant(I32, lanes, 16)), constant(I32, lanes, 1))
            rounded = builder.add(builder.add(bits, constant(I32, lanes, 0x7FFF)), odd)
            value = builder.trunc(builder.lshr(rounded, constant(I32, lanes, 16)), ir.VectorType(I16, lanes))
        elif kind == types.int16:
            value = builder.fptrunc(value, ir.VectorType(ir.HalfType(), lanes))
        elif kind == types.uint32:
            short = ir.VectorType(I16, LANES)
            name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
            value = joined(
                builder, [call(builder, name, short, part, fast=False) for part in lane_parts(builder, value)]
            )
        elif kind == types.int8:
            value = builder.trunc(builder.fptosi(value, ir.VectorType(I32, lanes)), ir.VectorType(ir.IntType(8), lanes))
        where = pointer(context, builder, signature.args[0], args[0], args[1], value.type)
        builder.store(value, where, align=kind.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def store_zipped(_typing: Any, array: Any, index: Any, first: Any, second: Any) -> tuple[Any, Callable[..., Any]]:
    """`array[index + i]` = the pair of first[i] and second[i], both bfloat16 widened; without pairs first[i] alone."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, lanes = args[2], first.lanes
        if array.dtype == types.uint32:
            low, high = (builder.bitcast(vector, ir.VectorType(I32, lanes)) for vector in args[2:])
            high = builder.and_(high, constant(I32, lanes, 0xFFFF0000))
            value = builder.or_(builder.lshr(low, constant(I32, lanes, 16)), high)
        builder.store(value, pointer(context, builder, signature.args[0], args[0], args[1], value.type), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, first, second), generate


def lane_parts(builder: Any, vector: Any) -> list[Any]:
    """Its vectors of `LANES` numbers, one register of AVX-512 each."""
    starts = range(0, vector.type.count, LANES)
    lanes = [ir.Constant(ir.VectorType(I32, LANES), list(range(first, first + LANES))) for first in starts]
    return [builder.shuffle_vector(vector, vector, part) for part in lanes]


def joined(builder: Any, parts: list[Any]) -> Any:
    """The reverse."""
    whole = parts[0]
    for part in parts[1:]:
        count = whole.type.count
        fill = list(range(LANES)) + [0] * (count - LANES)  # both sides of a shuffle are equally long
        part = builder.shuffle_vector(part, part, ir.Constant(ir.VectorType(I32, count), fill))
        order = list(range(count + LANES))
        whole = builder.shuffle_vector(whole, part, ir.Constant(ir.VectorType(I32, count + LANES), order))
    return whole


@intrinsic
def prefetch(_typing: Any, array: Any, index: Any) -> tuple[Any, Callable[..., Any]]:
    """Ask for the cache line of `array[index]`: the next block lies anywhere, and no hardware can guess where."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        where = pointer(context, builder, signature.args[0], args[0], args[1], ir.IntType(8))
        reading, keep, data = I32(0), I32(3), I32(1)
        call(builder, "llvm.prefetch.p0", ir.VoidType(), where, reading, keep, data, fast=False)
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def zeros(_typing: Any, shape: Any) -> tuple[Any, Callable[..., Any]]:
    lanes = shape.count * LANES
    return Vector(lanes)(shape), lambda context, builder, signature, args: constant(F32, lanes, 0.0)


def operation(result: Any = None) -> Callable[[Callable[..., Any]], Any]:
    """`emit(builder, *operands)` as an intrinsic of vectors of one length and scalars, which become float32. Its result
    is of the type given, or such a vector."""

    def decorate(emit: Callable[..., Any]) -> Any:
        @wraps(emit)  # Numba reads the names of the operands there
        def define(_typing: Any, *operands: Any) -> tuple[Any, Callable[..., Any]]:
            vector = next(operand for operand in operands if isinstance(operand, Vector))
            accepted = [operand if isinstance(operand, Vector) else types.float32 for operand in operands]
            generate: Callable[..., Any] = lambda context, builder, signature, args: emit(builder, *args)  # noqa: E731
            return (result or vector)(*accepted), generate

        return intrinsic(define)

    return decorate


@operation()
def scale_add(builder: Any, x: Any, vector: Any, addend: Any) -> Any:
    """x * vector + addend, x a scalar."""
    return fma(builder, splat(builder, x, vector.type.count), vector, addend)


@intrinsic
def add_product(_typing: Any, x: Any, vector: Any, addend: Any) -> tuple[Any, Callable[..., Any]]:
    """x * vector + addend; where x is a pair of bfloat16, so are the lanes of the vector: the sum of both products."""
    pairs = x == types.uint32

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        factor, other, sums = args
        if not pairs:
            return fma(builder, splat(builder, factor, vector.lanes), other, sums)
        factor, ints = splat(builder, factor, LANES), ir.VectorType(I32, LANES)
        parts = zip(lane_parts(builder, sums), lane_parts(builder, other), strict=True)
        return joined(builder, [
            call(builder, DOT_PAIRS, part.type, part, builder.bitcast(lanes, ints), factor, fast=False)
            for part, lanes in parts
        ])  # fmt: skip

    return vector(types.uint32 if pairs else types.float32, vector, vector), generate


@operation()
def scale(builder: Any, x: Any, vector: Any) -> Any:
    """x * vector, x a scalar."""
    return builder.fmul(splat(builder, x, vector.type.count), vector, flags=FAST)


@operation(types.float32)
def dot(builder: Any, a: Any, b: Any) -> Any:
    products = builder.fmul(a, b, flags=FAST)
    return call(builder, f"llvm.vector.reduce.fadd.v{a.type.count}f32", F32, F32(0.0), products)


@operation(types.float32)
def total(builder: Any, vector: Any) -> Any:
    """The sum of all lanes."""
    return call(builder, f"llvm.vector.reduce.fadd.v{vector.type.count}f32", F32, F32(0.0), vector)


@operation(types.float32)
def largest(builder: Any, vector: Any) -> Any:
    return call(builder, f"llvm.vector.reduce.fmax.v{vector.type.count}f32", F32, vector)


@intrinsic
def keep_first(_typing: Any, vector: Any, count: Any) -> tuple[Any, Callable[..., Any]]:
    """The first `count` lanes; the others become -1e30, which no softmax sees (and no infinity minus infinity)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = vector.lanes
        numbers = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        limit = splat(builder, builder.trunc(args[1], I32), lanes)
        return builder.select(builder.icmp_signed("<", numbers, limit), args[0], constant(F32, lanes, -1e30))

    return vector(vector, types.intp), generate


@operation()
def multiply(builder: Any, a: Any, b: Any) -> Any:
    """a * b, lane by lane."""
    return builder.fmul(a, b)


@operation()
def absolute(builder: Any, vector: Any) -> Any:
    return call(builder, f"llvm.fabs.v{vector.type.count}f32", vector.type, vector, fast=False)


@operation()
def nearest(builder: Any, vector: Any) -> Any:
    """The nearest whole numbers; of two the even one."""
    return call(builder, f"llvm.rint.v{vector.type.count}f32", vector.type, vector, fast=False)


@operation()
def multiply_add(builder: Any, a: Any, b: Any, addend: Any) -> Any:
    """a * b + addend, lane by lane."""
    return fma(builder, a, b, addend)


def _exp2(builder: Any, power: Any) -> Any:
    """2^power, at most 1: the whole part goes to the exponent's bits, a polynomial does the rest."""
    lanes, floats = power.type.count, power.type
    power = call(builder, f"llvm.maxnum.v{lanes}f32", floats, power, constant(F32, lanes, -126.0), fast=False)
    whole = call(builder, f"llvm.floor.v{lanes}f32", floats, power, fast=False)
    rest = builder.fsub(power, whole)
    result = constant(F32, lanes, EXP2_POLYNOMIAL[0])
    for coefficient in EXP2_POLYNOMIAL[1:]:
        result = fma(builder, result, rest, constant(F32, lanes, coefficient))
    exponent = builder.add(builder.fptosi(whole, ir.VectorType(I32, lanes)), constant(I32, lanes, 127))
    return builder.fmul(result, builder.bitcast(builder.shl(exponent, constant(I32, lanes, 23)), floats))


@operation()
def exp2_minus(builder: Any, vector: Any, x: Any) -> Any:
    """2^(vector - x), for results up to 1."""
    return _exp2(builder, builder.fsub(vector, splat(builder, x, vector.type.count)))


@operation()
def silu(builder: Any, vector: Any) -> Any:
    """vector / (1 + e^-vector), from e^-|vector|, which no number makes too large."""
    lanes, floats = vector.type.count, vector.type
    one, size = constant(F32, lanes, 1.0), call(builder, f"llvm.fabs.v{lanes}f32", floats, vector, fast=False)
    small = _exp2(builder, builder.fmul(size, constant(F32, lanes, -LOG2E)))
    negative = builder.fcmp_ordered("<", vector, constant(F32, lanes, 0.0))
    share = builder.fdiv(builder.select(negative, small, one), builder.fadd(one, small))
    return builder.fmul(vector, share)
