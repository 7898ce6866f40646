// Products of fp32 and bf16 weights.

#pragma once

#include "matrix.h"

namespace {

// Pairs of bf16, and what they are multiplied by: pairs of bf16 where the CPU has an instruction for these, else the same
// numbers in fp32, and pairs are widened once for all that they are multiplied by. add_pairs: sums + the products of two
// inputs, the second first, as the instruction does it.
#if defined(__AVX512BF16__)
using Half = bf16;
using Pairs = Lanes;

inline Pairs pairs_of(WideLanes both) { return (Lanes)both; }

inline Lanes add_pairs(Lanes sums, Pairs w, const bf16* x) {
    uint32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return (Lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)w, (__m512bh)(WideLanes{} + pair));
}
#else
using Half = float;

struct Pairs {
    Lanes first, second;
};

inline Pairs pairs_of(WideLanes both) {
    return {(Lanes)(both << 16), (Lanes)(both & 0xffff0000u)};
}

inline Lanes add_pairs(Lanes sums, const Pairs& w, const float* x) {
    sums += w.second * x[1];
    return sums + w.first * x[0];
}
#endif

inline const bf16* halves_of(const Rows& x, const bf16*) { return x.halves; }
inline const float* halves_of(const Rows& x, const float*) { return x.rounded; }

// Each kernel: the sums of R rows and B vectors of a panel's outputs, y [R][B].
template <int R, int B>
inline void run_float(const float* w, const Rows& x, int64_t row, Lanes (&y)[R][B]) {
    const float* from = x.floats + row * x.width;
    Lanes sums[R][B] = {};
    for (int64_t i = 0; i < x.width; ++i, w += kPanel) {
        Lanes weights[B];
        UNROLL for (int b = 0; b < B; ++b) prefetch(w + b * kLanes), weights[b] = load_lanes(w + b * kLanes);
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int b = 0; b < B; ++b) sums[r][b] += weights[b] * from[r * x.width + i];
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int b = 0; b < B; ++b) y[r][b] = sums[r][b];
}

// weights.next(found): the next two inputs of B vectors of outputs.
template <int R, int B, class Source>
inline void run_bf16(Source weights, const Rows& x, int64_t row, Lanes (&y)[R][B]) {
    const Half* from = halves_of(x, static_cast<const Half*>(nullptr)) + row * x.width;
    Lanes sums[R][B] = {};
    for (int64_t i = 0; i < x.width; i += 2) {
        WideLanes found[B];
        weights.next(found);
        Pairs pairs[B];
        UNROLL for (int b = 0; b < B; ++b) pairs[b] = pairs_of(found[b]);
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int b = 0; b < B; ++b) sums[r][b] = add_pairs(sums[r][b], pairs[b], from + r * x.width + i);
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int b = 0; b < B; ++b) y[r][b] = sums[r][b];
}

struct Plain {  // a panel of bf16
    const bf16* w;
    template <int B>
    void next(WideLanes (&found)[B]) {
        UNROLL for (int b = 0; b < B; ++b) {
            prefetch(w + b * 2 * kLanes);
            found[b] = load<WideLanes>(w + b * 2 * kLanes);
        }
        w += 2 * kPanel;
    }
};

}  // namespace
