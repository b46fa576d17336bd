"""Triton kernels for the operations between matrix products; each reads its input once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(inputs, weight, outputs, width, epsilon, BLOCK: tl.constexpr):
    """RMS norm of one row, computed in float32. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    inside = places < width
    values = tl.load(inputs + row * width + places, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / width + epsilon)
    weights = tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
    result = values * scale * weights
    tl.store(outputs + row * width + places, result.to(outputs.dtype.element_ty), mask=inside)


@triton.jit
def _turn(
    half, other, weight, weight_other, cos, sin, epsilon, DIM: tl.constexpr, NORM: tl.constexpr
):
    """Return one half of a head after norm and rotary embedding: half * cos - other * sin."""
    if NORM:
        scale = tl.rsqrt((tl.sum(half * half, 0) + tl.sum(other * other, 0)) / DIM + epsilon)
        half = half * scale * weight
        other = other * scale * weight_other
    return half * cos - other * sin


@triton.jit(do_not_specialize_on_alignment=["slots"])
def rotate_and_store_kernel(
    joint,
    cos,
    sin,
    slots,
    keys,
    values,
    query_norm,
    key_norm,
    epsilon,
    angle_stride,
    slot_stride,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    NORM: tl.constexpr,
):
    """Rotate one head of one token; queries stay in place, keys and values go to the cache.

    Grid: (tokens, query heads + 2 * KV heads).
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = DIM // 2
    ALL: tl.constexpr = (QUERY_HEADS + 2 * KV_HEADS) * DIM
    places = tl.arange(0, HALF_PAD)
    inside = places < HALF
    source = joint + token * ALL + head * DIM + places
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    kind = joint.dtype.element_ty
    if head >= QUERY_HEADS + KV_HEADS:
        slot = tl.load(slots + token).to(tl.int64)
        target = values + slot * slot_stride + (head - QUERY_HEADS - KV_HEADS) * DIM + places
        tl.store(target, first.to(kind), mask=inside)
        tl.store(target + HALF, second.to(kind), mask=inside)
    else:
        angle = token * angle_stride + places
        cos_first = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        cos_second = tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
        sin_first = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        sin_second = tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)
        weight_first = cos_first
        weight_second = cos_second
        if NORM:
            weight = tl.where(head < QUERY_HEADS, 0, 1)
            if weight == 0:
                weight_first = tl.load(query_norm + places, mask=inside, other=0.0).to(tl.float32)
                weight_second = tl.load(query_norm + HALF + places, mask=inside, other=0.0).to(
                    tl.float32
                )
            else:
                weight_first = tl.load(key_norm + places, mask=inside, other=0.0).to(tl.float32)
                weight_second = tl.load(key_norm + HALF + places, mask=inside, other=0.0).to(
                    tl.float32
                )
        turned_first = _turn(
            first, second, weight_first, weight_second, cos_first, sin_first, epsilon, DIM, NORM
        )
        turned_second = _turn(
            second, first, weight_second, weight_first, cos_second, -sin_second, epsilon, DIM, NORM
        )
        if head < QUERY_HEADS:
            tl.store(source, turned_first.to(kind), mask=inside)
            tl.store(source + HALF, turned_second.to(kind), mask=inside)
        else:
            slot = tl.load(slots + token).to(tl.int64)
            target = keys + slot * slot_stride + (head - QUERY_HEADS) * DIM + places
            tl.store(target, turned_first.to(kind), mask=inside)
            tl.store(target + HALF, turned_second.to(kind), mask=inside)


@triton.jit
def gate_kernel(joint, outputs, width, BLOCK: tl.constexpr):
    """SiLU of the first half of a row times the second. Grid: (tokens, blocks of the width)."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < width
    gate = tl.load(joint + row * 2 * width + places, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(joint + row * 2 * width + width + places, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1 + tl.exp(-gate)) * up
    tl.store(outputs + row * width + places, result.to(outputs.dtype.element_ty), mask=inside)
