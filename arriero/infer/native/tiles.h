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
constexpr int64_t kSlice = 32;  // inputs whose products a tile adds up at once

template <int R, int B, class Source>
inline void run_like_tiles(Source weights, const Rows& x, int64_t row, Lanes (&y)[R][B]) {
    const float* from = x.rounded + row * x.width;
    const WideLanes high = WideLanes{} + 0xffff0000u;
    Lanes sums[R][B] = {};
    for (int64_t i = 0; i < x.width; i += kSlice) {
        Lanes even[R][B] = {}, odd[R][B] = {};
        for (int64_t j = 0; j < kSlice; j += 2) {
            WideLanes pairs[B];
            weights.next(pairs);
            UNROLL for (int b = 0; b < B; ++b) {
                const Lanes first = (Lanes)(pairs[b] << 16), second = (Lanes)(pairs[b] & high);
                UNROLL for (int r = 0; r < R; ++r) {
                    even[r][b] += first * from[r * x.width + i + j];
                    odd[r][b] += second * from[r * x.width + i + j + 1];
                }
            }
        }
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int b = 0; b < B; ++b) sums[r][b] += even[r][b] + odd[r][b];
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int b = 0; b < B; ++b) y[r][b] = sums[r][b];
}

// A few rows: y [R][32].
template <int R, class Source>
inline void run_few(Source weights, const Rows& x, int64_t row, float* y) {
    Lanes found[R][kBlocks];
    run_like_tiles<R, kBlocks>(weights, x, row, found);
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int b = 0; b < kBlocks; ++b) store(y + r * kPanel + b * kLanes, found[r][b]);
}

inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Up to 32 rows and a panel: y [32][32].
inline void run_tiles(const bf16* w, const Rows& x, int64_t row, bool second, float* y) {
    const bf16* from = x.halves + row * x.width;
    const int64_t below = 16 * x.width;
    zero_sums();
    for (int64_t i = 0; i < x.width; i += 32, w += 32 * kPanel) {
        _tile_loadd(4, from + i, x.width * 2);
        _tile_loadd(6, w, kPanel * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + 32, kPanel * 4);
        _tile_dpbf16ps(1, 4, 7);
        if (!second) continue;
        _tile_loadd(5, from + below + i, x.width * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, y, kPanel * 4);
    _tile_stored(1, y + 16, kPanel * 4);
    if (!second) return;
    _tile_stored(2, y + 16 * kPanel, kPanel * 4);
    _tile_stored(3, y + 16 * kPanel + 16, kPanel * 4);
}
#endif

}  // namespace
