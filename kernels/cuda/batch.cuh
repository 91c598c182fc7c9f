// out = x·Wᵀ (+ bias) for tens to hundreds of rows of x, weights decoded in registers.
//
// A block makes 256 rows of W, 32 a warp, times 8·COLS rows of x, over one range of columns. Each
// warp streams its own two blocks of 16 rows, lane by lane as in stream.cuh; a tile of x is shared
// by all. Every decoded pair is multiplied with all rows of x, and every word of x with both
// blocks. Scales multiply the sums of a group. Ranges of columns meet in `partial`.
//
// With `Bytes`, rows of x are signed bytes with a scale each (tokens.cuh), and sums of a group are
// exact integers: a code less 2^(bits−1) stands at the top of its byte, so 2^(8−bits) times itself.
#pragma once

#include "segments.cuh"

struct BatchArgs {
    const u8* x;            // (m, columns), x_stride apart; both multiples of 16 bytes
    const float* x_scales;  // (m,) of bytes; else null
    const u8* data;         // what the segments lie in
    const u32* plan;  // of each warp: segment << 24 | first block of 16 rows; ~0: none
    const u16* bias;  // (rows,) or null
    u16* out;         // (m, rows), out_stride apart
    float* partial;   // (row tiles · column tiles, splits, 256 · 8·COLS); unused without splits
    u32* arrived;     // (row tiles · column tiles,), zeros before and after
    int m, columns, x_stride, out_stride;
    int tiles, splits, slot_bytes, row_tiles;
    Segment segments[MAX_SEGMENTS];
};

template <class T>
struct Bytes {};
template <class X>
struct Element {
    using Out = X;
    static constexpr int SIZE = 2, PITCH = 320;  // pitch: no bank conflicts
    static constexpr bool BYTES = false;
};
template <class T>
struct Element<Bytes<T>> {
    using Out = T;
    static constexpr int SIZE = 1, PITCH = 160;
    static constexpr bool BYTES = true;
};

template <class X, int COLS, int STAGES, class... Kinds>
struct Batch {
    using T = typename Element<X>::Out;
    static constexpr int WARPS = 8, SIZE = Element<X>::SIZE, X_PITCH = Element<X>::PITCH;
    static constexpr u32 X_BYTES = 8 * COLS * X_PITCH;
    using Sums = float[2][COLS][4];

    const BatchArgs& args;
    const int thread, lane, warp, split, row_tile, column, first, count;
    const u32 base;
    u32 ring;

    // Row tiles go fastest: blocks that share x run together.
    DEVICE explicit Batch(const BatchArgs& a)
        : args(a),
          thread(thread_index()),
          lane(thread % 32),
          warp(same(thread / 32)),
          split(block_index() % a.splits),
          row_tile(block_index() / a.splits % a.row_tiles),
          column(block_index() / a.splits / a.row_tiles * 8 * COLS),
          first(a.tiles * split / a.splits),
          count(a.tiles * (split + 1) / a.splits - first),
          base(shared_base()),
          ring(base + STAGES * X_BYTES + warp * STAGES * a.slot_bytes) {}

    DEVICE void run() {
        const u32 item = u32(same(int(args.plan[row_tile * WARPS + warp])));
        Sums total = {};
        bool found = false;
        if (item != ~0u) {
            const Segment& segment = args.segments[item >> 24];
            found = (... || (Kinds::is(segment) &&
                             (walk<Kinds>(segment, item & 0xFFFFFF, total), true)));
        }
        if (!found) idle();
        if (args.splits == 1)
            write_all(item, total);
        else
            meet(item, total);
    }

    // A warp without rows helps to copy x and keeps the barriers.
    DEVICE void idle() {
        wait_for_previous_kernel();
        for (int stage = 0; stage < STAGES - 1; ++stage) fetch_x(stage);
        for (int tile = 0; tile < count; ++tile) {
            copy_wait<STAGES - 2>();
            sync_block();
            fetch_x(tile + STAGES - 1);
        }
        copy_wait<0>();
    }

    template <class K>
    DEVICE void walk(const Segment& segment, u32 number, Sums& total) {
        const u8* blocks[2];
        const int last = (segment.rows + 15) / 16 - 1;
        for (int b = 0; b < 2; ++b) {
            // A segment of odd blocks decodes its last one twice, and writes it once.
            const int own = int(number) + b < last ? int(number) + b : last;
            blocks[b] = args.data + segment.offset + own * (long long)segment.block_bytes;
        }
        wait_for_previous_kernel();
        for (int stage = 0; stage < STAGES - 1; ++stage) {
            fetch_weights<K>(blocks, stage);
            fetch_x(stage);
        }
        for (int tile = 0; tile < count; ++tile) {
            copy_wait<STAGES - 2>();
            sync_block();
            fetch_weights<K>(blocks, tile + STAGES - 1);
            fetch_x(tile + STAGES - 1);
            if constexpr (Element<X>::BYTES)
                multiply_bytes<K>(tile % STAGES, total);
            else
                multiply<K>(tile % STAGES, total);
        }
        copy_wait<0>();
    }

    // Both kinds of copies of a stage are one group; this one closes it.
    DEVICE void fetch_x(int tile) {
        if (tile < count) {
            const u32 to = base + tile % STAGES * X_BYTES;
#pragma unroll
            for (int i = thread; i < 8 * COLS * 8 * SIZE; i += 32 * WARPS) {
                const int row = i / (8 * SIZE), piece = i % (8 * SIZE);
                const int at = (first + tile) * 128 * SIZE + piece * 16;
                const int from = column + row < args.m ? column + row : args.m - 1;
                const bool inside = at < args.columns * SIZE;
                const u8* source = args.x + (long long)from * args.x_stride * SIZE;
                copy_or_zero(to + row * X_PITCH + piece * 16, source + (inside ? at : 0), inside);
            }
        }
        copy_commit();
    }

    template <class K>
    DEVICE void fetch_weights(const u8* (&blocks)[2], int tile) {
        if (tile >= count) return;
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            const u32 to = slot<K>(tile % STAGES, b);
            const u8* from = blocks[b] + (first + tile) * (long long)K::TILE_BYTES;
            const u8* meta = K::meta(from, args.tiles - first - tile);
            copy_tile<K>(to, lane, from, meta);
        }
    }
    template <class K>
    DEVICE u32 slot(int stage, int b) const {
        return ring + stage * args.slot_bytes + b * slot_bytes<K>();
    }

    template <class K>
    DEVICE void multiply(int stage, Sums& total) {
        Tile<K::BITS> weights[2];
#pragma unroll
        for (int b = 0; b < 2; ++b)
            weights[b].load(lane, Shared{slot<K>(stage, b)});
        const u32 own = base + stage * X_BYTES + lane / 4 * X_PITCH + lane % 4 * 16;
        Sums sum = {};
#pragma unroll
        for (int unit = 0; unit < 4; ++unit) {
            const int index = unit * K::GROUPS / 4;
            Words4 right[COLS];
#pragma unroll
            for (int c = 0; c < COLS; ++c)
                right[c] = shared<Words4>(own + c * 8 * X_PITCH + unit * 64);
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                u32 zero[2] = {0, 0};
                if constexpr (K::ASYMMETRIC) {
                    float minus[2];
                    zeros_of<K>(slot<K>(stage, b), lane, index).minus(minus);
                    for (int half = 0; half < 2; ++half)
                        zero[half] = to_pair<T>(minus[half], minus[half]);
                }
#pragma unroll
                for (int step = 0; step < 2; ++step) {
                    u32 left[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        left[i] = weights[b].template decode<T>(8 * unit + 4 * step + i);
                        // Exact: no difference of two codes needs more than eight bits.
                        if constexpr (K::ASYMMETRIC)
                            left[i] = fma2<T>(left[i], both(T::one), zero[i % 2]);
                    }
#pragma unroll
                    for (int c = 0; c < COLS; ++c)
                        mma<T>(sum[b][c], left, step ? right[c].z : right[c].x,
                               step ? right[c].w : right[c].y);
                }
                if ((unit + 1) * K::GROUPS % 4 == 0) {
                    const Scales scales = scales_of<K>(slot<K>(stage, b), lane, index);
#pragma unroll
                    for (int i = 0; i < 4 * COLS; ++i) {
                        float& all = total[b][i / 4][i % 4];
                        all = multiply_add(scales.of[i % 4 / 2], sum[b][i / 4][i % 4], all);
                        sum[b][i / 4][i % 4] = 0;
                    }
                }
            }
        }
    }

    template <class K>
    DEVICE void multiply_bytes(int stage, Sums& total) {
        constexpr float top = 1.0f / (1 << (8 - K::BITS));
        Tile<K::BITS> weights[2];
#pragma unroll
        for (int b = 0; b < 2; ++b)
            weights[b].load(lane, Shared{slot<K>(stage, b)});
        const u32 own = base + stage * X_BYTES + lane / 4 * X_PITCH + lane % 4 * 8;
        const u32 ones[4] = {0x01010101, 0x01010101, 0x01010101, 0x01010101};
        int sum[2][COLS][4] = {}, sum_x[COLS][4] = {};
#pragma unroll
        for (int unit = 0; unit < 4; ++unit) {
            Words2 right[COLS];
#pragma unroll
            for (int c = 0; c < COLS; ++c) {
                right[c] = shared<Words2>(own + c * 8 * X_PITCH + unit * 32);
                if constexpr (K::ASYMMETRIC) mma_bytes(sum_x[c], ones, right[c].x, right[c].y);
            }
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                // Columns 0..3 of a lane's eight are registers 0 (row g) and 1 (row g+8).
                u32 left[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    left[i] = weights[b].decode_bytes(8 * unit + i / 2 * 4 + i % 2);
#pragma unroll
                for (int c = 0; c < COLS; ++c)
                    mma_bytes(sum[b][c], left, right[c].x, right[c].y);
                if ((unit + 1) * K::GROUPS % 4 == 0) {
                    const int index = unit * K::GROUPS / 4;
                    const Scales scales = scales_of<K>(slot<K>(stage, b), lane, index);
                    float zero[2] = {0, 0};
                    if constexpr (K::ASYMMETRIC)
                        zeros_of<K>(slot<K>(stage, b), lane, index).minus(zero);
#pragma unroll
                    for (int i = 0; i < 4 * COLS; ++i) {
                        const int c = i / 4, half = i % 4 / 2;
                        float value = float(sum[b][c][i % 4]) * top;
                        if constexpr (K::ASYMMETRIC)
                            value = multiply_add(zero[half], float(sum_x[c][i % 4]), value);
                        float& all = total[b][c][i % 4];
                        all = multiply_add(scales.of[half], value, all);
                        sum[b][c][i % 4] = 0;
                    }
                }
            }
            if (K::ASYMMETRIC && (unit + 1) * K::GROUPS % 4 == 0) {
#pragma unroll
                for (int i = 0; i < 4 * COLS; ++i) sum_x[i / 4][i % 4] = 0;
            }
        }
    }

    // Every range leaves its sums; the last to arrive adds all of them up, in order.
    DEVICE void meet(u32 item, Sums& total) {
        const int tile = block_index() / args.splits, last = args.splits - 1;
        constexpr int values = 8 * COLS;
        float* own = args.partial + (long long)block_index() * values * 32 * WARPS + thread;
#pragma unroll
        for (int i = 0; i < values; ++i)
            own[i * 32 * WARPS] = total[i / (4 * COLS)][i / 4 % COLS][i % 4];
        fence();
        sync_block();
        if (thread == 0) {
            const u32 before = atomic_add(args.arrived + tile, 1);
            if (before == u32(last)) args.arrived[tile] = 0;
            share(base, before);
        }
        sync_block();
        if (shared<u32>(base) != u32(last)) return;
        fence();
        const float* all =
            args.partial + (long long)tile * args.splits * values * 32 * WARPS + thread;
        for (int i = 0; i < values; ++i) total[i / (4 * COLS)][i / 4 % COLS][i % 4] = 0;
        for (int s = 0; s < args.splits; ++s, all += values * 32 * WARPS) {
            // A range's sums are all asked for before one of them is needed.
            float part[values];
#pragma unroll
            for (int i = 0; i < values; ++i) part[i] = load_through(all + i * 32 * WARPS);
#pragma unroll
            for (int i = 0; i < values; ++i) total[i / (4 * COLS)][i / 4 % COLS][i % 4] += part[i];
        }
        write_all(item, total);
    }

    DEVICE void write_all(u32 item, const Sums& total) {
        if (item == ~0u) return;
        const Segment& segment = args.segments[item >> 24];
#pragma unroll
        for (int i = 0; i < 8 * COLS; ++i) {
            const int b = i / (4 * COLS), half = i % 4 / 2;
            const int inside = ((item & 0xFFFFFF) + b) * 16 + half * 8 + lane / 4;
            const int at = column + i / 4 % COLS * 8 + lane % 4 * 2 + i % 2;
            if (inside >= segment.rows || at >= args.m) continue;
            float value = total[b][i / 4 % COLS][i % 4];
            const int row = segment.row + inside;
            if constexpr (Element<X>::BYTES) value *= args.x_scales[at];
            if (args.bias) value += to_float<T>(args.bias[row]);
            args.out[(long long)at * args.out_stride + row] = u16(to_pair<T>(value, 0));
        }
    }
};
