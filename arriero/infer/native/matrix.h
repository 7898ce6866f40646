// A weight matrix and rows of activations, as the products take them.
//
// Weights lie in panels of 64 outputs, the inputs of a panel one after the other, so that a panel is read as one stream:
//   fp32   [in][64]
//   bf16   [in / 2][64][2]: pairs of inputs, for the dot-product instruction
//   twelve the same values as bf16 in twelve bits each, without loss; see `Twelve`
//   int8   [in / 4][64][4] of code + 128; a scale fp32 for each output, or one in half precision for each output and
//          group of 32 inputs
//   int4   [in / 32][4][64][4] bytes of two codes, which stand for 16 values; a scale (half precision) for each output and
//          group of 32 inputs, and, where there are some, a minimum that is added
// Activations for integer weights are integers of fifteen bits (two digits), or of eight (one), with a scale for each
// group of 32 inputs, chosen for each row by itself. Integer sums are exact; the groups' results are added up in order in
// fp32. (What eight bits lose: docs/inference.md.)

#pragma once

#include "lanes.h"

namespace {

constexpr int64_t kPanel = 64;  // outputs
constexpr int64_t kBlocks = kPanel / kLanes;  // of vectors in a panel
constexpr int64_t kGroup = 32;  // inputs that share a scale
constexpr int64_t kSlice = 32;  // inputs of a panel that are taken together

enum Type : int64_t { kFloat, kBf16, kInt8, kInt4, kTwelve, kInt8Groups };

extern "C" struct Matrix {
    int64_t type, out, in;
    const void* data;          // panels
    const void* scales;        // int8: float [out, padded to 64]; by groups, int4: half [panels][in / 32][64]
    const void* minimums;      // int4: half, like scales, or null: w = scale * value of the code + minimum
    const uint8_t* values;     // int4: what the 16 codes mean, plus 128; twelve: the 16 high bytes
    const struct Rare* rare;   // twelve: the weights whose high byte is none of these, in order
    const int64_t* rare_ends;  // twelve: [1 + panels] of a panel's in `rare`; the first is 0
    int64_t digits;            // int8, int4: of an activation, 1 or 2; the same in all matrices that take the same rows
};

inline bool is_half(const Matrix& m) { return m.type == kBf16 || m.type == kTwelve; }

// The inputs of a product: n rows of `width` (a multiple of 32, filled with zeros), in the forms that are asked for.
struct Rows {
    int64_t width;
    const float* floats;     // [n, width]
    const bf16* halves;      // [n, width]
    const float* rounded;    // [n, width]: the halves, widened
    const int8_t* codes;     // [n, 2 width]: integers, as integers.h lays them
    const float* scales;     // [n, width / 32]
    const int32_t* offsets;  // [n, width / 32]: -128 times the sum of a group's integers
};

inline Bytes lookup(Bytes table, Bytes codes) {
#if defined(__AVX512BW__)
    return (Bytes)_mm512_shuffle_epi8((__m512i)table, (__m512i)codes);
#elif defined(__AVX2__) && !defined(__AVX512BW__)
    using Half = decltype(codes.lo);
    return {(Half)_mm256_shuffle_epi8((__m256i)table.lo, (__m256i)codes.lo),
            (Half)_mm256_shuffle_epi8((__m256i)table.hi, (__m256i)codes.hi)};
#elif defined(__aarch64__)
    uint8x16_t from[4], at[4];
    store(from, table), store(at, codes);
    for (int i = 0; i < 4; ++i) at[i] = vqtbl1q_u8(from[i], at[i]);
    return load<Bytes>(at);
#else
    uint8_t values[64];
    for (int i = 0; i < 64; ++i) values[i] = table[codes[i]];
    return load<Bytes>(values);
#endif
}

inline Bytes table_of(const uint8_t* values) {
    uint8_t table[64];
    for (int i = 0; i < 64; ++i) table[i] = values[i % 16];
    return load<Bytes>(table);
}

// The hardware's prefetcher alone leaves a fifth of the bandwidth unused on some CPUs. (Never with a hint that the values
// pass by: on Sapphire Rapids it halves the bandwidth.)
constexpr int64_t kAhead = 4096;  // bytes

inline void prefetch(const void* p) { __builtin_prefetch((const char*)p + kAhead); }

}  // namespace
