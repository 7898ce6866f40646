// Products of bf16 weights where the CPU has AMX.

#pragma once

#include "floats.h"

#if defined(__AVX512BF16__) && defined(__AMX_BF16__) && defined(__linux__)
#define ARRIERO_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(ARRIERO_TILES)
// AMX: eight registers of 16 rows of 64 bytes. The kernel lends a process their state on request (Linux 5.16). For each
// 32 inputs they add up the products of the even inputs and of the odd ones, and then both to the sum so far. That order
// is kept by `run_like_tiles`, with the same bits, for the few rows that tiles would be mostly empty for.
const bool tiles_lent = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;

inline void configure_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("" ::"r"(&config) : "memory");  // GCC does not know that all of it is read
    _tile_loadconfig(&config);
}

constexpr int64_t kFewRows = 8;  // up to which tiles are slower

template <int R, int B, class Source>
inline void run_like_tiles(Source weights, const Rows& x, int64_t row, Lanes (&y)[R][B]) {
    const float* from = x.rounded + row * x.width;
    const WideLanes high = WideLanes{} + 0xffff0000u;
    Lanes sums[R][B] = {};
    for (int64_t i = 0; i < x.width; i += kSlice) {
        const bf16* w = weights(i);
        Lanes even[R][B] = {}, odd[R][B] = {};
        for (int64_t j = 0; j < kSlice; j += 2, w += 2 * kPanel)
            UNROLL for (int b = 0; b < B; ++b) {
                if (R < 3) prefetch(w + b * 2 * kLanes);
                const WideLanes pairs = load<WideLanes>(w + b * 2 * kLanes);
                const Lanes first = (Lanes)(pairs << 16), second = (Lanes)(pairs & high);
                UNROLL for (int r = 0; r < R; ++r) {
                    even[r][b] += first * from[r * x.width + i + j];
                    odd[r][b] += second * from[r * x.width + i + j + 1];
                }
            }
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int b = 0; b < B; ++b) sums[r][b] += even[r][b] + odd[r][b];
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int b = 0; b < B; ++b) y[r][b] = sums[r][b];
}

template <int R>
inline void run_few(const bf16* w, const Rows& x, int64_t row, float* y) {
    constexpr int B = R == 1 ? 4 : 2;
    for (int64_t b = 0; b < kBlocks; b += B) {
        Lanes found[R][B];
        run_like_tiles<R, B>(Plain{w + b * 2 * kLanes}, x, row, found);
        UNROLL for (int r = 0; r < R; ++r)
                UNROLL for (int i = 0; i < B; ++i) store(y + r * kPanel + (b + i) * kLanes, found[r][i]);
    }
}

inline void run_few(const bf16* w, const Rows& x, int64_t row, int64_t n, float* y) {
    if (n > 4) return run_few(w, x, row, 4, y), run_few(w, x, row + 4, n - 4, y + 4 * kPanel);
    switch (n) {
        case 1: return run_few<1>(w, x, row, y);
        case 2: return run_few<2>(w, x, row, y);
        case 3: return run_few<3>(w, x, row, y);
        case 4: return run_few<4>(w, x, row, y);
    }
}

inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// 16 rows and a whole panel: y [16][64].
inline void run_tiles(const bf16* w, const Rows& x, int64_t row, float* y) {
    const bf16* from = x.halves + row * x.width;
    zero_sums();
    for (int64_t i = 0; i < x.width; i += 32, w += 16 * 2 * kPanel) {
        _tile_loadd(4, from + i, x.width * 2);
        _tile_loadd(5, w, kPanel * 4);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, w + 32, kPanel * 4);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, w + 64, kPanel * 4);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, w + 96, kPanel * 4);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, y, kPanel * 4);
    _tile_stored(1, y + 16, kPanel * 4);
    _tile_stored(2, y + 32, kPanel * 4);
    _tile_stored(3, y + 48, kPanel * 4);
}

// 32 rows and half a panel, whose weights are loaded once for both tiles of rows.
inline void run_two_tiles(const bf16* w, const Rows& x, int64_t row, float* y) {
    const bf16* from = x.halves + row * x.width;
    const int64_t below = 16 * x.width;
    zero_sums();
    for (int64_t i = 0; i < x.width; i += 32, w += 16 * 2 * kPanel) {
        _tile_loadd(4, from + i, x.width * 2);
        _tile_loadd(6, w, kPanel * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + 32, kPanel * 4);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, from + below + i, x.width * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, y, kPanel * 4);
    _tile_stored(1, y + 16, kPanel * 4);
    _tile_stored(2, y + 16 * kPanel, kPanel * 4);
    _tile_stored(3, y + 16 * kPanel + 16, kPanel * 4);
}
#endif

}  // namespace
