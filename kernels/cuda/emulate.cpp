// Runs cases of the kernels on the host: reads a file of them, writes their outputs.
//
// A case is the name of a kernel, integers, and arrays; every number is a 64-bit integer. Arrays
// are allocated by themselves, so that the address sanitizer knows their ends. The first is the
// order of blocks; the last is the output, which comes in as poison and goes out.
#include <cstdio>
#include <map>
#include <string>

#include "cases.h"

static long long number(FILE* file) {
    long long value;
    if (std::fread(&value, 8, 1, file) != 1) std::exit(3);
    return value;
}

int main(int, char** argv) {
    FILE* in = std::fopen(argv[1], "rb");
    FILE* out = std::fopen(argv[2], "wb");
    if (!in || !out) return 3;
    const std::map<std::string, Kernel> kernels = all_kernels();
    for (long long cases = number(in); cases > 0; --cases) {
        std::string name(number(in), ' ');
        if (std::fread(name.data(), 1, name.size(), in) != name.size()) return 3;
        Case test;
        test.numbers.resize(number(in));
        for (long long& value : test.numbers) value = number(in);
        test.arrays.resize(number(in));
        for (Array& array : test.arrays) {
            array.size = number(in);
            array.bytes = static_cast<u8*>(new_aligned(array.size));
            if (std::fread(array.bytes, 1, array.size, in) != array.size) return 3;
        }
        kernels.at(name)(test);
        for (const Array& array : test.arrays) {
            if (&array == &test.arrays.back()) std::fwrite(array.bytes, 1, array.size, out);
            ::operator delete(array.bytes, std::align_val_t(256));
        }
    }
    return std::fclose(out);
}
