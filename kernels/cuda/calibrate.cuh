// What a device can do: bytes a second, and instructions a clock of each kind that unpacking needs.
#pragma once

#include "primitives.cuh"

DEVICE void copy_words(const Words4* from, Words4* to, long long count) {
    const long long all = (long long)block_count() * block_size();
    for (long long i = (long long)block_index() * block_size() + thread_index(); i < count;
         i += all)
        to[i] = from[i];
}

// Reads everything; writes only where all of a thread's words together are a value that none has.
DEVICE void read_words(const Words4* from, u32* to, long long count, u32 never) {
    const long long all = (long long)block_count() * block_size();
    u32 mix = 0;
#pragma unroll 8
    for (long long i = (long long)block_index() * block_size() + thread_index(); i < count;
         i += all) {
        const Words4 words = from[i];
        mix |= words.x & words.y & words.z & words.w;
    }
    if (mix == never) *to = mix;
}

#ifdef __CUDACC__
// Clocks of one multiprocessor for `turns` × 8 instructions of a thread, in eight chains.
#define RATE(NAME, INSTRUCTION)                                                        \
    extern "C" __global__ void __launch_bounds__(1024) rate_##NAME(                    \
        long long* clocks, u32* out, int turns, u32 a, u32 b) {                        \
        u32 x[8];                                                                      \
        for (int i = 0; i < 8; ++i) x[i] = threadIdx.x * 8 + i;                        \
        __syncthreads();                                                               \
        const long long start = clock64();                                             \
        for (int turn = 0; turn < turns; ++turn) {                                     \
            _Pragma("unroll") for (int i = 0; i < 8; ++i)                              \
                asm volatile(INSTRUCTION : "+r"(x[i]) : "r"(a), "r"(b));               \
        }                                                                              \
        __syncthreads();                                                               \
        if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - start;                  \
        u32 mix = 0;                                                                   \
        for (int i = 0; i < 8; ++i) mix ^= x[i];                                       \
        out[blockIdx.x * blockDim.x + threadIdx.x] = mix;                              \
    }
RATE(lop3, "lop3.b32 %0, %0, %1, %2, 0xEA;")
RATE(shf, "shf.r.wrap.b32 %0, %0, %1, %2;")
RATE(prmt, "prmt.b32 %0, %0, %1, %2;")
RATE(imad, "mad.lo.u32 %0, %0, %1, %2;")
RATE(hfma2, "fma.rn.f16x2 %0, %0, %1, %2;")
RATE(hfma2_bf16, "fma.rn.bf16x2 %0, %0, %1, %2;")

template <class T>
DEVICE void rate_mma(long long* clocks, float* out, int turns, u32 a, u32 b) {
    float sums[4][4] = {};
    const u32 left[4] = {a, b, a + threadIdx.x, b + threadIdx.x};
    __syncthreads();
    const long long start = clock64();
    for (int turn = 0; turn < turns; ++turn) {
#pragma unroll
        for (int i = 0; i < 4; ++i) mma<T>(sums[i], left, a, b);
    }
    __syncthreads();
    if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - start;
    float mix = 0;
    for (int i = 0; i < 16; ++i) mix += sums[i / 4][i % 4];
    out[blockIdx.x * blockDim.x + threadIdx.x] = mix;
}
#endif
