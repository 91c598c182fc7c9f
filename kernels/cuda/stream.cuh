// out = x·Wᵀ (+ bias) for up to 16 rows of x: every byte of W is read once, as fast as memory gives.
//
// A block has a list of items, each 16 rows of one segment, over one range of columns. The tiles of
// all its items stand in one row, of which each warp takes an equal, unbroken part. Each lane copies
// the bytes that it will decode itself into a ring of its own in shared memory, so that the ring
// needs no barrier, and runs on across items and widths. Codes become activations' type less
// 2^(bits−1), exactly; what a zero point differs from that is taken off through the sum of x, one
// more product with ones; scales multiply the float32 sums of a group.
//
// An item that lies within one warp is written at once. The others are added up at the end, in
// order; so are the ranges of columns (`splits`), in `partial`, by the block that comes last.
#pragma once

#include "segments.cuh"

constexpr int PIECE_PITCH = 20;  // floats of a column of partial sums; no bank conflicts

struct StreamArgs {
    const u16* x;    // (m, columns), x_stride apart
    const u8* data;  // what the segments lie in
    const u32* plan;  // of each block: how many items, and each, segment << 24 | block of 16 rows
    const u16* bias;  // (rows,) or null
    u16* out;         // (m, rows), out_stride apart
    float* partial;   // (blocks of 16 rows, splits, 16·m); unused without splits
    u32* arrived;     // (blocks of 16 rows,), zeros before and after
    int m, columns, x_stride, out_stride;
    int tiles, splits, slot_bytes, capacity;
    Segment segments[MAX_SEGMENTS];
};

DEVICE u32 align(u32 bytes) { return (bytes + 127) / 128 * 128; }

template <class T, int COLS, int WARPS, int STAGES, class... Kinds>
struct Stream {
    static constexpr u32 PIECE_BYTES = 8 * COLS * PIECE_PITCH * 4;
    using Sums = float[COLS][4];

    const StreamArgs& args;
    const int thread, lane, warp, split, first, count;
    // Offsets in shared memory: rings, this warp's, x; items begin at 4.
    u32 rings, ring, x, x_pitch;
    int item_count, tile_count;

    DEVICE explicit Stream(const StreamArgs& a)
        : args(a),
          thread(thread_index()),
          lane(thread % 32),
          warp(thread / 32),
          split(block_index() % a.splits),
          first(a.tiles * split / a.splits),
          count(a.tiles * (split + 1) / a.splits - first) {
        rings = align(4 * (2 * a.capacity + 1));
        ring = rings + warp * ring_bytes();
        x = rings + WARPS * ring_bytes();
        // 64 bytes more than a multiple of 128: rows of x lie in different banks.
        x_pitch = (a.tiles + a.splits - 1) / a.splits * 256 + 64;
    }

    DEVICE u32 ring_bytes() const { return STAGES * args.slot_bytes; }
    DEVICE u32 item_at(int index) const { return shared<u32>(4 + 4 * index); }
    DEVICE const Segment& segment_of(u32 item) const { return args.segments[item >> 24]; }
    // Where the part of a warp begins in the row of all tiles.
    DEVICE int part(int w) const { return tile_count * w / WARPS; }

    DEVICE void run() {
        for (int i = thread; i < args.capacity + 1; i += 32 * WARPS)
            shared<u32>(4 * i) = args.plan[block_index() * (args.capacity + 1) + i];
        sync_block();
        item_count = int(shared<u32>(0));
        tile_count = item_count * count;
        const int begin = part(warp), end = part(warp + 1);
        Ahead ahead{};
        ahead.slot = ring;
        ahead.left = end - begin;
        ahead.item = begin / count - 1;
        ahead.tile = begin % count;
        for (int stage = 0; stage < STAGES - 1; ++stage) prefetch(ahead);
        wait_for_previous_kernel();
        load_x();
        sync_block();
        let_next_kernel_start();
        Sums head = {}, total = {};
        u32 slot = ring;
        int tile = begin % count;
        bool whole = true;
        for (int done = begin; done < end;) {
            const int left = end - done < count - tile ? end - done : count - tile;
            const u32 item = item_at(done / count);
            const Segment& segment = segment_of(item);
            for (int i = 0; i < 4 * COLS; ++i) total[i / 4][i % 4] = 0;
            ((Kinds::is(segment) ? walk<Kinds>(ahead, slot, tile, left, total) : void()), ...);
            whole = left == count;
            if (whole) {
                each(total, [&](int row, int column, float value) {
                    keep(segment, item & 0xFFFFFF, row, column, value);
                });
            } else if (tile) {
                for (int i = 0; i < 4 * COLS; ++i) head[i / 4][i % 4] = total[i / 4][i % 4];
            }
            done += left;
            tile = 0;
        }
        copy_wait<0>();
        sync_warp();
        // The ring is empty now, and holds the sums of the first and the last item instead.
        if (begin % count) store(ring, head);
        if (!whole && end - begin >= end % count) store(ring + PIECE_BYTES, total);
        sync_block();
        add_pieces();
        if (args.splits > 1) meet();
    }

    // The next tile to be copied, and the slot that it goes to.
    struct Ahead {
        const u8 *planes, *meta;
        int item, tile, left;
        u32 slot;
        bool opened;
    };

    DEVICE void prefetch(Ahead& ahead) {
        if (ahead.left) {
            if (!ahead.opened || ahead.tile == count) {
                if (ahead.opened) ahead.tile = 0;
                ahead.opened = true;
                const u32 item = item_at(++ahead.item);
                const Segment& segment = segment_of(item);
                ((Kinds::is(segment) ? open<Kinds>(segment, item & 0xFFFFFF, ahead) : void()), ...);
            }
            if constexpr (sizeof...(Kinds) == 1) {
                (fetch<Kinds>(ahead), ...);
            } else {
                const Segment& segment = segment_of(item_at(ahead.item));
                ((Kinds::is(segment) ? fetch<Kinds>(ahead) : void()), ...);
            }
            ++ahead.tile;
            --ahead.left;
        }
        copy_commit();
        ahead.slot = next_slot(ahead.slot);
    }

    DEVICE u32 next_slot(u32 slot) const {
        slot += args.slot_bytes;
        return slot == ring + ring_bytes() ? ring : slot;
    }

    template <class K>
    DEVICE void open(const Segment& segment, u32 number, Ahead& ahead) {
        const u8* block = args.data + segment.offset + number * (long long)segment.block_bytes;
        const int tile = first + ahead.tile;
        ahead.planes = block + tile * (long long)K::TILE_BYTES;
        ahead.meta = K::meta(block, tile, args.tiles);
    }

    template <class K>
    DEVICE void fetch(Ahead& ahead) {
        copy_tile<K>(ahead.slot, lane, ahead.planes, ahead.meta);
        ahead.planes += K::TILE_BYTES;
        if constexpr (!K::ROWWISE) ahead.meta += K::TILE_BYTES;
    }

    DEVICE void load_x() {
        const int start = first * 128, width = count * 128;
        const bool aligned = args.columns % 8 == 0 && args.x_stride % 8 == 0;
        for (int row = 0; row < args.m; ++row) {
            for (int column = thread * 8; column < width; column += 256 * WARPS) {
                const u16* from = args.x + (long long)row * args.x_stride + start + column;
                Words4 value = {0, 0, 0, 0};
                if (aligned) {
                    if (start + column < args.columns)
                        value = *reinterpret_cast<const Words4*>(from);
                } else {
                    u32 pairs[4] = {0, 0, 0, 0};
                    for (int k = 0; k < 8; ++k) {
                        if (start + column + k < args.columns)
                            pairs[k / 2] |= u32(from[k]) << k % 2 * 16;
                    }
                    value = {pairs[0], pairs[1], pairs[2], pairs[3]};
                }
                shared<Words4>(x + row * x_pitch + column * 2) = value;
            }
        }
    }

    // `left` tiles of an item from `tile` on.
    template <class K>
    DEVICE void walk(Ahead& ahead, u32& slot, int tile, int left, Sums& total) {
        const int g = lane / 4, t = lane % 4;
        u32 own[COLS];
        // Columns past m repeat the last one: nothing reads what becomes of them.
        for (int c = 0; c < COLS; ++c) {
            const int column = c * 8 + g < args.m ? c * 8 + g : args.m - 1;
            own[c] = x + column * x_pitch + tile * 256 + t * 16;
        }
        for (; left > 0; --left) {
            copy_wait<STAGES - 2>();
            multiply<K>(slot, own, total);
            prefetch(ahead);
            slot = next_slot(slot);
            for (int c = 0; c < COLS; ++c) own[c] += 256;
        }
    }

    template <class K>
    DEVICE void multiply(u32 slot, const u32 (&own)[COLS], Sums& total) {
        Tile<K::BITS> weights;
        weights.load(lane, [&](u32 at) { return &shared<u8>(slot + at); });
        const u32 ones[4] = {both(T::one), both(T::one), both(T::one), both(T::one)};
        Sums sum = {}, sum_x = {};
#pragma unroll
        for (int unit = 0; unit < 4; ++unit) {
            Words4 right[COLS];
#pragma unroll
            for (int c = 0; c < COLS; ++c) right[c] = shared<Words4>(own[c] + unit * 64);
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                u32 left[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    left[i] = weights.template decode<T>(8 * unit + 4 * step + i);
#pragma unroll
                for (int c = 0; c < COLS; ++c) {
                    const u32 b0 = step ? right[c].z : right[c].x;
                    const u32 b1 = step ? right[c].w : right[c].y;
                    mma<T>(sum[c], left, b0, b1);
                    if constexpr (K::ASYMMETRIC) mma<T>(sum_x[c], ones, b0, b1);
                }
            }
            if ((unit + 1) * K::GROUPS % 4 == 0) {
                const int index = (unit + 1) * K::GROUPS / 4 - 1;
                const Group group = group_of<K>(slot, lane, index);
#pragma unroll
                for (int i = 0; i < 4 * COLS; ++i) {
                    const int c = i / 4, half = i % 4 / 2;
                    float value = sum[c][i % 4];
                    if constexpr (K::ASYMMETRIC)
                        value = multiply_add(-group.zero[half], sum_x[c][i % 4], value);
                    total[c][i % 4] = multiply_add(group.scale[half], value, total[c][i % 4]);
                    sum[c][i % 4] = sum_x[c][i % 4] = 0;
                }
            }
        }
    }

    // f(row, column, sum) of every sum of this lane that is an output.
    template <class F>
    DEVICE void each(const Sums& sums, F f) const {
#pragma unroll
        for (int i = 0; i < 4 * COLS; ++i) {
            const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (column < args.m) f(lane / 4 + i % 4 / 2 * 8, column, sums[i / 4][i % 4]);
        }
    }
    DEVICE void store(u32 piece, const Sums& sums) const {
        each(sums, [&](int row, int column, float value) {
            shared<float>(piece + (column * PIECE_PITCH + row) * 4) = value;
        });
    }

    // Every item that several warps share: a warp adds up all pieces of an item.
    DEVICE void add_pieces() {
        for (int i = warp; i < item_count; i += WARPS) {
            const int start = i * count, stop = start + count;
            int w = int((long long)start * WARPS / tile_count);
            while (part(w + 1) <= start) ++w;
            if (part(w) <= start && part(w + 1) >= stop) continue;
            const u32 item = item_at(i);
            for (int output = lane; output < 16 * args.m; output += 32) {
                float value = 0;
                for (int other = w; other < WARPS && part(other) < stop; ++other) {
                    const u32 piece = rings + other * ring_bytes() +
                                      (part(other) > start ? 0 : PIECE_BYTES);
                    if (part(other + 1) > part(other))
                        value += shared<float>(piece + (output / 16 * PIECE_PITCH + output % 16) * 4);
                }
                keep(segment_of(item), item & 0xFFFFFF, output % 16, output / 16, value);
            }
        }
    }

    // A sum of all columns becomes an output; one of a range of them waits for the others.
    DEVICE void keep(const Segment& segment, int block, int row, int column, float value) {
        if (args.splits == 1) {
            write(segment, block, row, column, value);
        } else {
            const long long at = (long long)(segment.block + block) * args.splits + split;
            args.partial[at * 16 * args.m + column * 16 + row] = value;
        }
    }

    // The range of columns that comes last adds all of them up.
    DEVICE void meet() {
        const u32 last = args.splits - 1, seen = 4 + 4 * args.capacity;
        fence();
        sync_block();
        for (int i = thread; i < item_count; i += 32 * WARPS) {
            const u32 item = item_at(i);
            u32* arrived = args.arrived + segment_of(item).block + (item & 0xFFFFFF);
            const u32 before = atomic_add(arrived, 1);
            if (before == last) *arrived = 0;
            shared<u32>(seen + 4 * i) = before;
        }
        sync_block();
        fence();
        const int outputs = 16 * args.m;
        for (int i = warp; i < item_count; i += WARPS) {
            if (shared<u32>(seen + 4 * i) != last) continue;
            const u32 item = item_at(i);
            const Segment& segment = segment_of(item);
            const int block = item & 0xFFFFFF;
            const float* from =
                args.partial + (long long)(segment.block + block) * args.splits * outputs;
            for (int output = lane; output < outputs; output += 32) {
                float value = 0;
                for (int s = 0; s < args.splits; ++s)
                    value += load_through(from + s * outputs + output);
                write(segment, block, output % 16, output / 16, value);
            }
        }
    }

    DEVICE void write(const Segment& segment, int block, int row, int column, float value) {
        const int inside = block * 16 + row;
        if (inside >= segment.rows) return;
        const int at = segment.row + inside;
        if (args.bias) value += to_float<T>(args.bias[at]);
        args.out[(long long)column * args.out_stride + at] = u16(to_pair<T>(value, 0));
    }
};
