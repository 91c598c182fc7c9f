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
    using Sums = float[COLS][4];

    // What the parts of a kernel read again from the start of shared memory, so that no register
    // holds it meanwhile: number of items, first tile and number of tiles of this range, x_pitch.
    enum Word : u32 { ITEM_COUNT, FIRST, COUNT, PITCH, ITEMS };

    const StreamArgs& args;
    const int thread, lane, warp;
    const u32 base, heads, rings, ring, x;

    DEVICE explicit Stream(const StreamArgs& a)
        : args(a),
          thread(thread_index()),
          lane(thread % 32),
          warp(same(thread / 32)),
          base(shared_base()),
          heads(base + align(4 * (ITEMS + 2 * a.capacity))),
          rings(heads + align(WARPS * head_bytes())),
          ring(rings + warp * ring_bytes()),
          x(rings + WARPS * ring_bytes()) {}

    DEVICE u32 head_bytes() const { return 4 * PIECE_PITCH * args.m; }
    DEVICE u32 ring_bytes() const { return STAGES * args.slot_bytes; }
    DEVICE int read(Word word) const { return same(int(shared<u32>(base + 4 * word))); }
    // Where an item is written, and it, asked for by all lanes of a warp.
    DEVICE u32 item_at(int index) const { return base + 4 * (ITEMS + index); }
    DEVICE static u32 same_item(u32 at) { return u32(same(int(shared<u32>(at)))); }
    DEVICE const Segment& segment_of(u32 item) const { return args.segments[item >> 24]; }
    // Where the part of a warp begins in the row of all tiles.
    DEVICE static int part(int w, int tiles) { return tiles * w / WARPS; }

    DEVICE void run() {
        const int split = block_index() % args.splits;
        if (thread == 0) {
            const int first = args.tiles * split / args.splits;
            share(base + 4 * FIRST, u32(first));
            share(base + 4 * COUNT, u32(args.tiles * (split + 1) / args.splits - first));
            // 64 bytes more than a multiple of 128: rows of x lie in different banks.
            const u32 most = (args.tiles + args.splits - 1) / args.splits;
            share(base + 4 * PITCH, most * 256 + 64);
        }
        const u32* plan = args.plan + block_index() * (args.capacity + 1);
        for (int i = thread; i < args.capacity + 1; i += 32 * WARPS)
            share(base + 4 * (i ? ITEMS + i - 1 : ITEM_COUNT), plan[i]);
        sync_block();
        const int length = read(COUNT), all = read(ITEM_COUNT) * length;
        int tile = same(part(warp, all) % length);
        int rest = same(part(warp + 1, all) - part(warp, all));
        u32 at = item_at(same(part(warp, all) / length));
        Ahead ahead{nullptr, at, length - tile, rest};
        if (rest) open(ahead);
        u32 slot = ring;
#pragma unroll 1
        for (int stage = 0; stage < STAGES; ++stage) {
            prefetch(ahead, slot);
            slot = next_slot(slot);
        }
        wait_for_previous_kernel();
        // Not sooner: blocks of two launches to come would then share some multiprocessors, and
        // leave others idle.
        let_next_kernel_start();
        load_x();
        copy_wait<0>();
        sync_block();
        for (; rest; at += 4, tile = 0) {
            const int own = read(COUNT) - tile, left = rest < own ? rest : own;
            rest -= left;
            const bool whole = left == read(COUNT), is_head = tile;
            const Segment& segment = segment_of(same_item(at));
            Sums total = {};
            ((Kinds::is(segment) ? walk<Kinds>(ahead, slot, tile, left, total) : void()), ...);
            // Items that other warps share are laid down: the first of this warp's part apart, the
            // last where the ring was, which is empty now.
            if (whole) {
                const u32 item = same_item(at);
                each(total, [&](int row, int column, float value) {
                    keep(segment_of(item), item & 0xFFFFFF, row, column, value);
                });
            } else if (is_head) {
                store(heads + warp * head_bytes(), total);
            } else {
                store(ring, total);
            }
        }
        sync_block();
        add_pieces();
        if (args.splits > 1) meet();
    }

    // The next tile to be copied: where its item is written, tiles of the item and of all from it on.
    struct Ahead {
        const u8* planes;
        u32 at;
        int until, left;
    };

    // Copies a tile to a slot that nobody needs any more.
    DEVICE void prefetch(Ahead& ahead, u32 slot) const {
        if (ahead.left) {
            if (ahead.until == 0) {
                ahead.at += 4;
                ahead.until = read(COUNT);
                open(ahead);
            }
            if constexpr (sizeof...(Kinds) == 1) {
                (fetch<Kinds>(ahead, slot), ...);
            } else {
                const Segment& segment = segment_of(same_item(ahead.at));
                ((Kinds::is(segment) ? fetch<Kinds>(ahead, slot) : void()), ...);
            }
            --ahead.until;
            --ahead.left;
        }
        copy_commit();
    }

    DEVICE u32 next_slot(u32 slot) const {
        slot += args.slot_bytes;
        return slot == ring + ring_bytes() ? ring : slot;
    }

    DEVICE void open(Ahead& ahead) const {
        const u32 item = same_item(ahead.at);
        const Segment& segment = segment_of(item);
        const u8* block =
            args.data + segment.offset + (item & 0xFFFFFF) * (long long)segment.block_bytes;
        const int tile = read(FIRST) + read(COUNT) - ahead.until;
        ((Kinds::is(segment) ? void(ahead.planes = block + tile * (long long)Kinds::TILE_BYTES)
                             : void()),
         ...);
    }

    template <class K>
    DEVICE void fetch(Ahead& ahead, u32 slot) const {
        int left = 0;
        if constexpr (K::ROWWISE) left = args.tiles - read(FIRST) - read(COUNT) + ahead.until;
        copy_tile<K>(slot, lane, ahead.planes, K::meta(ahead.planes, left));
        ahead.planes += K::TILE_BYTES;
    }

    // All rows are under way before the first is waited for.
    DEVICE void load_x() const {
        const int start = read(FIRST) * 128, width = read(COUNT) * 128, pitch = read(PITCH);
        const bool aligned = args.columns % 8 == 0 && args.x_stride % 8 == 0;
        for (int row = 0; row < args.m; ++row) {
            const u16* from = args.x + (long long)row * args.x_stride + start;
            for (int column = thread * 8; column < width; column += 256 * WARPS) {
                const u32 to = x + row * pitch + column * 2;
                if (aligned) {
                    const bool inside = start + column < args.columns;
                    copy_or_zero(to, inside ? from + column : args.x, inside);
                } else {
                    u32 pairs[4] = {0, 0, 0, 0};
                    for (int k = 0; k < 8; ++k) {
                        if (start + column + k < args.columns)
                            pairs[k / 2] |= u32(from[column + k]) << k % 2 * 16;
                    }
                    share(to, Words4{pairs[0], pairs[1], pairs[2], pairs[3]});
                }
            }
        }
        copy_commit();
    }

    // `left` tiles of an item from `tile` on.
    template <class K>
    DEVICE void walk(Ahead& ahead, u32& slot, int tile, int left, Sums& total) {
        const int g = lane / 4, t = lane % 4, pitch = read(PITCH);
        u32 own[COLS];
        // Columns past m repeat the last one: nothing reads what becomes of them.
        for (int c = 0; c < COLS; ++c) {
            const int column = c * 8 + g < args.m ? c * 8 + g : args.m - 1;
            own[c] = x + column * pitch + tile * 256 + t * 16;
        }
        for (; left > 0; --left) {
            copy_wait<STAGES - 1>();
            multiply<K>(slot, own, total);
            // What comes into the slot next may lie otherwise, over what other lanes read of this.
            sync_warp();
            prefetch(ahead, slot);
            slot = next_slot(slot);
            for (int c = 0; c < COLS; ++c) own[c] += 256;
        }
    }

    template <class K>
    DEVICE void multiply(u32 slot, const u32 (&own)[COLS], Sums& total) {
        Tile<K::BITS> weights;
        weights.load(lane, Shared{slot});
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
                const int index = unit * K::GROUPS / 4;
                const Scales scales = scales_of<K>(slot, lane, index);
                float zero[2] = {0, 0};
                if constexpr (K::ASYMMETRIC) zeros_of<K>(slot, lane, index).minus(zero);
#pragma unroll
                for (int i = 0; i < 4 * COLS; ++i) {
                    const int c = i / 4, half = i % 4 / 2;
                    float value = sum[c][i % 4];
                    if constexpr (K::ASYMMETRIC)
                        value = multiply_add(zero[half], sum_x[c][i % 4], value);
                    total[c][i % 4] = multiply_add(scales.of[half], value, total[c][i % 4]);
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
            share(piece + (column * PIECE_PITCH + row) * 4, value);
        });
    }
    // Every item that several warps share: a thread adds up all pieces of an output.
    DEVICE void add_pieces() const {
        const int length = read(COUNT), items = read(ITEM_COUNT), all = items * length;
        for (int i = thread; i < items * 16 * args.m; i += 32 * WARPS) {
            const int index = i / 16 / args.m, column = i / 16 % args.m, row = i % 16;
            const int start = index * length, stop = start + length;
            int w = start * WARPS / all;
            while (part(w + 1, all) <= start) ++w;
            if (part(w, all) <= start && part(w + 1, all) >= stop) continue;
            float value = 0;
            for (; w < WARPS && part(w, all) < stop; ++w) {
                const u32 piece =
                    part(w, all) > start ? heads + w * head_bytes() : rings + w * ring_bytes();
                if (part(w + 1, all) > part(w, all))
                    value += shared<float>(piece + (column * PIECE_PITCH + row) * 4);
            }
            const u32 item = shared<u32>(item_at(index));
            keep(segment_of(item), item & 0xFFFFFF, row, column, value);
        }
    }

    // A sum of all columns becomes an output; one of a range of them waits for the others.
    DEVICE void keep(const Segment& segment, int block, int row, int column, float value) const {
        if (args.splits == 1) {
            write(segment, block, row, column, value);
        } else {
            const int split = block_index() % args.splits;
            const long long at = (long long)(segment.block + block) * args.splits + split;
            args.partial[at * 16 * args.m + column * 16 + row] = value;
        }
    }

    // The range of columns that comes last adds all of them up.
    DEVICE void meet() const {
        const int all = read(ITEM_COUNT), outputs = 16 * args.m;
        const u32 last = args.splits - 1, seen = base + 4 * (ITEMS + args.capacity);
        fence();
        sync_block();
        for (int i = thread; i < all; i += 32 * WARPS) {
            const u32 item = shared<u32>(item_at(i));
            u32* arrived = args.arrived + segment_of(item).block + (item & 0xFFFFFF);
            const u32 before = atomic_add(arrived, 1);
            if (before == last) *arrived = 0;
            share(seen + 4 * i, before);
        }
        sync_block();
        fence();
        for (int i = thread; i < all * outputs; i += 32 * WARPS) {
            const int index = i / outputs, output = i % outputs;
            if (shared<u32>(seen + 4 * index) != last) continue;
            const u32 item = shared<u32>(item_at(index));
            const Segment& segment = segment_of(item);
            const int block = item & 0xFFFFFF;
            const float* from =
                args.partial + (long long)(segment.block + block) * args.splits * outputs + output;
            float value = 0;
            // Eight at a time are under way; they are added up in order.
            for (int s = 0; s < args.splits; s += 8) {
                float part[8];
#pragma unroll
                for (int k = 0; k < 8; ++k)
                    part[k] = s + k < args.splits ? load_through(from + (s + k) * outputs) : 0;
#pragma unroll
                for (int k = 0; k < 8; ++k) value += part[k];
            }
            write(segment, block, output % 16, output / 16, value);
        }
    }

    DEVICE void write(const Segment& segment, int block, int row, int column, float value) const {
        const int inside = block * 16 + row;
        if (inside >= segment.rows) return;
        const int at = segment.row + inside;
        if (args.bias) value += to_float<T>(args.bias[at]);
        args.out[(long long)column * args.out_stride + at] = u16(to_pair<T>(value, 0));
    }
};
