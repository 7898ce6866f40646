// Products of a weight matrix with rows of activations, for weights of four types.
//
// The outputs of a matrix lie across the lanes of vectors, and an output's sum over the inputs is one chain of additions
// in the order of the inputs. So a result depends on its own row of activations and nothing else: not on how many rows
// are multiplied together, how they are tiled, or which thread does it. What a tile shape changes is only how often
// weights are loaded, and how many chains are in flight.
//
// Weights lie in panels of 64 outputs, the inputs of a panel one after the other, so that a panel is read as one stream:
//   fp32   [in][64]
//   bf16   [in / 2][64][2]: pairs of inputs, for the dot-product instruction
//   twelve the same values as bf16 in twelve bits each, without loss; see `Twelve`
//   int8   [in / 4][64][4] of code + 128; a scale fp32 for each output
//   int4   [in / 32][4][64][4] bytes of two codes, which stand for 16 values; a scale (half precision) for each output and
//          group of 32 inputs, and, where there are some, a minimum that is added
// Activations for integer weights are integers of eight bits with a scale for each group of 32 inputs, chosen for each
// row by itself. Integer sums are exact; the groups' results are added up in order in fp32.

#pragma once

#include "lanes.h"

#if defined(__AVX512BF16__) && defined(__AMX_BF16__) && defined(__linux__)
#define ARRIERO_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t kPanel = 64;              // outputs
constexpr int64_t kBlocks = kPanel / kLanes;  // vectors
constexpr int64_t kGroup = 32;              // inputs that share a scale

enum Type : int64_t { kFloat, kBf16, kInt8, kInt4, kTwelve };

extern "C" struct Matrix {
    int64_t type, out, in;
    const void* data;          // panels
    const void* scales;        // int8: float [out, padded to 64]; int4: half [panels][in / 32][64]
    const void* minimums;      // int4: half, like scales, or null: w = scale * value of the code + minimum
    const uint8_t* values;     // int4: what the 16 codes mean, plus 128; twelve: the 16 high bytes
    const struct Rare* rare;   // twelve: the weights whose high byte is none of these, in order
    const int64_t* rare_ends;  // twelve: [1 + panels] of a panel's in `rare`; the first is 0
};

inline bool is_half(const Matrix& m) { return m.type == kBf16 || m.type == kTwelve; }

// The inputs of a product: n rows of `width` (a multiple of 32, filled with zeros), in the forms that are asked for.
struct Rows {
    int64_t width;
    const float* floats;     // [n, width]
    const bf16* halves;      // [n, width]
    const float* rounded;    // [n, width]: the halves, widened
    const int8_t* codes;     // [n, width]
    const float* scales;     // [n, width / 32]
    const int32_t* offsets;  // [n, width / 32]: -128 times the sum of a group's codes
};

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

// bf16 in twelve bits, bit for bit the same. The high byte of a bf16 value is its sign and all but the last bit of its
// exponent, and a trained matrix uses few of them: fifteen make up all but one weight in five thousand. So the low byte is
// kept as it is, and the high byte as the four bits of its place in a table. Code 0 stands for 0, and for a rare weight,
// which is listed with its value. (Three bits would leave three weights in a hundred out, and listing these costs what
// the bit saves.)
struct Rare {
    uint32_t place;  // among the weights of its panel
    bf16 value;
};

struct Twelve {  // 64 weights: 16-bit word i has the low bytes of weights 32 + i and i, byte i their codes
    static constexpr int64_t width = 64;
    uint16_t low[32];
    uint8_t codes[32];
};
static_assert(sizeof(Twelve) == 96);

inline bf16 weight_of(const Matrix& m, int64_t at) {  // one weight of a bf16 or twelve-bit matrix, by its place in it
    if (m.type == kBf16) return static_cast<const bf16*>(m.data)[at];
    const int64_t size = up(m.in, kGroup) * kPanel, panel = at / size;
    const Twelve& block = static_cast<const Twelve*>(m.data)[at / Twelve::width];
    const int64_t i = at % 32;
    const bool second = at % Twelve::width >= 32;
    const uint8_t code = second ? block.codes[i] & 15 : block.codes[i] >> 4;
    for (int64_t r = m.rare_ends[panel]; !code && r < m.rare_ends[panel + 1]; ++r)
        if (m.rare[r].place == uint32_t(at % size)) return m.rare[r].value;
    const uint16_t low = second ? block.low[i] & 0xff : block.low[i] >> 8;
    return {uint16_t(low | m.values[code] << 8)};
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

constexpr int64_t kSlice = 32;  // inputs of a panel that are taken together

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

// A panel of twelve bits, unpacked slice by slice into the nearest cache.
class Unpacked {
  public:
    Unpacked(const Matrix& m, int64_t panel)
        : blocks_(static_cast<const Twelve*>(m.data) + panel * up(m.in, kGroup) * kPanel / Twelve::width),
          table_(table_of(m.values)), rare_(m.rare + m.rare_ends[panel]), end_(m.rare + m.rare_ends[panel + 1]) {}

    const bf16* operator()(int64_t i) {
        unpack(i, slice_);
        return slice_;
    }

    void unpack(int64_t i, bf16* to) {  // in ascending order of i
        const Twelve* block = blocks_ + i * kPanel / Twelve::width;
        const Twelve* const end = block + kSlice * kPanel / Twelve::width;
        for (bf16* at = to; block < end; ++block, at += Twelve::width) {
            prefetch(block);
            prefetch(block->codes);
            const Words low = load<Words>(block->low);
            const Words codes = load_bytes(block->codes);
            const Words high = (Words)lookup(table_, (Bytes)((codes | codes << 4) & 0x0f0f));
            const Words first = low >> 8 | (high & 0xff00), second = (low & 0x00ff) | high << 8;
            store(at, first), store(at + 32, second);
        }
        for (; rare_ < end_ && rare_->place < (i + kSlice) * kPanel; ++rare_) to[rare_->place - i * kPanel] = rare_->value;
    }

  private:
    const Twelve* const blocks_;
    const Bytes table_;
    const Rare *rare_, *const end_;
    alignas(64) bf16 slice_[kSlice * kPanel];
};

// The sums of one group, times its scale, onto y. `scale(r, b)`: what the integer sums are multiplied by.
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

// 16 rows and a whole panel: y [16][64].
inline void run_tiles(const bf16* w, const Rows& x, int64_t row, float* y) {
    const bf16* from = x.halves + row * x.width;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
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
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
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

// How a thread computes while this lives: subnormal numbers count as zero, in all instructions alike.
class Arithmetic {
  public:
#if defined(__x86_64__)
    Arithmetic() : before_(_mm_getcsr()) {
        _mm_setcsr(before_ | 0x8040);
#if defined(ARRIERO_TILES)
        if (tiles_lent) configure_tiles();
#endif
    }
    ~Arithmetic() {
#if defined(ARRIERO_TILES)
        if (tiles_lent) _tile_release();
#endif
        _mm_setcsr(before_);
    }

  private:
    const unsigned before_;
#else
    Arithmetic() {}
#endif
};

constexpr int64_t kRowPadding = 32;  // rows of activations are allocated in whole tiles

#if defined(__AVX512BW__)
constexpr int kWide = 6, kNarrow = 6;  // rows of a tile: of floats, of integers
constexpr int kFloatBlocks = 4, kIntBlocks = 2;
#else
constexpr int kWide = 2, kNarrow = 2;
constexpr int kFloatBlocks = 2, kIntBlocks = 1;
#endif

// R rows of a panel, y [R][64].
template <int R>
inline void run(const Matrix& m, int64_t panel, const Rows& x, int64_t row, float* y) {
    const auto blocks = [&](auto count, auto kernel) {  // B vectors at a time
        constexpr int B = decltype(count)::value;
        for (int64_t b = 0; b < kBlocks; b += B) {
            Lanes found[R][B];
            kernel(b * kLanes, found);
            UNROLL for (int r = 0; r < R; ++r) 
                UNROLL for (int i = 0; i < B; ++i) store(y + r * kPanel + (b + i) * kLanes, found[r][i]);
        }
    };
    using Floats = std::integral_constant<int, R == 1 ? 4 : kFloatBlocks>;
    using Integers = std::integral_constant<int, R == 1 ? 4 : kIntBlocks>;
    const int64_t groups = x.width / kGroup;
    switch (m.type) {
        case kFloat:
            return blocks(Floats{}, [&](int64_t o, auto& found) {
                run_float(static_cast<const float*>(m.data) + panel * x.width * kPanel + o, x, row, found);
            });
        case kBf16:
            return blocks(Floats{}, [&](int64_t o, auto& found) {
                run_bf16(Plain{static_cast<const bf16*>(m.data) + panel * x.width * kPanel + 2 * o}, x, row, found);
            });
        case kInt8:
            return blocks(Integers{}, [&](int64_t o, auto& found) {
                run_int8(static_cast<const uint8_t*>(m.data) + panel * x.width * kPanel + 4 * o,
                         static_cast<const float*>(m.scales) + panel * kPanel + o, x, row, found);
            });
        case kTwelve: break;  // see `multiply`
        case kInt4: {
            const int64_t at = panel * groups * kPanel;
            const Bytes table = table_of(m.values);
            return blocks(Integers{}, [&](int64_t o, auto& found) {
                run_int4(static_cast<const uint8_t*>(m.data) + panel * x.width * kPanel / 2 + 4 * o,
                         static_cast<const uint16_t*>(m.scales) + at + o,
                         m.minimums ? static_cast<const uint16_t*>(m.minimums) + at + o : nullptr, table, x, row,
                         found);
            });
        }
    }
}

// `multiply` for weights that lie as they are multiplied by.
template <class Emit>
void multiply_stored(const Matrix& m, int64_t first, int64_t last, const Rows& x, int64_t begin, int64_t end, Emit emit) {
    alignas(64) float y[kRowPadding * kPanel];
#if defined(ARRIERO_TILES)
    if (m.type == kBf16 && tiles_lent) {
        for (int64_t row = begin; row < end; row += 32)  // these rows stay in the nearest cache for all panels
            for (int64_t panel = first; panel < last; ++panel) {
                const bf16* w = static_cast<const bf16*>(m.data) + panel * x.width * kPanel;
                const int64_t n = std::min<int64_t>(32, end - row);
                if (n <= kFewRows) run_few(w, x, row, n, y);
                else if (n > 16) run_two_tiles(w, x, row, y), run_two_tiles(w + kPanel, x, row, y + 32);
                else run_tiles(w, x, row, y);
                for (int64_t r = 0; r < n; ++r) emit(panel, row + r, y + r * kPanel);
            }
        return;
    }
#endif
    const int64_t most = m.type == kFloat || m.type == kBf16 ? kWide : kNarrow;
    const int64_t tiles = (end - begin + most - 1) / most;
    for (int64_t panel = first; panel < last; ++panel) {
        int64_t row = begin;
        for (int64_t t = 0; t < tiles; ++t) {  // of equal height, as nearly as may be
            const int64_t n = (end - row + tiles - t - 1) / (tiles - t);
            switch (n) {
                case 1: run<1>(m, panel, x, row, y); break;
                case 2: run<2>(m, panel, x, row, y); break;
#if defined(__AVX512BW__)
                case 3: run<3>(m, panel, x, row, y); break;
                case 4: run<4>(m, panel, x, row, y); break;
                case 5: run<5>(m, panel, x, row, y); break;
                case 6: run<6>(m, panel, x, row, y); break;
#endif
            }
            for (int64_t r = 0; r < n; ++r) emit(panel, row + r, y + r * kPanel);
            row += n;
        }
    }
}

thread_local Buffer<bf16> unpacked_panel;

// One row, as the weights are unpacked: y [64].
inline void multiply_one(Unpacked weights, const Rows& x, int64_t row, float* y) {
    Lanes found[1][kBlocks];
#if defined(ARRIERO_TILES)
    if (tiles_lent) run_like_tiles<1, kBlocks, Unpacked&>(weights, x, row, found);
    else
#endif
        run_bf16<1, kBlocks, Unpacked&>(weights, x, row, found);
    UNROLL for (int b = 0; b < kBlocks; ++b) store(y + b * kLanes, found[0][b]);
}

// emit(panel, row, y [64]) for the outputs of panels first..last and rows begin..end of x.
template <class Emit>
void multiply(const Matrix& m, int64_t first, int64_t last, const Rows& x, int64_t begin, int64_t end, Emit emit) {
    if (m.type != kTwelve) return multiply_stored(m, first, last, x, begin, end, emit);
    for (int64_t panel = first; panel < last; ++panel) {
        if (end - begin == 1) {
            alignas(64) float y[kPanel];
            multiply_one(Unpacked(m, panel), x, begin, y);
            emit(panel, begin, y);
            continue;
        }
        bf16* const whole = unpacked_panel.get(x.width * kPanel);
        Unpacked packed(m, panel);
        for (int64_t i = 0; i < x.width; i += kSlice) packed.unpack(i, whole + i * kPanel);
        Matrix plain = m;
        plain.type = kBf16, plain.data = whole;
        multiply_stored(plain, 0, 1, x, begin, end, [&](int64_t, int64_t row, float* y) { emit(panel, row, y); });
    }
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

// Packing: from matrices as checkpoints have them, [out, in] row after row, to panels. `in` of the panels is padded to a
// multiple of 32, `out` to one of 64, with zeros. Panels first..last, so that threads may share the work.
extern "C" void arriero_pack_float(const float* from, int64_t out, int64_t in, int64_t first, int64_t last, float* to) {
    const int64_t width = up(in, kGroup);
    for (int64_t p = first; p < last; ++p)
        for (int64_t o = 0; o < kPanel; ++o)
            for (int64_t i = 0; i < width; ++i) {
                const int64_t row = p * kPanel + o;
                to[(p * width + i) * kPanel + o] = row < out && i < in ? from[row * in + i] : 0;
            }
}

extern "C" void arriero_pack_bf16(const uint16_t* from, int64_t out, int64_t in, int64_t first, int64_t last,
                                  uint16_t* to) {
    const int64_t width = up(in, kGroup);
    for (int64_t p = first; p < last; ++p)
        for (int64_t o = 0; o < kPanel; ++o)
            for (int64_t i = 0; i < width; ++i) {
                const int64_t row = p * kPanel + o;
                to[(p * width + i / 2 * 2) * kPanel + 2 * o + i % 2] = row < out && i < in ? from[row * in + i] : 0;
            }
}

// Panels of bf16 in twelve bits: `blocks` has three quarters of their size. Writes the table of 16 high bytes, and for the
// rare weights (as many as `room` takes) their places and values, and where each panel's end. Returns how many there are.
extern "C" int64_t arriero_pack_twelve(const uint16_t* panels, int64_t n_panels, int64_t size, Twelve* blocks,
                                       uint8_t* values, Rare* rare, int64_t room, int64_t* rare_ends) {
    int64_t counts[256] = {};
    const int64_t total = n_panels * size;
    for (int64_t i = 0; i < total; ++i) ++counts[panels[i] >> 8];
    uint8_t code_of[256];
    std::fill(code_of, code_of + 256, uint8_t(16));
    values[0] = 0, code_of[0] = 0;
    for (int code = 1; code < 16; ++code) {
        const auto most = std::max_element(counts + 1, counts + 256);
        values[code] = uint8_t(most - counts), code_of[values[code]] = uint8_t(code);
        *most = -1;
    }
    int64_t found = 0;
    rare_ends[0] = 0;
    for (int64_t p = 0; p < n_panels; ++p) {
        for (int64_t j = 0; j < size; j += Twelve::width, ++blocks) {
            uint16_t bits[Twelve::width];
            uint8_t codes[Twelve::width];
            std::memcpy(bits, panels + p * size + j, sizeof bits);
            for (int64_t i = 0; i < Twelve::width; ++i) {
                codes[i] = code_of[bits[i] >> 8];
                if (codes[i] < 16) continue;
                if (found < room) rare[found] = {uint32_t(j + i), {bits[i]}};
                ++found, codes[i] = 0, bits[i] = 0;
            }
            for (int64_t i = 0; i < 32; ++i) {
                blocks->low[i] = uint16_t(bits[i] << 8 | (bits[32 + i] & 0xff));
                blocks->codes[i] = uint8_t(codes[i] << 4 | codes[32 + i]);
            }
        }
        rare_ends[p + 1] = found;
    }
    return found;
}

// codes int8 [out, in]; the padding reads as 0, which is 128 here.
extern "C" void arriero_pack_int8(const int8_t* from, int64_t out, int64_t in, int64_t first, int64_t last,
                                  uint8_t* to) {
    const int64_t width = up(in, kGroup);
    for (int64_t p = first; p < last; ++p)
        for (int64_t o = 0; o < kPanel; ++o)
            for (int64_t i = 0; i < width; ++i) {
                const int64_t row = p * kPanel + o;
                const int8_t code = row < out && i < in ? from[row * in + i] : int8_t(0);
                to[(p * width + i / 4 * 4) * kPanel + 4 * o + i % 4] = uint8_t(code + 128);
            }
}

// codes uint8 0..15 [out, in]. Of a group's 32 inputs, 4 q..4 q + 3 lie in the low halves of byte vector q, and 16 more
// than these in the high halves. Padding has code 0; its activations are 0, so that it adds nothing.
extern "C" void arriero_pack_int4(const uint8_t* from, int64_t out, int64_t in, int64_t first, int64_t last,
                                  uint8_t* to) {
    const int64_t width = up(in, kGroup);
    const auto code = [&](int64_t row, int64_t i) { return row < out && i < in ? from[row * in + i] : uint8_t(0); };
    for (int64_t p = first; p < last; ++p)
        for (int64_t o = 0; o < kPanel; ++o)
            for (int64_t g = 0; g < width; g += kGroup)
                for (int64_t i = 0; i < kGroup / 2; ++i) {
                    const int64_t row = p * kPanel + o, at = (p * width + g) * kPanel / 2 + i / 4 * 4 * kPanel;
                    to[at + 4 * o + i % 4] = uint8_t(code(row, g + i) | code(row, g + i + kGroup / 2) << 4);
                }
}
