// A fused matrix as the kernels see it: segments of rows, each with its own width and groups.
#pragma once

#include "decode.cuh"

constexpr int MAX_SEGMENTS = 8;

// As `bitsearch.kernels.entries` writes it.
struct Segment {
    long long offset;  // of its first byte in the data
    int block_bytes;   // of 16 rows
    int bits;
    int groups;      // scales of a row in a tile; 0: one for the whole row
    int asymmetric;  // it has zero points
    int row;         // its first row in the fused matrix
    int rows;
    int block;  // its first block of 16 rows
    int spare;
};

// What a kernel is compiled for: the widths, groups and symmetries that its segments have.
template <int BITS_, int GROUPS_, int ASYMMETRIC_>
struct Kind {
    static constexpr int BITS = BITS_, GROUPS = GROUPS_ ? GROUPS_ : 1;
    static constexpr bool ASYMMETRIC = ASYMMETRIC_, ROWWISE = GROUPS_ == 0;
    static constexpr int ZERO_BYTES = !ASYMMETRIC ? 0 : GROUPS == 4 ? 8 : 4;  // of rows g, g+8
    static constexpr int META_BYTES = 32 * GROUPS + 8 * ZERO_BYTES;
    static constexpr int TILE_BYTES = 256 * BITS + (ROWWISE ? 0 : META_BYTES);

    DEVICE static bool is(const Segment& s) {
        return s.bits == BITS_ && s.groups == GROUPS_ && bool(s.asymmetric) == ASYMMETRIC;
    }
    // Scales begin here, [g][group][rows g, g+8]; then the zero points. Of a tile that has `left`
    // tiles of its block from itself on.
    DEVICE static const u8* meta(const u8* tile, int left) {
        return tile + (ROWWISE ? left * (long long)TILE_BYTES : 256 * BITS);
    }
};

// Of rows g and g+8 in one group.
struct Scales {
    float of[2];

    DEVICE explicit Scales(u32 word)
        : of{to_float<Half>(word & 0xFFFF), to_float<Half>(word >> 16)} {}
};
// Zero points less 2^(bits−1).
template <class K>
struct Zeros {
    int of[2];

    DEVICE explicit Zeros(u32 word) {
        for (int half = 0; half < 2; ++half)
            of[half] = int(word >> 8 * half & 0xFF) - (1 << (K::BITS - 1));
    }
    // What is to be added to a code.
    DEVICE void minus(float (&zero)[2]) const {
        for (int half = 0; half < 2; ++half) zero[half] = float(-of[half]);
    }
};

// A tile in shared memory: planes, then each lane's scales, then its zero points. A lane copies
// what it will decode itself, so that nobody else need wait for it.
template <class K>
DEVICE constexpr u32 slot_bytes() {
    return 256 * K::BITS + 128 * K::GROUPS + 32 * K::ZERO_BYTES;
}
template <class K>
DEVICE u32 scales_at(int lane) {
    return 256 * K::BITS + lane * (4 * K::GROUPS);
}
template <class K>
DEVICE u32 zeros_at(int lane) {
    return 256 * K::BITS + 128 * K::GROUPS + lane * K::ZERO_BYTES;
}
template <class K>
DEVICE void copy_tile(u32 to, int lane, const u8* planes, const u8* meta) {
    const int g = lane / 4;
#pragma unroll
    for (int piece = 0; piece < K::BITS / 2; ++piece)
        copy<16>(to + piece * 512 + lane * 16, planes + piece * 512 + lane * 16);
    if constexpr (K::BITS & 1)
        copy<8>(to + K::BITS / 2 * 512 + lane * 8, planes + K::BITS / 2 * 512 + lane * 8);
    copy<4 * K::GROUPS>(to + scales_at<K>(lane), meta + g * 4 * K::GROUPS);
    if constexpr (K::ASYMMETRIC)
        copy<K::ZERO_BYTES>(to + zeros_at<K>(lane), meta + 32 * K::GROUPS + g * K::ZERO_BYTES);
}
template <class K>
DEVICE Scales scales_of(u32 slot, int lane, int index) {
    return Scales(shared<u32>(slot + scales_at<K>(lane) + 4 * index));
}
template <class K>
DEVICE Zeros<K> zeros_of(u32 slot, int lane, int index) {
    return Zeros<K>(shared<u16>(slot + zeros_at<K>(lane) + 2 * index));
}
