// Products of fp32 and bf16 weights.

#pragma once

#include "matrix.h"

namespace {

inline Lanes broadcast_pair(uint32_t pair) { return (Lanes)(WideLanes{} + pair); }

// sums + the products of two inputs: the second of each pair first, as the instruction does it.
inline Lanes add_pairs(Lanes sums, Lanes w, Lanes x) {
#if defined(__AVX512BF16__)
    return (Lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)w, (__m512bh)x);
#else
    const WideLanes high = WideLanes{} + 0xffff0000u;
    sums += (Lanes)((WideLanes)w & high) * (Lanes)((WideLanes)x & high);
    return sums + (Lanes)((WideLanes)w << 16) * (Lanes)((WideLanes)x << 16);
#endif
}

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

// weights(i): where the weights of inputs i to i + 31 lie.
template <int R, int B, class Source>
inline void run_bf16(Source weights, const Rows& x, int64_t row, Lanes (&y)[R][B]) {
    const uint32_t* from[R];
    UNROLL for (int r = 0; r < R; ++r) from[r] = reinterpret_cast<const uint32_t*>(x.halves + (row + r) * x.width);
    Lanes sums[R][B] = {};
    for (int64_t i = 0; i < x.width; i += kSlice) {
        const bf16* w = weights(i);
        for (int64_t j = i / 2; j < (i + kSlice) / 2; ++j, w += 2 * kPanel) {
            Lanes found[B];
            UNROLL for (int b = 0; b < B; ++b) {
                if (R == 1) prefetch(w + b * 2 * kLanes);
                found[b] = load<Lanes>(w + b * 2 * kLanes);
            }
            UNROLL for (int r = 0; r < R; ++r) {
                const Lanes pair = broadcast_pair(from[r][j]);
                UNROLL for (int b = 0; b < B; ++b) sums[r][b] = add_pairs(sums[r][b], found[b], pair);
            }
        }
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int b = 0; b < B; ++b) y[r][b] = sums[r][b];
}

struct Plain {  // a panel of bf16
    const bf16* w;
    const bf16* operator()(int64_t i) const { return w + i * kPanel; }
};

}  // namespace
