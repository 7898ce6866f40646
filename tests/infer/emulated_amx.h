// AMX's tiles in plain C++, so that the kernels for them can be tried on CPUs without: included before them. Of a product
// the even inputs and the odd ones are added up, each by fused multiply-adds, and then both to the sum so far
// (Intel's Software Developer's Manual, TDPBF16PS).

#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

struct EmulatedTile {
    uint32_t rows[16][16];
};
inline thread_local EmulatedTile emulated_tiles[8];

inline float emulated_half(uint32_t pair, int which) {
    const uint32_t bits = which ? pair & 0xffff0000u : pair << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void emulated_product(EmulatedTile& sums, const EmulatedTile& a, const EmulatedTile& b) {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            float halves[2] = {}, sum;
            for (int k = 0; k < 16; ++k)
                for (int h = 0; h < 2; ++h)
                    halves[h] = std::fma(emulated_half(a.rows[m][k], h), emulated_half(b.rows[k][n], h), halves[h]);
            std::memcpy(&sum, &sums.rows[m][n], sizeof sum);
            sum += halves[0] + halves[1];
            std::memcpy(&sums.rows[m][n], &sum, sizeof sum);
        }
}

inline void emulated_load(EmulatedTile& tile, const void* from, int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(tile.rows[i], static_cast<const char*>(from) + i * stride, 64);
}

inline void emulated_store(const EmulatedTile& tile, void* to, int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, tile.rows[i], 64);
}

#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
#define _tile_zero(t) (emulated_tiles[t] = EmulatedTile{})
#define _tile_loadd(t, from, stride) emulated_load(emulated_tiles[t], from, stride)
#define _tile_stored(t, to, stride) emulated_store(emulated_tiles[t], to, stride)
#define _tile_dpbf16ps(t, a, b) emulated_product(emulated_tiles[t], emulated_tiles[a], emulated_tiles[b])
#define syscall(...) 0  // the kernel lends the tiles
