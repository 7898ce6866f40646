// A weight matrix and rows of activations, as the products take them.
//
// Weights lie in panels of 32 outputs, the inputs of a panel one after the other, so that a panel is read as one stream
// by tiles of any height:
//   fp32   [in][32]
//   bf16   [in / 2][32][2]: pairs of inputs, for the dot-product instruction
//   twelve the same values as bf16 in twelve bits each, without loss; see `Twelve`
//   int8   [in / 4][32][4] of code + 128; a scale fp32 for each output, or one in half precision for each output and
//          group of 32 inputs
//   int4   [in / 32][4][32][4] bytes of two codes, which stand for 16 values; a scale (half precision) for each output and
//          group of 32 inputs, and, where there are some, a minimum that is added
// Activations for integer weights are integers of fifteen bits (two digits), or of eight (one), with a scale for each
// group of 32 inputs, chosen for each row by itself. Integer sums are exact; the groups' results are added up in order in
// fp32. (What eight bits lose: docs/inference.md.)

#pragma once

#include "lanes.h"

namespace {

constexpr int64_t kPanel = 32;  // outputs
constexpr int64_t kBlocks = kPanel / kLanes;  // of vectors in a panel
constexpr int64_t kGroup = 32;  // inputs that share a scale

enum Type : int64_t { kFloat, kBf16, kInt8, kInt4, kTwelve, kInt8Groups };

extern "C" struct Matrix {
    int64_t type, out, in;
    const void* data;          // panels
    const void* scales;        // int8: float [out, padded to 32]; by groups, int4: half [panels][in / 32][32]
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

// 64 codes of four bits: the low halves of 32 bytes, then their high halves.
inline Bytes load_nibbles(const uint8_t* p) {
#if defined(__AVX512BW__)
    const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p));
    const __m512i shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    return (Bytes)_mm512_srlv_epi16(both, shift) & 15;
#elif defined(__AVX2__)
    const auto both = load<decltype(Bytes{}.lo)>(p);
    return {both & 15, both >> 4};
#else
    uint8_t codes[64];
    for (int i = 0; i < 32; ++i) codes[i] = p[i] & 15, codes[32 + i] = p[i] >> 4;
    return load<Bytes>(codes);
#endif
}

// Bytes of a and b by turns: of the first eight of each sixteen, or of the last eight.
template <bool kLast>
inline Bytes interleave(const Bytes& a, const Bytes& b) {
#if defined(__AVX512BW__)
    return (Bytes)(kLast ? _mm512_unpackhi_epi8((__m512i)a, (__m512i)b) : _mm512_unpacklo_epi8((__m512i)a, (__m512i)b));
#elif defined(__AVX2__)
    using Half = decltype(a.lo + b.lo);
    const auto one = [](__m256i x, __m256i y) {
        return (Half)(kLast ? _mm256_unpackhi_epi8(x, y) : _mm256_unpacklo_epi8(x, y));
    };
    return {one((__m256i)a.lo, (__m256i)b.lo), one((__m256i)a.hi, (__m256i)b.hi)};
#else
    uint8_t x[64], y[64], both[64];
    store(x, a), store(y, b);
    for (int i = 0; i < 64; i += 16) {
#if defined(__aarch64__)
        const uint8x16_t first = vld1q_u8(x + i), second = vld1q_u8(y + i);
        vst1q_u8(both + i, kLast ? vzip2q_u8(first, second) : vzip1q_u8(first, second));
#else
        for (int j = 0; j < 16; ++j) both[i + j] = (j % 2 ? y : x)[i + (kLast ? 8 : 0) + j / 2];
#endif
    }
    return load<Bytes>(both);
#endif
}

inline Bytes table_of(const uint8_t* values) {
    uint8_t table[64];
    for (int i = 0; i < 64; ++i) table[i] = values[i % 16];
    return load<Bytes>(table);
}

// The hardware's prefetcher alone leaves up to a third of the bandwidth unused: while several rows are multiplied, lines are
// asked for too late. So they come to the second cache early, and to the first soon before they are needed. (Never with
// the hint that values pass by: on Sapphire Rapids it halves the bandwidth.)
inline void prefetch(const void* p) {
    __builtin_prefetch(static_cast<const char*>(p) + 8192, 0, 2);
    __builtin_prefetch(static_cast<const char*>(p) + 1024, 0, 3);
}

}  // namespace
