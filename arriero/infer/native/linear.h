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

// Rows of a tile, of fp32, of bf16 and of integers, and vectors of outputs of R rows: as many sums as there are registers
// beside the weights, of which bf16 has twice as many once it is widened. Where a panel is streamed from memory for few
// rows, all its vectors are taken at once, whatever the registers: in two halves it would be two streams.
// kExpandedFor: rows from which codes of four bits are looked up once for all of them; never, where looking up costs little.
#if defined(__AVX512BW__)
constexpr int kWide = 6, kHalved = 6, kNarrow = 4, kOneDigit = 6;
constexpr int float_blocks(int) { return 4; }
constexpr int int_blocks(int rows, bool stream) { return rows == 1 || stream ? 4 : 2; }
constexpr int64_t kExpandedFor = INT64_MAX;
#else
constexpr int kWide = 6, kHalved = 4, kNarrow = 4, kOneDigit = 4;
constexpr int float_blocks(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
constexpr int64_t kExpandedFor = 2 * kNarrow;
constexpr int int_blocks(int rows, bool) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif

// use(R as a type, row) for tiles of rows begin..end: of equal height, as nearly as may be, and at most `most` rows, 6.
template <class Use>
inline void in_tiles(int64_t begin, int64_t end, int64_t most, Use use) {
    const int64_t tiles = (end - begin + most - 1) / most;
    for (int64_t t = 0, row = begin; t < tiles; ++t) {
        const int64_t n = (end - row + tiles - t - 1) / (tiles - t);
        switch (n) {
            case 1: use(std::integral_constant<int, 1>{}, row); break;
            case 2: use(std::integral_constant<int, 2>{}, row); break;
            case 3: use(std::integral_constant<int, 3>{}, row); break;
            case 4: use(std::integral_constant<int, 4>{}, row); break;
            case 5: use(std::integral_constant<int, 5>{}, row); break;
            case 6: use(std::integral_constant<int, 6>{}, row); break;
        }
        row += n;
    }
}

// R rows of a panel, y [R][64], by kernel(first output of B vectors, what is found of them).
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
inline void run_floats(const Matrix& m, int64_t panel, const Rows& x, int64_t row, float* y) {
    in_blocks<R, float_blocks(R)>(y, [&](int64_t o, auto& found) {
        if (m.type == kFloat)
            run_float(static_cast<const float*>(m.data) + panel * x.width * kPanel + o, x, row, found);
        else
            run_bf16(Plain{static_cast<const bf16*>(m.data) + panel * x.width * kPanel + 2 * o}, x, row, found);
    });
}

template <int D, int R, bool kStream>
inline void run_integers(const Matrix& m, int64_t panel, const Rows& x, int64_t row, float* y) {
    const int64_t at = panel * x.width * kPanel, groups = panel * (x.width / kGroup) * kPanel;
    const uint8_t* const data = static_cast<const uint8_t*>(m.data) + (m.type == kInt4 ? at / 2 : at);
    const uint16_t* const scales = static_cast<const uint16_t*>(m.scales) + groups;
    const uint16_t* const minimums = m.minimums ? static_cast<const uint16_t*>(m.minimums) + groups : nullptr;
    const Bytes table = m.type == kInt4 ? table_of(m.values) : Bytes{};
    in_blocks<R, int_blocks(R, kStream)>(y, [&](int64_t o, auto& found) {
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
    const bool few = end - begin <= (m.digits == 1 ? 32 : 8);  // measured: reading the weights decides up to there
    const bool integers = m.type == kInt8 || m.type == kInt8Groups || m.type == kInt4;
    const int64_t most = m.type == kFloat ? kWide : m.type == kBf16 ? kHalved : m.digits == 1 ? kOneDigit : kNarrow;
    for (int64_t panel = first; panel < last; ++panel)
        in_tiles(begin, end, most, [&](auto rows, int64_t row) {
            constexpr int R = decltype(rows)::value;
            if (!integers)
                run_floats<R>(m, panel, x, row, y);
            else if (m.digits == 1)
                few ? run_integers<1, R, true>(m, panel, x, row, y) : run_integers<1, R, false>(m, panel, x, row, y);
            else
                few ? run_integers<2, R, true>(m, panel, x, row, y) : run_integers<2, R, false>(m, panel, x, row, y);
            for (int64_t r = 0; r < R; ++r) emit(panel, row + r, y + r * kPanel);
        });
}

thread_local Buffer<bf16> unpacked_panel;
thread_local Buffer<uint8_t> expanded_panel;

// `multiply_stored` for four bits and many rows, a panel at a time; the same integers, so the same bits.
template <class Emit>
void multiply_expanded(const Matrix& m, int64_t first, int64_t last, const Rows& x, int64_t begin, int64_t end, Emit emit) {
    uint8_t* const whole = expanded_panel.get(x.width * kPanel);
    const Bytes table = table_of(m.values);
    for (int64_t panel = first; panel < last; ++panel) {
        expand_int4(static_cast<const uint8_t*>(m.data) + panel * x.width * kPanel / 2, table, x.width, whole);
        const int64_t at = panel * x.width / kGroup * kPanel;
        Matrix plain = m;
        plain.type = kInt8Groups, plain.data = whole;
        plain.scales = static_cast<const uint16_t*>(m.scales) + at;
        if (m.minimums) plain.minimums = static_cast<const uint16_t*>(m.minimums) + at;
        multiply_stored(plain, 0, 1, x, begin, end, [&](int64_t, int64_t row, float* y) { emit(panel, row, y); });
    }
}

// sums [R][64] += the products of R rows with B vectors of a slice's outputs, inputs i to i + 31.
template <int R, int B>
inline void add_slice(const bf16* w, const Rows& x, int64_t row, int64_t i, float* sums) {
    const Half* from = halves_of(x, static_cast<const Half*>(nullptr)) + row * x.width + i;
    Lanes found[R][B];
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int b = 0; b < B; ++b) found[r][b] = load_lanes(sums + r * kPanel + b * kLanes);
    for (int64_t j = 0; j < kSlice; j += 2, w += 2 * kPanel)
        UNROLL for (int b = 0; b < B; ++b) {
            const Pairs pairs = pairs_of(w + b * 2 * kLanes);
            UNROLL for (int r = 0; r < R; ++r) found[r][b] = add_pairs(found[r][b], pairs, from + r * x.width + j);
        }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int b = 0; b < B; ++b) store(sums + r * kPanel + b * kLanes, found[r][b]);
}

constexpr int64_t kSliced = 8;  // rows; for more, unpacking once for all is as fast

// A panel of twelve bits and few rows, y [rows][64]: each slice is unpacked once and multiplied by all rows at once, so
// that reading the weights and multiplying go on side by side.
inline void multiply_sliced(const Matrix& m, int64_t panel, const Rows& x, int64_t begin, int64_t end, float* y) {
    Unpacked weights(m, panel);
    std::memset(y, 0, size_t((end - begin) * kPanel) * sizeof *y);
    for (int64_t i = 0; i < x.width; i += kSlice) {
        const bf16* const slice = weights(i);
        in_tiles(begin, end, kHalved, [&](auto rows, int64_t row) {
            constexpr int R = decltype(rows)::value, B = float_blocks(R);
            for (int64_t b = 0; b < kBlocks; b += B)
                add_slice<R, B>(slice + b * 2 * kLanes, x, row, i, y + (row - begin) * kPanel + b * kLanes);
        });
    }
}

// emit(panel, row, y [64]) for the outputs of panels first..last and rows begin..end of x.
template <class Emit>
void multiply(const Matrix& m, int64_t first, int64_t last, const Rows& x, int64_t begin, int64_t end, Emit emit) {
    if (m.type == kInt4 && end - begin >= kExpandedFor) return multiply_expanded(m, first, last, x, begin, end, emit);
    if (m.type != kTwelve) return multiply_stored(m, first, last, x, begin, end, emit);
    for (int64_t panel = first; panel < last; ++panel) {
        alignas(64) float y[kSliced * kPanel];
#if defined(ARRIERO_TILES)
        const bool sliced = !tiles_lent;
        if (tiles_lent && end - begin == 1) {
            Unpacked weights(m, panel);
            Lanes found[1][kBlocks];
            run_like_tiles<1, kBlocks, Unpacked&>(weights, x, begin, found);
            UNROLL for (int b = 0; b < kBlocks; ++b) store(y + b * kLanes, found[0][b]);
            emit(panel, begin, y);
            continue;
        }
#else
        const bool sliced = true;
#endif
        if (sliced && end - begin <= kSliced) {
            multiply_sliced(m, panel, x, begin, end, y);
            for (int64_t row = begin; row < end; ++row) emit(panel, row, y + (row - begin) * kPanel);
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

}  // namespace
