// Weights of a fused matrix as 16-bit values: (code − zero) · scale, rounded once. For products
// with many rows, where a library's dense product is the best there is.
#pragma once

#include "segments.cuh"

struct DequantizeArgs {
    const u8* data;
    u16* out;  // (rows, columns)
    int columns, tiles, blocks, segment_count;
    Segment segments[MAX_SEGMENTS];
};

template <class T, class... Kinds>
struct Dequantize {
    const DequantizeArgs& args;
    const int lane = thread_index() % 32;

    DEVICE void run() {
        const int warps = block_size() / 32, own = block_index() * warps + thread_index() / 32;
        const long long count = (long long)args.blocks * args.tiles;
        for (long long i = own; i < count; i += (long long)block_count() * warps) {
            const int block = int(i / args.tiles), tile = int(i % args.tiles);
            int s = 0;
            while (s + 1 < args.segment_count && args.segments[s + 1].block <= block) ++s;
            const Segment& segment = args.segments[s];
            const u8* from = args.data + segment.offset +
                             (block - segment.block) * (long long)segment.block_bytes;
            ((Kinds::is(segment) ? write<Kinds>(segment, from, tile, block) : void()), ...);
        }
    }

    template <class K>
    DEVICE void write(const Segment& segment, const u8* from, int tile, int block) {
        const int g = lane / 4, t = lane % 4;
        const u8* planes = from + tile * (long long)K::TILE_BYTES;
        const u8* meta = K::meta(planes, args.tiles - tile);
        Tile<K::BITS> weights;
        weights.load(lane, Global{planes});
#pragma unroll
        for (int unit = 0; unit < 4; ++unit) {
            const int index = unit * K::GROUPS / 4;
            const Scales scales(*reinterpret_cast<const u32*>(meta + (g * K::GROUPS + index) * 4));
            float zero[2] = {0, 0};
            if constexpr (K::ASYMMETRIC) {
                const u8* at = meta + 32 * K::GROUPS + g * K::ZERO_BYTES + 2 * index;
                Zeros<K>(*reinterpret_cast<const u16*>(at)).minus(zero);
            }
            const int column = tile * 128 + unit * 32 + t * 8;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int inside = (block - int(segment.block)) * 16 + half * 8 + g;
                u32 out[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    // Registers 0 and 2 of either step are row g, 1 and 3 row g+8.
                    const u32 pair = weights.template decode<Half>(8 * unit + 2 * i + half);
                    const float low = to_float<Half>(pair & 0xFFFF) + zero[half];
                    const float high = to_float<Half>(pair >> 16) + zero[half];
                    out[i] = to_pair<T>(low * scales.of[half], high * scales.of[half]);
                }
                if (inside < segment.rows) store(segment.row + inside, column, out);
            }
        }
    }

    DEVICE void store(long long row, int column, const u32 (&out)[4]) {
        u16* to = args.out + row * args.columns + column;
        if (args.columns % 8 == 0) {
            if (column < args.columns)
                *reinterpret_cast<Words4*>(to) = {out[0], out[1], out[2], out[3]};
        } else {
            for (int k = 0; k < 8; ++k)
                if (column + k < args.columns) to[k] = u16(out[k / 2] >> k % 2 * 16);
        }
    }
};
