// Rows of x as signed bytes, each with a scale: largest magnitude / 127, rounded to nearest even.
// Of every four columns the middle two change places, as Tile::decode_bytes has them.
#pragma once

#include "primitives.cuh"

struct TokenArgs {
    const u16* x;  // (m, columns), x_stride apart
    u8* out;       // (m, out_stride); zeros past the columns
    float* scales;  // (m,)
    int columns, x_stride, out_stride;
};

template <class T>
DEVICE void quantize_token(const TokenArgs& args) {
    const u16* x = args.x + (long long)block_index() * args.x_stride;
    float most = 0;
    for (int i = thread_index(); i < args.columns; i += block_size())
        most = largest(most, magnitude(to_float<T>(x[i])));
    const u32 base = shared_base(), own = base + 4 * thread_index();
    share(own, most);
    for (int half = block_size() / 2; half > 0; half /= 2) {
        sync_block();
        if (thread_index() < half)
            share(own, largest(shared<float>(own), shared<float>(own + 4 * half)));
    }
    sync_block();
    const float scale = shared<float>(base) / 127, inverse = scale > 0 ? 1 / scale : 0;
    if (thread_index() == 0) args.scales[block_index()] = scale;
    u32* out = reinterpret_cast<u32*>(args.out + (long long)block_index() * args.out_stride);
    for (int four = thread_index(); four < args.out_stride / 4; four += block_size()) {
        u32 word = 0;
        for (int k = 0; k < 4; ++k) {
            const int i = 4 * four + k, byte = k == 1 ? 2 : k == 2 ? 1 : k;
            const float value = i < args.columns ? to_float<T>(x[i]) * inverse : 0;
            word |= (u32(nearest(value)) & 0xFF) << 8 * byte;
        }
        out[four] = word;
    }
}
