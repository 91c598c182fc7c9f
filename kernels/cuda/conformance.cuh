// Every arithmetic primitive on given operands, to compare the host's with the device's.
// A warp reads 16 words a lane and writes 16: mma of both types (4 + 4 floats), mma of bytes
// (4 integers), fma2 of both types, to_pair of both types.
#pragma once

#include "primitives.cuh"

DEVICE void conformance(const u32* in, u32* out) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const u32* own = in + (warp * 32 + lane) * 16;
    u32* to = out + (warp * 32 + lane) * 16;
    const u32 left[4] = {own[0], own[1], own[2], own[3]};
    const u32 wide[4] = {own[4], own[5], own[6], own[7]};
    float half[4] = {}, bfloat[4] = {};
    int bytes[4] = {};
    mma<Half>(half, left, own[8], own[9]);
    mma<BFloat>(bfloat, wide, own[10], own[11]);
    mma_bytes(bytes, left, own[8], own[9]);
    for (int i = 0; i < 4; ++i) {
        to[i] = bits_of(half[i]);
        to[4 + i] = bits_of(bfloat[i]);
        to[8 + i] = u32(bytes[i]);
    }
    to[12] = fma2<Half>(own[0], own[1], own[8]);
    to[13] = fma2<BFloat>(own[4], own[5], own[10]);
    const float low = to_float<BFloat>(own[4]) / 3, high = to_float<Half>(own[0]) / 3;
    to[14] = to_pair<Half>(low, high);
    to[15] = to_pair<BFloat>(low, high);
}
