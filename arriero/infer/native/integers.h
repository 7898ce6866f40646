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

// The sums of R rows and B vectors of a panel's outputs, y [R][B]: the integer sums of each group times its scales, added
// up in order.
template <int R, int B>
inline void run_int8(const uint8_t* w, const float* scales, const Rows& x, int64_t row, Lanes (&y)[R][B]) {
    const int64_t groups = x.width / kGroup;
    Lanes total[R][B] = {};
    for (int64_t g = 0; g < groups; ++g) {
        IntLanes sums[R][B];
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int b = 0; b < B; ++b) sums[r][b] = IntLanes{} + x.offsets[(row + r) * groups + g];
        for (int64_t q = 0; q < kGroup / 4; ++q, w += 4 * kPanel) {
            Bytes weights[B];
            UNROLL for (int b = 0; b < B; ++b) {
                if (R == 1) prefetch(w + b * 64);
                weights[b] = load<Bytes>(w + b * 64);
            }
            UNROLL for (int r = 0; r < R; ++r) {
                int32_t quad;
                std::memcpy(&quad, x.codes + (row + r) * x.width + g * kGroup + 4 * q, sizeof quad);
                UNROLL for (int b = 0; b < B; ++b) sums[r][b] = add_quads(sums[r][b], weights[b], IntLanes{} + quad);
            }
        }
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int b = 0; b < B; ++b)
                total[r][b] += convert<Lanes>(sums[r][b]) * x.scales[(row + r) * groups + g];
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int b = 0; b < B; ++b) y[r][b] = total[r][b] * load_lanes(scales + b * kLanes);
}

template <int R, int B>
inline void run_int4(const uint8_t* w, const uint16_t* scales, const uint16_t* minimums, Bytes table, const Rows& x,
                     int64_t row, Lanes (&y)[R][B]) {
    const int64_t groups = x.width / kGroup;
    const Bytes low = Bytes{} + 15;
    Lanes total[R][B] = {};
    for (int64_t g = 0; g < groups; ++g, scales += kPanel) {
        IntLanes sums[R][B];
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int b = 0; b < B; ++b) sums[r][b] = IntLanes{} + x.offsets[(row + r) * groups + g];
        for (int64_t q = 0; q < kGroup / 8; ++q, w += 4 * kPanel) {
            Bytes first[B], second[B];
            UNROLL for (int b = 0; b < B; ++b) {
                if (R == 1) prefetch(w + b * 64);
                const Bytes both = load<Bytes>(w + b * 64);
                first[b] = lookup(table, both & low), second[b] = lookup(table, (Bytes)((Words)both >> 4) & low);
            }
            UNROLL for (int r = 0; r < R; ++r) {
                int32_t quads[2];
                const int8_t* codes = x.codes + (row + r) * x.width + g * kGroup + 4 * q;
                std::memcpy(&quads[0], codes, 4), std::memcpy(&quads[1], codes + kGroup / 2, 4);
                UNROLL for (int b = 0; b < B; ++b) {
                    sums[r][b] = add_quads(sums[r][b], first[b], IntLanes{} + quads[0]);
                    sums[r][b] = add_quads(sums[r][b], second[b], IntLanes{} + quads[1]);
                }
            }
        }
        UNROLL for (int b = 0; b < B; ++b) {
            const Lanes scale = load_half(scales + b * kLanes);
            UNROLL for (int r = 0; r < R; ++r)
                total[r][b] += convert<Lanes>(sums[r][b]) * (scale * x.scales[(row + r) * groups + g]);
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

// A row of activations in eight bits, a scale for each group: scale = max |x| / 127, code = x / scale to nearest even.
inline void quantise(const float* x, int64_t width, int8_t* codes, float* scales, int32_t* offsets) {
    for (int64_t g = 0; g < width / kGroup; ++g, x += kGroup, codes += kGroup) {
        const Lanes a = load_lanes(x), b = load_lanes(x + kLanes);
        const float most = largest(larger(larger(a, -a), larger(b, -b)));
        const float inverse = most > 0 ? 127 / most : 0;
        scales[g] = most / 127;
        const Lanes magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
        const IntLanes low = (IntLanes)(a * inverse + magic) - (IntLanes)magic;
        const IntLanes high = (IntLanes)(b * inverse + magic) - (IntLanes)magic;
        int32_t total = 0;
        for (int64_t i = 0; i < kLanes; ++i) codes[i] = int8_t(low[i]), total += low[i];
        for (int64_t i = 0; i < kLanes; ++i) codes[kLanes + i] = int8_t(high[i]), total += high[i];
        offsets[g] = -128 * total;
    }
}

}  // namespace
