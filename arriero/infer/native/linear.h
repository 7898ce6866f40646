// Products of a weight matrix with rows of activations, for weights of five types.
//
// The outputs of a matrix lie across the lanes of vectors, and an output's sum over the inputs is one chain of additions
// in the order of the inputs. So a result depends on its own row of activations and nothing else: not on how many rows
// are multiplied together, how they are tiled, or which thread does it. What a tile shape changes is only how often
// weights are loaded, and how many chains are in flight.
//
// The kernels: floats.h, tiles.h (AMX), twelve.h, integers.h. How weights lie: matrix.h.

#pragma once

#include "integers.h"
#include "pack.h"
#include "tiles.h"
#include "twelve.h"

namespace {

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

// Rows of a tile, of fp32, of bf16 and of integers, and vectors of outputs that R rows take at once: as many sums as there
// are registers beside the weights, of which bf16 has twice as many once it is widened.
// kExpandedFor: rows from which codes of four bits are looked up once for all of them; never, where looking up costs little.
// kUnpackedFor: the same of twelve bits.
#if defined(__AVX512BW__)
constexpr int kWide = 12, kHalved = 12, kIntegers = 8;
constexpr int blocks_of(int) { return kBlocks; }
constexpr int64_t kExpandedFor = INT64_MAX, kUnpackedFor = 96;
#else
constexpr int kWide = 6, kHalved = 4, kIntegers = 4;
constexpr int blocks_of(int rows) { return rows <= 2 ? kBlocks : 1; }
constexpr int64_t kExpandedFor = 2 * kIntegers, kUnpackedFor = 3;
#endif

template <int N>
using Number = std::integral_constant<int, N>;

template <int R, class Use>
inline void with_rows(int64_t n, Use use) {  // use(n as a type), n at most R
    if constexpr (R > 1)
        if (n < R) return with_rows<R - 1>(n, use);
    use(Number<R>{});
}

// use(R as a type, row) for tiles of rows begin..end: of equal height, as nearly as may be, and at most kMost rows.
template <int kMost, class Use>
inline void in_tiles(int64_t begin, int64_t end, Use use) {
    const int64_t tiles = (end - begin + kMost - 1) / kMost;
    for (int64_t t = 0, row = begin; t < tiles; ++t) {
        const int64_t n = (end - row + tiles - t - 1) / (tiles - t);
        with_rows<kMost>(n, [&](auto rows) { use(rows, row); });
        row += n;
    }
}

// R rows of a panel, y [R][32], by kernel(first output of B vectors, what is found of them).
template <int R, int B, class Kernel>
inline void in_blocks(float* y, Kernel kernel) {
    for (int64_t b = 0; b < kBlocks; b += B) {
        Lanes found[R][B];
        kernel(b * kLanes, found);
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int i = 0; i < B; ++i) store(y + r * kPanel + (b + i) * kLanes, found[r][i]);
    }
}

template <int R>
inline void run_float_rows(const Matrix& m, int64_t panel, const Rows& x, int64_t row, float* y) {
    in_blocks<R, blocks_of(R)>(y, [&](int64_t o, auto& found) {
        run_float(static_cast<const float*>(m.data) + panel * x.width * kPanel + o, x, row, found);
    });
}

template <int R>
inline void run_half_rows(const Matrix& m, int64_t panel, const Rows& x, int64_t row, float* y) {
    if (m.type == kTwelve)
        in_blocks<R, kBlocks>(y, [&](int64_t, auto& found) { run_bf16(Unpacked(m, panel), x, row, found); });
    else
        in_blocks<R, blocks_of(R)>(y, [&](int64_t o, auto& found) {
            run_bf16(Plain{static_cast<const bf16*>(m.data) + panel * x.width * kPanel + 2 * o}, x, row, found);
        });
}

template <int D, int R>
inline void run_integers(const Matrix& m, int64_t panel, const Rows& x, int64_t row, float* y) {
    const int64_t at = panel * x.width * kPanel, groups = panel * (x.width / kGroup) * kPanel;
    const uint8_t* const data = static_cast<const uint8_t*>(m.data) + (m.type == kInt4 ? at / 2 : at);
    const uint16_t* const scales = static_cast<const uint16_t*>(m.scales) + groups;
    const uint16_t* const minimums = m.minimums ? static_cast<const uint16_t*>(m.minimums) + groups : nullptr;
    const Bytes table = m.type == kInt4 ? table_of(m.values) : Bytes{};
    in_blocks<R, blocks_of(R)>(y, [&](int64_t o, auto& found) {
        const uint16_t* const least = minimums ? minimums + o : nullptr;
        if (m.type == kInt4)
            run_int4<D>(data + 4 * o, scales + o, least, table, x, row, found);
        else if (m.type == kInt8Groups)
            run_int8<true, D>(data + 4 * o, scales + o, least, x, row, found);
        else
            run_int8<false, D>(data + 4 * o, static_cast<const float*>(m.scales) + panel * kPanel + o, nullptr, x, row,
                               found);
    });
}

// `multiply` for weights as they are stored.
template <class Emit>
void multiply_stored(const Matrix& m, int64_t panel, const Rows& x, int64_t begin, int64_t end, Emit emit) {
    alignas(64) float y[kWide * kPanel];
    const auto in_tiles_of = [&](auto most, auto run) {
        in_tiles<decltype(most)::value>(begin, end, [&](auto rows, int64_t row) {
            run(rows, row);
            for (int64_t r = 0; r < rows; ++r) emit(row + r, y + r * kPanel);
        });
    };
    if (m.type == kFloat)
        in_tiles_of(Number<kWide>{}, [&](auto rows, int64_t row) { run_float_rows<rows>(m, panel, x, row, y); });
    else if (is_half(m))
        in_tiles_of(Number<kHalved>{}, [&](auto rows, int64_t row) { run_half_rows<rows>(m, panel, x, row, y); });
    else
        in_tiles_of(Number<kIntegers>{}, [&](auto rows, int64_t row) {
            m.digits == 1 ? run_integers<1, rows>(m, panel, x, row, y) : run_integers<2, rows>(m, panel, x, row, y);
        });
}

#if defined(ARRIERO_TILES)
// `multiply` for halves where the CPU multiplies by tiles.
template <class Emit>
void multiply_by_tiles(const Matrix& m, int64_t panel, const Rows& x, int64_t begin, int64_t end, Emit emit) {
    alignas(64) float y[32 * kPanel];
    const bf16* const w = static_cast<const bf16*>(m.data) + panel * x.width * kPanel;
    const auto emit_all = [&](int64_t row, int64_t n) {
        for (int64_t r = 0; r < n; ++r) emit(row + r, y + r * kPanel);
    };
    if (end - begin <= kFewRows)
        return in_tiles<4>(begin, end, [&](auto rows, int64_t row) {
            m.type == kTwelve ? run_few<rows>(Unpacked(m, panel), x, row, y) : run_few<rows>(Plain{w}, x, row, y);
            emit_all(row, rows);
        });
    for (int64_t row = begin; row < end; row += 32) {
        const int64_t n = std::min<int64_t>(32, end - row);
        run_tiles(w, x, row, n > 16, y), emit_all(row, n);
    }
}
#endif

thread_local Buffer<bf16> unpacked_panel;
thread_local Buffer<uint8_t> expanded_panel;

// Four bits as bytes, for many rows; the same integers, so the same bits.
inline Matrix expanded(const Matrix& m, int64_t panel, int64_t width) {
    uint8_t* const whole = expanded_panel.get(width * kPanel);
    const int64_t at = panel * width / kGroup * kPanel;
    expand_int4(static_cast<const uint8_t*>(m.data) + panel * width * kPanel / 2, table_of(m.values), width, whole);
    Matrix plain = m;
    plain.type = kInt8Groups, plain.data = whole;
    plain.scales = static_cast<const uint16_t*>(m.scales) + at;
    if (m.minimums) plain.minimums = static_cast<const uint16_t*>(m.minimums) + at;
    return plain;
}

// Twelve bits as sixteen, for many rows.
inline Matrix unpacked(const Matrix& m, int64_t panel, int64_t width) {
    bf16* const whole = unpacked_panel.get(width * kPanel);
    Unpacked weights(m, panel);
    for (bf16* to = whole; to < whole + width * kPanel; to += Twelve::width) {
        WideLanes found[kBlocks];
        weights.next(found);
        UNROLL for (int b = 0; b < kBlocks; ++b) store(to + b * 2 * kLanes, found[b]);
    }
    Matrix plain = m;
    plain.type = kBf16, plain.data = whole;
    return plain;
}

// emit(row, y [32]) for the outputs of a panel and rows begin..end of x.
template <class Emit>
void multiply(const Matrix& m, int64_t panel, const Rows& x, int64_t begin, int64_t end, Emit emit) {
    const int64_t rows = end - begin;
#if defined(ARRIERO_TILES)
    if (is_half(m) && tiles_lent) {
        if (m.type == kBf16 || rows == 1) return multiply_by_tiles(m, panel, x, begin, end, emit);
        return multiply_by_tiles(unpacked(m, panel, x.width), 0, x, begin, end, emit);
    }
#endif
    if (m.type == kInt4 && rows >= kExpandedFor)
        return multiply_stored(expanded(m, panel, x.width), 0, x, begin, end, emit);
    if (m.type == kTwelve && rows >= kUnpackedFor) {
        constexpr int64_t kLine = 64;  // bytes that memory gives at a time
        const int64_t bytes = x.width * kPanel / Twelve::width * int64_t(sizeof(Twelve)), lines = bytes / kLine / rows + 1;
        const char* next = static_cast<const char*>(m.data) + (panel + 1) * bytes;
        const Matrix plain = unpacked(m, panel, x.width);
        return multiply_stored(plain, 0, x, begin, end, [&](int64_t row, float* y) {
            for (int64_t i = 0; i < lines; ++i, next += kLine) __builtin_prefetch(next, 0, 2);  // of the next panel
            emit(row, y);
        });
    }
    multiply_stored(m, panel, x, begin, end, emit);
}

}  // namespace
