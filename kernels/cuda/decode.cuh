// Bit planes to pairs of activations' type: code − 2^(bits−1), exactly. The layout is
// `bitsearch.kernels.planes`; its `Plane.offset` and `field` below are the same function.
#pragma once

#include "primitives.cuh"

// How many planes of 4, 2 and 1 bits come before the plane of `width`, in words of a lane.
template <int BITS>
DEVICE constexpr int first_word(int width) {
    return width == 8 || width == 4 ? 0 : width == 2 ? (BITS & 4) * 2 : (BITS & 6) * 2;
}
// Lowest bit of a field: see Plane.offset.
DEVICE constexpr int field(int width, int base, int count, int step, int pair) {
    const int index = pair % (16 / width), turn = index / count, gaps = step / width;
    return (base + step * (index % count) + width * (turn % gaps) + count * step * (turn / gaps)) %
           32;
}
// Fields side by side in a half word, and their distance.
template <int BITS>
DEVICE constexpr int count() {
    return BITS == 1 ? 8 : BITS <= 3 ? 4 : BITS <= 6 ? 2 : 1;
}
template <int BITS>
DEVICE constexpr int step() {
    return BITS == 1 ? 1 : BITS <= 3 ? 2 : BITS <= 6 ? 4 : 16;
}
// Where in the mantissa a pair is put: where its lowest field already lies, if it fits there.
template <class T, int BITS>
DEVICE constexpr int place(int pair) {
    constexpr int widest = BITS == 8 ? 8 : BITS & 4 ? 4 : BITS & 2 ? 2 : 1;
    const int natural = step<BITS>() * (pair % (16 / widest) % count<BITS>());
    const int room = int(T::mantissa) - BITS;
    return natural < room ? natural : room;
}
// (magic + 2^(bits−1+place)) · 2^−place, exactly, as bits with a minus sign.
template <class T, int BITS>
DEVICE constexpr u32 offset_bits(int place) {
    const u32 fraction = (1u << (BITS - 1 + place)) & ((1u << T::mantissa) - 1);
    return 0x8000u | ((T::bias + T::mantissa - place) << T::mantissa) | fraction;
}
DEVICE constexpr u32 both(u32 half) { return half << 16 | half; }

// Where a tile lies.
struct Shared {
    u32 start;
    template <class Value>
    DEVICE Value at(u32 offset) const {
        return shared<Value>(start + offset);
    }
};
struct Global {
    const u8* start;
    template <class Value>
    DEVICE Value at(u32 offset) const {
        return *reinterpret_cast<const Value*>(start + offset);
    }
};

// The words of one lane and tile.
template <int BITS>
struct Tile {
    u32 words[2 * BITS];

    // Takes them from a tile's bytes, in `Shared` or `Global` memory.
    template <class From>
    DEVICE void load(int lane, From from) {
#pragma unroll
        for (int piece = 0; piece < BITS / 2; ++piece) {
            const Words4 four = from.template at<Words4>(piece * 512 + lane * 16);
            words[4 * piece] = four.x;
            words[4 * piece + 1] = four.y;
            words[4 * piece + 2] = four.z;
            words[4 * piece + 3] = four.w;
        }
        if constexpr (BITS & 1) {
            const Words2 two = from.template at<Words2>(BITS / 2 * 512 + lane * 8);
            words[2 * BITS - 2] = two.x;
            words[2 * BITS - 1] = two.y;
        }
    }

    // Puts the field of one plane in its place, `lowest` bits up.
    template <int WIDTH, int BASE>
    DEVICE u32 add(int pair, int lowest, u32 value) const {
        const int at = field(WIDTH, BASE, count<BITS>(), step<BITS>(), pair);
        const int wanted = lowest + BASE;
        const u32 word = words[first_word<BITS>(WIDTH) + pair / (16 / WIDTH)];
        return and_or(rotate_right(word, u32(at - wanted + 32)), both(((1u << WIDTH) - 1) << wanted),
                      value);
    }

    DEVICE u32 add_all(int pair, int lowest, u32 value) const {
        if constexpr (BITS == 8) value = add<8, 0>(pair, lowest, value);
        if constexpr (BITS < 8 && BITS & 4) value = add<4, 0>(pair, lowest, value);
        if constexpr (BITS < 8 && BITS & 2) value = add<2, BITS & 4>(pair, lowest, value);
        if constexpr (BITS & 1) value = add<1, BITS & 6>(pair, lowest, value);
        return value;
    }

    // (code − 2^(bits−1)) · 2^(8−bits) of pairs `pair` and `pair` + 2 as signed bytes, in the order
    // 0, 2, 1, 3 of their columns.
    DEVICE u32 decode_bytes(int pair) const {
        const u32 low = add_all(pair, 8 - BITS, 0);
        return add_all(pair + 2, 16 - BITS, low) ^ 0x80808080;
    }

    // Pair `pair` of 32, a compile-time constant once unrolled.
    template <class T>
    DEVICE u32 decode(int pair) const {
        if constexpr (BITS == 8 && T::mantissa < 8) {
            // 7 bits fit the mantissa; the eighth picks what is taken away: 128 or 256.
            const u32 word = pair % 2 ? words[pair / 2] >> 8 : words[pair / 2];
            const u32 low = and_or(word, both(0x7F), both(T::magic));
            const u32 away = and_or(~word, both(0x80), both(T::magic));
            return fma2<T>(away, both(T::one | 0x8000), low);
        } else {
            const int at = place<T, BITS>(pair);
            const u32 value = add_all(pair, at, both(T::magic));
            const u32 scale = T::one - (u32(at) << T::mantissa);
            return fma2<T>(value, both(scale), both(offset_bits<T, BITS>(at)));
        }
    }
};
