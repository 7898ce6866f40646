// Products of int8 and four-bit weights with activations in fifteen bits, or in eight.
//
// Where the CPU multiplies bytes four at a time (VNNI), an activation is D digits, each a byte: two for fifteen bits,
// 128 high + low, and one for eight. Elsewhere it is one number of sixteen bits, and weights are widened to that, once for
// all rows of a tile. Both are exact.

#pragma once

#include "matrix.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define ARRIERO_DIGITS
#endif

namespace {

#if defined(ARRIERO_DIGITS)
using Quads = Bytes;  // weights of four inputs of sixteen outputs, unsigned

inline Quads quads_of(Bytes w) { return w; }

struct Inputs {  // four activations of a row, one digit of each
    IntLanes quads;
    Inputs(const int8_t* codes, int64_t i) {
        int32_t quad;
        std::memcpy(&quad, codes + i, sizeof quad);
        quads = IntLanes{} + quad;
    }
};

inline void add_quads(IntLanes& sums, const Quads& w, const Inputs& x) {
    sums = (IntLanes)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x.quads);
}

constexpr int digits_of(int digits) { return digits; }

template <int D>
inline void place(const int32_t* codes, int64_t width, int64_t i, int8_t* to) {  // of a group that begins with input i
    for (int64_t j = 0; j < kGroup; ++j) {
        const int32_t digit = D == 1 ? codes[j] : (codes[j] + 64) >> 7;  // from -127 to 127; the low one from -64 to 63
        to[i + j] = int8_t(digit);
        if (D == 2) to[width + i + j] = int8_t(codes[j] - (digit << 7));
    }
}
#else
// a[0] b[0] + a[1] b[1] of each two signed words.
inline IntLanes multiply_pairs(const Words& a, const Words& b) {
#if defined(__AVX512BW__)
    return (IntLanes)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    using Half = decltype(IntLanes{}.lo);
    return {(Half)_mm256_madd_epi16((__m256i)a.lo, (__m256i)b.lo), (Half)_mm256_madd_epi16((__m256i)a.hi, (__m256i)b.hi)};
#elif defined(__aarch64__)
    int16x8_t x[4], y[4];
    int32x4_t found[4];
    store(x, a), store(y, b);
    for (int i = 0; i < 4; ++i)
        found[i] = vpaddq_s32(vmull_s16(vget_low_s16(x[i]), vget_low_s16(y[i])), vmull_high_s16(x[i], y[i]));
    return load<IntLanes>(found);
#else
    const IntLanes x = (IntLanes)a, y = (IntLanes)b;
    return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

struct Quads {  // weights of four inputs of sixteen outputs: of the first and third input, of the second and fourth
    Words even, odd;
};

inline Quads quads_of(const Bytes& w) {
    const Words words = (Words)w;
    return {words & 0xff, words >> 8};
}

inline Words pair_of(const int8_t* codes) {
    int32_t pair;
    std::memcpy(&pair, codes, sizeof pair);
    return (Words)(IntLanes{} + pair);
}

struct Inputs {  // four activations of a row
    Words even, odd;
    Inputs(const int8_t* codes, int64_t i) : even(pair_of(codes + 2 * i)), odd(pair_of(codes + 2 * i + 4)) {}
};

inline void add_quads(IntLanes& sums, const Quads& w, const Inputs& x) {
    sums += multiply_pairs(w.even, x.even);
    sums += multiply_pairs(w.odd, x.odd);
}

constexpr int digits_of(int) { return 1; }  // both in one number

template <int D>
inline void place(const int32_t* codes, int64_t, int64_t i, int8_t* to) {  // of each four: first, third, second, fourth
    int16_t words[kGroup];
    for (int64_t j = 0; j < kGroup; j += 4) {
        words[j] = int16_t(codes[j]), words[j + 1] = int16_t(codes[j + 2]);
        words[j + 2] = int16_t(codes[j + 1]), words[j + 3] = int16_t(codes[j + 3]);
    }
    std::memcpy(to + 2 * i, words, sizeof words);
}
#endif

// sums [R][B] of a group, by add(codes, stride of the rows, sums), digit by digit; or, of few rows, whose chains of
// additions would be too few to hide how long one takes, by both digits at once. They begin with what takes off the 128
// that is in each weight.
template <int D, int R, int B, class Add>
inline void sum_group(const Rows& x, int64_t row, int64_t group, IntLanes (&sums)[R][B], Add add) {
    constexpr int kDigits = digits_of(D);
    const int8_t* const codes = x.codes + 2 * row * x.width;
    const int32_t* const offsets = x.offsets + row * (x.width / kGroup) + group;
    if constexpr (kDigits == 2 && R <= 3) {
        IntLanes both[2 * R][B] = {};
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int b = 0; b < B; ++b) both[2 * r + 1][b] = IntLanes{} + offsets[r * (x.width / kGroup)];
        add(codes, x.width, both);
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int b = 0; b < B; ++b) sums[r][b] = (both[2 * r][b] << 7) + both[2 * r + 1][b];
    } else {
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int b = 0; b < B; ++b)
                sums[r][b] = IntLanes{} + (offsets[r * (x.width / kGroup)] >> 7 * (kDigits - 1));
        add(codes, 2 * x.width, sums);
        if constexpr (kDigits == 2) {
            UNROLL for (int r = 0; r < R; ++r)
                UNROLL for (int b = 0; b < B; ++b) sums[r][b] = sums[r][b] << 7;
            add(codes + x.width, 2 * x.width, sums);
        }
    }
}

// total [R][B] += the sums * the scales of the weights and of the activations.
template <int R, int B>
inline void add_scaled(const IntLanes (&sums)[R][B], const Lanes (&scales)[B], const Rows& x, int64_t row, int64_t group,
                       Lanes (&total)[R][B]) {
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int b = 0; b < B; ++b)
            total[r][b] += convert<Lanes>(sums[r][b]) * (scales[b] * x.scales[(row + r) * (x.width / kGroup) + group]);
}

// total += minimum * sum of the activations, for a group's minimums of B vectors of outputs.
template <int R, int B>
inline void add_minimums(const uint16_t* minimums, const Rows& x, int64_t row, int64_t group, Lanes (&total)[R][B]) {
    UNROLL for (int b = 0; b < B; ++b) {
        const Lanes minimum = load_half(minimums + b * kLanes);
        UNROLL for (int r = 0; r < R; ++r) {
            const int64_t at = (row + r) * (x.width / kGroup) + group;
            total[r][b] += minimum * (x.scales[at] * float(x.offsets[at] / -128));
        }
    }
}

// The sums of R rows and B vectors of a panel's outputs, y [R][B]: the integer sums of each group times its scales, added
// up in order.
// scales: of each output, fp32; or, kGroups, of each output and group of inputs, in half precision, and so are minimums.
template <bool kGroups, int D, int R, int B>
inline void run_int8(const uint8_t* w, const void* scales, const uint16_t* minimums, const Rows& x, int64_t row,
                     Lanes (&y)[R][B]) {
    Lanes total[R][B] = {};
    for (int64_t g = 0; g < x.width / kGroup; ++g, w += kGroup * kPanel) {
        IntLanes sums[R][B];
        sum_group<D>(x, row, g, sums, [&](const int8_t* codes, int64_t stride, auto& sums) {
            ROLLED for (int64_t i = 0; i < kGroup; i += 4) {
                Quads weights[B];
                UNROLL for (int b = 0; b < B; ++b) {
                    const uint8_t* const at = w + i * kPanel + b * 64;
                    prefetch(at);
                    weights[b] = quads_of(load<Bytes>(at));
                }
                UNROLL for (int r = 0; r < int(std::extent_v<std::remove_reference_t<decltype(sums)>>); ++r) {
                    const Inputs inputs(codes + r * stride, g * kGroup + i);
                    UNROLL for (int b = 0; b < B; ++b) add_quads(sums[r][b], weights[b], inputs);
                }
            }
        });
        Lanes scale[B];
        UNROLL for (int b = 0; b < B; ++b)
            scale[b] = kGroups ? load_half(static_cast<const uint16_t*>(scales) + g * kPanel + b * kLanes) : all(1);
        add_scaled(sums, scale, x, row, g, total);
        if (kGroups && minimums) add_minimums(minimums + g * kPanel, x, row, g, total);
    }
    UNROLL for (int b = 0; b < B; ++b) {
        const Lanes scale = kGroups ? all(1) : load_lanes(static_cast<const float*>(scales) + b * kLanes);
        UNROLL for (int r = 0; r < R; ++r) y[r][b] = total[r][b] * scale;
    }
}

template <int D, int R, int B>
inline void run_int4(const uint8_t* w, const uint16_t* scales, const uint16_t* minimums, Bytes table, const Rows& x,
                     int64_t row, Lanes (&y)[R][B]) {
    const Bytes nibble = Bytes{} + 15;
    Lanes total[R][B] = {};
    for (int64_t g = 0; g < x.width / kGroup; ++g, w += kGroup / 2 * kPanel) {
        IntLanes sums[R][B];
        sum_group<D>(x, row, g, sums, [&](const int8_t* codes, int64_t stride, auto& sums) {
            ROLLED for (int64_t i = 0; i < kGroup / 2; i += 4) {
                Quads first[B], second[B];
                UNROLL for (int b = 0; b < B; ++b) {
                    const uint8_t* const at = w + i * kPanel + b * 64;
                    prefetch(at);
                    const Bytes both = load<Bytes>(at);
                    first[b] = quads_of(lookup(table, both & nibble));
                    second[b] = quads_of(lookup(table, (Bytes)((Words)both >> 4) & nibble));
                }
                UNROLL for (int r = 0; r < int(std::extent_v<std::remove_reference_t<decltype(sums)>>); ++r) {
                    const int8_t* const from = codes + r * stride;
                    const Inputs here(from, g * kGroup + i), later(from, g * kGroup + i + kGroup / 2);
                    UNROLL for (int b = 0; b < B; ++b) {
                        add_quads(sums[r][b], first[b], here);
                        add_quads(sums[r][b], second[b], later);
                    }
                }
            }
        });
        Lanes scale[B];
        UNROLL for (int b = 0; b < B; ++b) scale[b] = load_half(scales + g * kPanel + b * kLanes);
        add_scaled(sums, scale, x, row, g, total);
        if (minimums) add_minimums(minimums + g * kPanel, x, row, g, total);
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int b = 0; b < B; ++b) y[r][b] = total[r][b];
}

// A panel's codes of four bits as the bytes that they stand for: what `run_int8` reads, for the same sums.
inline void expand_int4(const uint8_t* w, Bytes table, int64_t width, uint8_t* to) {
    const Bytes nibble = Bytes{} + 15;
    constexpr int64_t kHalf = kGroup / 2 * kPanel;  // bytes of half a group
    for (int64_t g = 0; g < width / kGroup; ++g, w += kHalf, to += 2 * kHalf)
        for (int64_t at = 0; at < kHalf; at += 64) {
            const Bytes both = load<Bytes>(w + at);
            prefetch(w + at);
            store(to + at, lookup(table, both & nibble));
            store(to + kHalf + at, lookup(table, (Bytes)((Words)both >> 4) & nibble));
        }
}

// A row of activations as integers, a scale for each group: scale = max |x| / most, code = x / scale to the nearest.
template <int D>
inline void quantise(const float* x, int64_t width, int8_t* to, float* scales, int32_t* offsets) {
    constexpr float kMost = D == 1 ? 127 : 127 * 128;
    const Lanes magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    for (int64_t g = 0; g < width / kGroup; ++g) {
        const Lanes first = load_lanes(x + g * kGroup), second = load_lanes(x + g * kGroup + kLanes);
        const float most = largest(larger(larger(first, -first), larger(second, -second)));
        const float inverse = most > 0 ? kMost / most : 0;
        scales[g] = most / kMost;
        int32_t codes[kGroup], total = 0;
        store(codes, (IntLanes)(first * inverse + magic) - (IntLanes)magic);
        store(codes + kLanes, (IntLanes)(second * inverse + magic) - (IntLanes)magic);
        for (int64_t i = 0; i < kGroup; ++i) total += codes[i];
        place<D>(codes, width, g * kGroup, to);
        offsets[g] = -128 * total;
    }
}

inline void quantise(int64_t digits, const float* x, int64_t width, int8_t* to, float* scales, int32_t* offsets) {
    digits == 1 ? quantise<1>(x, width, to, scales, offsets) : quantise<2>(x, width, to, scales, offsets);
}

}  // namespace
