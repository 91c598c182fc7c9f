// The kernels that the host can run, by name, on the arrays of a case.
#pragma once

#include <map>
#include <new>
#include <string>
#include <vector>

#include "batch.cuh"
#include "calibrate.cuh"
#include "conformance.cuh"
#include "dequantize.cuh"
#include "stream.cuh"
#include "tokens.cuh"

struct Array {
    u8* bytes = nullptr;
    size_t size = 0;

    template <class T>
    T* as() const {
        return size ? reinterpret_cast<T*>(bytes) : nullptr;
    }
};
struct Case {
    std::vector<long long> numbers;
    std::vector<Array> arrays;

    std::vector<int> order() const {
        const long long* first = arrays[0].as<long long>();
        return std::vector<int>(first, first + arrays[0].size / 8);
    }
};
using Kernel = void (*)(const Case&);

// Exactly so many bytes: aligned_alloc would round up and hide what lies behind the end.
inline u8* new_aligned(size_t size) {
    return static_cast<u8*>(::operator new(size, std::align_val_t(256)));
}

constexpr int WARPS = 4, STAGES = 3;

// Every width, group and symmetry, all in one launch; or, to build sooner, one of each width.
template <template <class...> class Worker, class... Made>
struct All {
#ifdef FEW_KINDS
    template <int BITS>
    using Add = All<Worker, Made..., Kind<BITS, BITS % 4 == 3 ? 4 : BITS % 4, BITS % 3 == 0>>;
#else
    template <int BITS>
    using Add = All<Worker, Made..., Kind<BITS, 0, 0>, Kind<BITS, 0, 1>, Kind<BITS, 1, 0>,
                    Kind<BITS, 1, 1>, Kind<BITS, 2, 0>, Kind<BITS, 2, 1>, Kind<BITS, 4, 0>,
                    Kind<BITS, 4, 1>>;
#endif
    using Of = Worker<Made...>;
};
template <class T, int COLS>
struct Streams {
    template <class... Kinds>
    using Worker = Stream<T, COLS, WARPS, STAGES, Kinds...>;
};
template <class X, int COLS>
struct Batches {
    template <class... Kinds>
    using Worker = Batch<X, COLS, 3, Kinds...>;
};
template <class T>
struct Dequantizes {
    template <class... Kinds>
    using Worker = Dequantize<T, Kinds...>;
};
template <template <class...> class Worker>
using Every = typename All<Worker>::template Add<1>::template Add<2>::template Add<3>::template Add<
    4>::template Add<5>::template Add<6>::template Add<7>::template Add<8>::Of;

template <class T, int COLS>
void run_stream(const Case& c) {
    const auto& n = c.numbers;
    StreamArgs args{};
    args.x = c.arrays[1].as<u16>();
    args.data = c.arrays[2].as<u8>();
    args.plan = c.arrays[4].as<u32>();
    args.bias = c.arrays[5].as<u16>();
    args.partial = c.arrays[6].as<float>();
    args.arrived = c.arrays[7].as<u32>();
    args.out = c.arrays[8].as<u16>();
    std::memcpy(args.segments, c.arrays[3].bytes, sizeof args.segments);
    args.m = n[0];
    args.columns = n[1];
    args.x_stride = n[2];
    args.out_stride = n[3];
    args.tiles = n[4];
    args.splits = n[5];
    args.slot_bytes = n[6];
    args.capacity = n[7];
    const std::vector<int> order = c.order();
    host::launch(order, int(order.size()), WARPS * 32, n[8],
                 [&] { Every<Streams<T, COLS>::template Worker>(args).run(); });
    for (size_t i = 0; i < c.arrays[7].size / 4; ++i)
        if (args.arrived[i]) std::abort();  // the next launch would add up too early
}

template <class X, int COLS>
void run_batch(const Case& c) {
    const auto& n = c.numbers;
    BatchArgs args{};
    args.x = c.arrays[1].as<u8>();
    args.data = c.arrays[2].as<u8>();
    args.plan = c.arrays[4].as<u32>();
    args.bias = c.arrays[5].as<u16>();
    args.partial = c.arrays[6].as<float>();
    args.arrived = c.arrays[7].as<u32>();
    args.x_scales = c.arrays[8].as<float>();
    args.out = c.arrays[9].as<u16>();
    std::memcpy(args.segments, c.arrays[3].bytes, sizeof args.segments);
    args.m = n[0];
    args.columns = n[1];
    args.x_stride = n[2];
    args.out_stride = n[3];
    args.tiles = n[4];
    args.splits = n[5];
    args.slot_bytes = n[6];
    args.row_tiles = n[7];
    const std::vector<int> order = c.order();
    host::launch(order, int(order.size()), 256, n[8],
                 [&] { Every<Batches<X, COLS>::template Worker>(args).run(); });
    for (size_t i = 0; i < c.arrays[7].size / 4; ++i)
        if (args.arrived[i]) std::abort();
}

template <class T>
void run_dequantize(const Case& c) {
    const auto& n = c.numbers;
    DequantizeArgs args{};
    args.data = c.arrays[1].as<u8>();
    std::memcpy(args.segments, c.arrays[2].bytes, sizeof args.segments);
    args.out = c.arrays[3].as<u16>();
    args.columns = n[0];
    args.tiles = n[1];
    args.blocks = n[2];
    args.segment_count = n[3];
    const std::vector<int> order = c.order();
    host::launch(order, int(order.size()), 64, 0,
                 [&] { Every<Dequantizes<T>::template Worker>{args}.run(); });
}

template <class T>
void run_tokens(const Case& c) {
    TokenArgs args{};
    args.x = c.arrays[1].as<u16>();
    args.scales = c.arrays[2].as<float>();
    args.out = c.arrays[3].as<u8>();
    args.columns = c.numbers[0];
    args.x_stride = c.numbers[1];
    args.out_stride = c.numbers[2];
    const std::vector<int> order = c.order();
    host::launch(order, int(order.size()), 64, 256, [&] { quantize_token<T>(args); });
}

inline void run_conformance(const Case& c) {
    host::launch({0}, 1, int(c.arrays[1].size / 64), 0,
                 [&] { conformance(c.arrays[1].as<u32>(), c.arrays[2].as<u32>()); });
}

inline void run_copy(const Case& c) {
    const std::vector<int> order = c.order();
    host::launch(order, int(order.size()), 64, 0, [&] {
        copy_words(c.arrays[1].as<Words4>(), c.arrays[2].as<Words4>(), c.arrays[1].size / 16);
    });
}

inline void run_read(const Case& c) {
    const std::vector<int> order = c.order();
    host::launch(order, int(order.size()), 64, 0, [&] {
        read_words(c.arrays[1].as<Words4>(), c.arrays[2].as<u32>(), c.arrays[1].size / 16,
                   u32(c.numbers[0]));
    });
}

inline std::map<std::string, Kernel> all_kernels() {
    return {
        {"conformance", run_conformance},
        {"copy", run_copy},
        {"read", run_read},
        {"batch float16 4", run_batch<Half, 4>},
        {"batch float16 8", run_batch<Half, 8>},
        {"batch bfloat16 4", run_batch<BFloat, 4>},
        {"batch bfloat16 8", run_batch<BFloat, 8>},
        {"bytes float16 4", run_batch<Bytes<Half>, 4>},
        {"bytes float16 8", run_batch<Bytes<Half>, 8>},
        {"bytes bfloat16 4", run_batch<Bytes<BFloat>, 4>},
        {"bytes bfloat16 8", run_batch<Bytes<BFloat>, 8>},
        {"tokens float16", run_tokens<Half>},
        {"tokens bfloat16", run_tokens<BFloat>},
        {"dequantize float16", run_dequantize<Half>},
        {"dequantize bfloat16", run_dequantize<BFloat>},
        {"stream float16 1", run_stream<Half, 1>},
        {"stream float16 2", run_stream<Half, 2>},
        {"stream bfloat16 1", run_stream<BFloat, 1>},
        {"stream bfloat16 2", run_stream<BFloat, 2>},
    };
}
