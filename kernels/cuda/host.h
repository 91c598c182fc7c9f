// The machine as C++20 threads: a thread for every CUDA thread, POSIX barriers, and asynchronous
// copies that arrive only when they are waited for and leave poison until then. Blocks run two at a
// time, in the order that the caller chooses.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <new>
#include <thread>
#include <vector>

#define DEVICE inline

namespace host {

struct Warp {
    pthread_barrier_t barrier;
    u32 a[32][4], b[32][2];
    int given[32];
};
struct Block {
    pthread_barrier_t barrier;
    std::vector<Warp> warps;
    u8* shared;
};
struct Copy {
    void* to;
    const void* from;
    int bytes;
};
struct Thread {
    int index, block_index, block_size, block_count;
    Block* block;
    Warp* warp;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};
inline thread_local Thread self;

// Runs body() as every thread of the blocks named in `order`, two blocks at a time, so that the
// thread sanitizer sees what blocks do to each other.
template <class Body>
void launch(const std::vector<int>& order, int count, int threads, size_t bytes, Body body) {
    for (size_t next = 0; next < order.size(); next += 2) {
        const size_t together = std::min<size_t>(2, order.size() - next);
        std::vector<Block> blocks(together);
        std::vector<std::thread> running;
        for (Block& block : blocks) {
            block.warps = std::vector<Warp>(threads / 32);
            // Exactly these bytes, so that the address sanitizer sees what lies outside.
            block.shared = static_cast<u8*>(::operator new(bytes, std::align_val_t(128)));
            std::memset(block.shared, 0xFF, bytes);
            pthread_barrier_init(&block.barrier, nullptr, threads);
            for (Warp& warp : block.warps) pthread_barrier_init(&warp.barrier, nullptr, 32);
        }
        for (size_t i = 0; i < together * threads; ++i) {
            const int thread = int(i % threads), index = order[next + i / threads];
            Block* block = &blocks[i / threads];
            running.emplace_back([=, &body] {
                self = Thread{thread, index, threads, count, block, &block->warps[thread / 32],
                              {},     {}};
                body();
            });
        }
        for (std::thread& thread : running) thread.join();
        for (Block& block : blocks) {
            pthread_barrier_destroy(&block.barrier);
            for (Warp& warp : block.warps) pthread_barrier_destroy(&warp.barrier);
            ::operator delete(block.shared, std::align_val_t(128));
        }
    }
}

inline void start_copy(void* to, const void* from, int bytes) {
    if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
        std::abort();  // a GPU faults
    std::memset(to, 0xFF, bytes);
    self.open.push_back({to, from, bytes});
}

// The value nearest to x with so many mantissa bits, ties to even; subnormals below 2^lowest.
inline double round_to(double x, int mantissa, int lowest) {
    if (x == 0 || !std::isfinite(x)) return x;
    const int exponent = std::max(std::ilogb(x), lowest) - mantissa;
    return std::ldexp(std::nearbyint(std::ldexp(x, -exponent)), exponent);
}
template <class T>
double decode(u32 bits) {
    const int exponent = bits >> T::mantissa & (2 * T::bias + 1);
    const double fraction = std::ldexp(bits & ((1u << T::mantissa) - 1), -int(T::mantissa));
    const double sign = bits >> 15 & 1 ? -1 : 1;
    if (exponent == 2 * T::bias + 1) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(fraction, 1 - int(T::bias));
    return sign * std::ldexp(1 + fraction, exponent - int(T::bias));
}
template <class T>
u32 encode(double value) {
    const u32 sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return 0x7FFF;
    const int lowest = 1 - int(T::bias);
    const double size = std::fabs(round_to(value, T::mantissa, lowest));
    const u32 infinite = u32(2 * T::bias + 1) << T::mantissa;
    if (size >= std::ldexp(1.0, T::bias + 1)) return sign | infinite;
    if (size < std::ldexp(1.0, lowest))
        return sign | u32(std::ldexp(size, int(T::mantissa) - lowest));
    const int exponent = std::ilogb(size);
    const u32 fraction = u32(std::ldexp(size, int(T::mantissa) - exponent)) - (1u << T::mantissa);
    return sign | u32(exponent + int(T::bias)) << T::mantissa | fraction;
}

// Hands a lane's operands to its warp, and what f(a, b) makes of all of them back.
template <class F>
void exchange(const u32 (&a)[4], u32 b0, u32 b1, F f) {
    Warp& warp = *self.warp;
    const int lane = self.index % 32;
    std::memcpy(warp.a[lane], a, sizeof a);
    warp.b[lane][0] = b0;
    warp.b[lane][1] = b1;
    pthread_barrier_wait(&warp.barrier);
    f(warp.a, warp.b, lane / 4, lane % 4);
    pthread_barrier_wait(&warp.barrier);
}

}  // namespace host

inline int thread_index() { return host::self.index; }
inline int block_index() { return host::self.block_index; }
inline int block_size() { return host::self.block_size; }
inline int block_count() { return host::self.block_count; }
inline u32 shared_base() { return 0; }
template <class Value>
Value& shared(u32 at) {
    return *reinterpret_cast<Value*>(host::self.block->shared + at);
}
template <class Value>
void share(u32 at, Value value) {
    shared<Value>(at) = value;
}
inline void sync_block() { pthread_barrier_wait(&host::self.block->barrier); }
inline void sync_warp() { pthread_barrier_wait(&host::self.warp->barrier); }
inline int same(int value) {
#ifndef __SANITIZE_THREAD__  // whom a barrier here would hide races that a GPU has
    host::Warp& warp = *host::self.warp;
    warp.given[host::self.index % 32] = value;
    pthread_barrier_wait(&warp.barrier);
    const int first = warp.given[0];
    pthread_barrier_wait(&warp.barrier);
    if (value != first) std::abort();  // a GPU goes on with one lane's
#endif
    return value;
}
inline void fence() {}
inline u32 atomic_add(u32* where, u32 value) {
    return __atomic_fetch_add(where, value, __ATOMIC_ACQ_REL);
}
inline float load_through(const float* where) { return *where; }
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

template <int BYTES>
void copy(u32 to, const u8* from) {
    host::start_copy(&shared<u8>(to), from, BYTES);
}
alignas(16) inline const u8 zeros[16] = {};
inline void copy_or_zero(u32 to, const void* from, bool inside) {
    host::start_copy(&shared<u8>(to), inside ? from : zeros, 16);
}
inline void copy_commit() {
    host::self.groups.push_back(std::move(host::self.open));
    host::self.open.clear();
}
template <int N>
void copy_wait() {
    while (host::self.groups.size() > N) {
        for (const host::Copy& copy : host::self.groups.front())
            std::memcpy(copy.to, copy.from, copy.bytes);
        host::self.groups.pop_front();
    }
}

template <class T>
void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    host::exchange(a, b0, b1, [&](const auto& all, const auto& other, int g, int t) {
        for (int i = 0; i < 4; ++i) {
            const int row = i / 2, column = 2 * t + i % 2;
            double sum = c[i];
            for (int k = 0; k < 16; ++k) {
                const int pair = k / 2, half = k % 2 * 16;
                const u32 left = all[4 * g + pair % 4][row + 2 * (pair / 4)] >> half;
                const u32 right = other[4 * column + pair % 4][pair / 4] >> half;
                sum += host::decode<T>(left & 0xFFFF) * host::decode<T>(right & 0xFFFF);
            }
            c[i] = float(sum);
        }
    });
}
inline void mma_bytes(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    host::exchange(a, b0, b1, [&](const auto& all, const auto& other, int g, int t) {
        for (int i = 0; i < 4; ++i) {
            const int row = i / 2, column = 2 * t + i % 2;
            for (int k = 0; k < 32; ++k) {
                const int word = k / 4, byte = k % 4 * 8;
                const u32 left = all[4 * g + word % 4][row + 2 * (word / 4)] >> byte;
                const u32 right = other[4 * column + word % 4][word / 4] >> byte;
                c[i] += int(int8_t(left)) * int(int8_t(right));
            }
        }
    });
}
template <class T>
u32 fma2(u32 a, u32 b, u32 c) {
    u32 out = 0;
    for (int half = 0; half < 32; half += 16) {
        const double product = host::decode<T>(a >> half & 0xFFFF) * host::decode<T>(b >> half & 0xFFFF);
        out |= host::encode<T>(product + host::decode<T>(c >> half & 0xFFFF)) << half;
    }
    return out;
}
template <class T>
float to_float(u32 bits) {
    return float(host::decode<T>(bits & 0xFFFF));
}
template <class T>
u32 to_pair(float low, float high) {
    return host::encode<T>(low) | host::encode<T>(high) << 16;
}
inline u32 and_or(u32 word, u32 mask, u32 other) { return (word & mask) | other; }
inline u32 bits_of(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline int nearest(float value) { return int(std::nearbyint(value)); }
inline float largest(float a, float b) { return std::fmax(a, b); }
inline float magnitude(float a) { return std::fabs(a); }
