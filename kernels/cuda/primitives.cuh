// What the kernels use of the machine: sm_80 instructions on a GPU, threads on a host.
// No CUDA header is needed, so that NVRTC alone compiles them.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(8) Words2 {
    u32 x, y;
};
struct alignas(16) Words4 {
    u32 x, y, z, w;
};

// Element types of activations: the bits of a magic number whose last mantissa bit counts one,
// bits of its mantissa, and of one.
struct Half {
    static constexpr u32 magic = 0x6400, mantissa = 10, bias = 15, one = 0x3C00;
};
struct BFloat {
    static constexpr u32 magic = 0x4300, mantissa = 7, bias = 127, one = 0x3F80;
};

#ifdef __CUDACC__

#define DEVICE __device__ __forceinline__

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int block_size() { return blockDim.x; }
DEVICE int block_count() { return gridDim.x; }
// Shared memory is addressed by the 32-bit numbers that its instructions take, from here on: they
// add a constant offset themselves, which they do not to a pointer's base.
DEVICE u32 shared_base() {
    extern __shared__ __align__(128) u8 bytes[];
    return static_cast<u32>(__cvta_generic_to_shared(bytes));
}
template <class Value>
DEVICE Value shared(u32 at);
template <>
DEVICE u16 shared<u16>(u32 at) {
    u16 value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(at) : "memory");
    return value;
}
template <>
DEVICE u32 shared<u32>(u32 at) {
    u32 value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
    return value;
}
template <>
DEVICE float shared<float>(u32 at) {
    return __uint_as_float(shared<u32>(at));
}
template <>
DEVICE Words2 shared<Words2>(u32 at) {
    Words2 value;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(value.x), "=r"(value.y)
                 : "r"(at)
                 : "memory");
    return value;
}
template <>
DEVICE Words4 shared<Words4>(u32 at) {
    Words4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(at)
                 : "memory");
    return value;
}
DEVICE void share(u32 at, u32 value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(value) : "memory");
}
DEVICE void share(u32 at, float value) { share(at, __float_as_uint(value)); }
DEVICE void share(u32 at, Words4 value) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
}
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
// A value that all lanes of a warp have, asked for by all: it then takes a register of the warp, not
// of each lane.
DEVICE int same(int value) { return __shfl_sync(~0u, value, 0); }
DEVICE void fence() { __threadfence(); }
DEVICE u32 atomic_add(u32* where, u32 value) { return atomicAdd(where, value); }
// Past the first-level cache, which another block's writes do not reach.
DEVICE float load_through(const float* where) { return __ldcg(where); }

// Programmatic dependent launch: everything before may overlap with the kernel before.
DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Asynchronous copies of 16, 8 or 4 bytes to shared memory.
template <int BYTES>
DEVICE void copy(u32 to, const u8* from) {
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to),
                     "l"(from)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to),
                     "l"(from), "n"(BYTES)
                     : "memory");
}
DEVICE void copy_or_zero(u32 to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to),
                 "l"(from), "r"(inside ? 16 : 0)
                 : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// c += a·b of m16n8k16: c[0..1] row g, columns 2t and 2t+1; c[2..3] row g+8.
template <class T>
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <>
DEVICE void mma<Half>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
DEVICE void mma<BFloat>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c += a·b of m16n8k32 with signed bytes.
DEVICE void mma_bytes(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two lanes a·b + c, rounded once.
template <class T>
DEVICE u32 fma2(u32 a, u32 b, u32 c);
template <>
DEVICE u32 fma2<Half>(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
template <>
DEVICE u32 fma2<BFloat>(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

template <class T>
DEVICE float to_float(u32 bits);
template <>
DEVICE float to_float<Half>(u32 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<u16>(bits)));
    return value;
}
template <>
DEVICE float to_float<BFloat>(u32 bits) {
    return __uint_as_float(bits << 16);
}
// Two floats as one word, the first in the lower half, to nearest even.
template <class T>
DEVICE u32 to_pair(float low, float high);
template <>
DEVICE u32 to_pair<Half>(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <>
DEVICE u32 to_pair<BFloat>(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
DEVICE u32 bits_of(float value) { return __float_as_uint(value); }
// (word & mask) | other in one instruction, which the compiler misses with two constants.
DEVICE u32 and_or(u32 word, u32 mask, u32 other) {
    u32 out;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(word), "r"(mask), "r"(other));
    return out;
}
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// To the nearest integer, ties to even.
DEVICE int nearest(float value) { return __float2int_rn(value); }
DEVICE float largest(float a, float b) { return fmaxf(a, b); }
DEVICE float magnitude(float a) { return fabsf(a); }

#else
#include "host.h"
#endif

DEVICE u32 rotate_right(u32 word, u32 count) {
    return count % 32 ? word >> count % 32 | word << (32 - count % 32) : word;
}
