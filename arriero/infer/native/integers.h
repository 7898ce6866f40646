// Products of int8 and four-bit weights with activations in eight bits.

#pragma once

#include "matrix.h"

namespace {

// sums + the products of four inputs: w unsigned, x signed bytes, exact.
inline IntLanes add_quads(IntLanes sums, Bytes w, IntLanes x) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return (IntLanes)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
#elif defined(__AVX2__) && !defined(__AVX512BW__)
    const auto half = [](auto sums, auto w, auto x) {  // even and odd bytes as words: a product may not fit 16 bits
        const __m256i weights = (__m256i)w, inputs = (__m256i)x;
        const __m256i even = _mm256_and_si256(weights, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16(weights, 8);
        const __m256i even_x = _mm256_srai_epi16(_mm256_slli_epi16(inputs, 8), 8);
        const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(even, even_x),
                                              _mm256_madd_epi16(odd, _mm256_srai_epi16(inputs, 8)));
        return (decltype(sums))_mm256_add_epi32((__m256i)sums, both);
    };
    return {half(sums.lo, w.lo, x.lo), half(sums.hi, w.hi, x.hi)};
#else
    const IntLanes words = (IntLanes)w;
    for (int i = 0; i < 4; ++i) sums += ((words >> 8 * i) & 0xff) * ((x << (24 - 8 * i)) >> 24);
    return sums;
#endif
}

inline IntLanes quad_of(const int8_t* codes) {
    int32_t quad;
    std::memcpy(&quad, codes, sizeof quad);
    return IntLanes{} + quad;
}

// What the sums over the digits of a group's activations come to, less 128 of each weight.
inline Lanes whole(IntLanes high, IntLanes low, const Rows& x, int64_t group) {
    return convert<Lanes>((high << 7) + low + x.offsets[group]);
}

// The sums of R rows and B vectors of a panel's outputs, y [R][B]: the integer sums of each group times its scales, added
// up in order.
// scales: of each output, fp32; or, kGroups, of each output and group of inputs, in half precision.
template <bool kGroups, int R, int B>
inline void run_int8(const uint8_t* w, const void* scales, const Rows& x, int64_t row, Lanes (&y)[R][B]) {
    const int64_t groups = x.width / kGroup;
    Lanes total[R][B] = {};
    for (int64_t g = 0; g < groups; ++g) {
        IntLanes high[R][B] = {}, low[R][B] = {};
        for (int64_t q = 0; q < kGroup / 4; ++q, w += 4 * kPanel) {
            Bytes weights[B];
            UNROLL for (int b = 0; b < B; ++b) {
                if (R == 1) prefetch(w + b * 64);
                weights[b] = load<Bytes>(w + b * 64);
            }
            UNROLL for (int r = 0; r < R; ++r) {
                const int64_t at = (row + r) * x.width + g * kGroup + 4 * q;
                const IntLanes highs = quad_of(x.high + at), lows = quad_of(x.low + at);
                UNROLL for (int b = 0; b < B; ++b) {
                    high[r][b] = add_quads(high[r][b], weights[b], highs);
                    low[r][b] = add_quads(low[r][b], weights[b], lows);
                }
            }
        }
        UNROLL for (int b = 0; b < B; ++b) {
            const Lanes scale =
                kGroups ? load_half(static_cast<const uint16_t*>(scales) + g * kPanel + b * kLanes) : all(1);
            UNROLL for (int r = 0; r < R; ++r)
                total[r][b] += whole(high[r][b], low[r][b], x, (row + r) * groups + g) *
                               (scale * x.scales[(row + r) * groups + g]);
        }
    }
    UNROLL for (int b = 0; b < B; ++b) {
        const Lanes scale = kGroups ? all(1) : load_lanes(static_cast<const float*>(scales) + b * kLanes);
        UNROLL for (int r = 0; r < R; ++r) y[r][b] = total[r][b] * scale;
    }
}

template <int R, int B>
inline void run_int4(const uint8_t* w, const uint16_t* scales, const uint16_t* minimums, Bytes table, const Rows& x,
                     int64_t row, Lanes (&y)[R][B]) {
    const int64_t groups = x.width / kGroup;
    const Bytes nibble = Bytes{} + 15;
    Lanes total[R][B] = {};
    for (int64_t g = 0; g < groups; ++g, scales += kPanel) {
        IntLanes high[R][B] = {}, low[R][B] = {};
        for (int64_t q = 0; q < kGroup / 8; ++q, w += 4 * kPanel) {
            Bytes first[B], second[B];
            UNROLL for (int b = 0; b < B; ++b) {
                if (R == 1) prefetch(w + b * 64);
                const Bytes both = load<Bytes>(w + b * 64);
                first[b] = lookup(table, both & nibble);
                second[b] = lookup(table, (Bytes)((Words)both >> 4) & nibble);
            }
            UNROLL for (int r = 0; r < R; ++r) {
                const int64_t at = (row + r) * x.width + g * kGroup + 4 * q, later = at + kGroup / 2;
                const IntLanes highs[2] = {quad_of(x.high + at), quad_of(x.high + later)};
                const IntLanes lows[2] = {quad_of(x.low + at), quad_of(x.low + later)};
                UNROLL for (int b = 0; b < B; ++b) {
                    high[r][b] = add_quads(add_quads(high[r][b], first[b], highs[0]), second[b], highs[1]);
                    low[r][b] = add_quads(add_quads(low[r][b], first[b], lows[0]), second[b], lows[1]);
                }
            }
        }
        UNROLL for (int b = 0; b < B; ++b) {
            const Lanes scale = load_half(scales + b * kLanes);
            UNROLL for (int r = 0; r < R; ++r)
                total[r][b] += whole(high[r][b], low[r][b], x, (row + r) * groups + g) *
                               (scale * x.scales[(row + r) * groups + g]);
        }
        if (minimums) {
            UNROLL for (int b = 0; b < B; ++b) {
                const Lanes minimum = load_half(minimums + b * kLanes);
                UNROLL for (int r = 0; r < R; ++r) {
                    const int64_t at = (row + r) * groups + g;
                    total[r][b] += minimum * (x.scales[at] * float(x.offsets[at] / -128));
                }
            }
            minimums += kPanel;
        }
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int b = 0; b < B; ++b) y[r][b] = total[r][b];
}

// A row of activations as integers, a scale for each group: scale = max |x| / (127 * 128), code = x / scale to the nearest,
// which is 128 times a high digit (from -127 to 127) plus a low one (from -64 to 63).
inline void quantise(const float* x, int64_t width, int8_t* high, int8_t* low, float* scales, int32_t* offsets) {
    constexpr float kMost = 127 * 128;
    const Lanes magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    for (int64_t g = 0; g < width / kGroup; ++g) {
        const Lanes first = load_lanes(x + g * kGroup), second = load_lanes(x + g * kGroup + kLanes);
        const float most = largest(larger(larger(first, -first), larger(second, -second)));
        const float inverse = most > 0 ? kMost / most : 0;
        scales[g] = most / kMost;
        int32_t codes[kGroup], total = 0;
        store(codes, (IntLanes)(first * inverse + magic) - (IntLanes)magic);
        store(codes + kLanes, (IntLanes)(second * inverse + magic) - (IntLanes)magic);
        for (int64_t i = 0; i < kGroup; ++i) {
            const int32_t digit = (codes[i] + 64) >> 7;
            high[g * kGroup + i] = int8_t(digit), low[g * kGroup + i] = int8_t(codes[i] - (digit << 7));
            total += codes[i];
        }
        offsets[g] = -128 * total;
    }
}

}  // namespace
