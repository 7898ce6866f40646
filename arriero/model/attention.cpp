// Causal attention over the packed documents of one row on a CPU, forward and backward, without stored scores.
//
// A tile of queries goes over its keys a block at a time, so that scores live in the nearest caches and die there;
// blocks that causality masks are never computed. All products run through one small matrix kernel with fp32 sums. It
// takes its factors in units of 32 bits along the depth of a product: a float, or a pair of bf16 where the tensors are
// bf16 and the CPU multiplies such pairs: by vectors (AVX512_BF16) at twice the speed, by tile registers (AMX) at more.
// Softmax is fp32 in every case; with pairs, its weights and the gradients of scores are rounded to bf16 between two
// products, as FlashAttention-2 does (arXiv 2307.08691). Backward as in arXiv 2205.14135, the scores computed again.
// Every number is the sum of the same terms in the same order whichever thread adds them: reruns are equal bit by bit.
//
// Compiled on first use by attention.py, which describes the call; slow twin: `naive_attention` there.
// Shapes: N tokens, H heads, K KV heads, G = H/K, h head width, W = h padded (kWhole), P values a unit.
// Layouts in units of a matrix [m, n]: rows [m, n/P] and turned [n, m/P], left factors of products; along [m/P, n] and
// across [n/P, m], right factors.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AMX_BF16__) && defined(__linux__)
#define ARRIERO_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t kBytes = 64, kRows = 8;  // of one vector; of the matrix kernel, whose sums fill half the registers
#elif defined(__AVX2__)
constexpr int64_t kBytes = 32, kRows = 4;
#else
constexpr int64_t kBytes = 16, kRows = 4;
#endif
constexpr int64_t kLanes = kBytes / 4;
constexpr int64_t kKeys = 64;  // a block
constexpr float kLn2 = 0.69314718f;
constexpr int64_t kStrands = 16;  // backward: documents that share leads are dealt to so many strands a KV head
static_assert(kLanes % kRows == 0, "no kernel row crosses a block");

typedef float Lanes __attribute__((vector_size(kBytes)));
typedef int32_t IntLanes __attribute__((vector_size(kBytes)));
typedef uint32_t WideLanes __attribute__((vector_size(kBytes)));
typedef uint16_t HalfLanes __attribute__((vector_size(kBytes / 2)));

struct bf16 {
    uint16_t bits;
};

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline Lanes load(const float* p) {
    Lanes lanes;
    std::memcpy(&lanes, p, sizeof lanes);
    return lanes;
}

inline void store(float* p, Lanes lanes) { std::memcpy(p, &lanes, sizeof lanes); }

inline Lanes load(const bf16* p) {
    HalfLanes half;
    std::memcpy(&half, p, sizeof half);
    return (Lanes)(__builtin_convertvector(half, WideLanes) << 16);
}

inline void store(bf16* p, Lanes lanes) {  // to nearest, ties to even
#if defined(__AVX512BF16__)
    const auto half = _mm512_cvtneps_pbh((__m512)lanes);
#else
    const WideLanes bits = (WideLanes)lanes;
    const HalfLanes half = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, HalfLanes);
#endif
    std::memcpy(p, &half, sizeof half);
}

template <class T>
inline Lanes load_some(const T* p, int64_t count) {  // then zeros
    if (count >= kLanes) return load(p);
    T some[kLanes] = {};
    if (count > 0) std::copy(p, p + count, some);
    return load(some);
}

template <class T>
inline void store_some(T* p, Lanes lanes, int64_t count) {
    if (count >= kLanes) return store(p, lanes);
    T some[kLanes];
    store(some, lanes);
    std::copy(some, some + count, p);
}

inline Lanes power_of_two(Lanes x) {  // relative error below 3e-7 for x in [-126, 127], clamped below
    x = x < -126.0f ? Lanes{} - 126.0f : x;
    const Lanes shifted = x + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, held in the lowest bits
    const Lanes part = x - (shifted - 12582912.0f);
    Lanes series = part * 1.5403530e-4f + 1.3333558e-3f;  // (ln 2)^k / k!
    series = series * part + 9.6181291e-3f;
    series = series * part + 5.5504109e-2f;
    series = series * part + 2.4022651e-1f;
    series = series * part + 6.9314718e-1f;
    series = series * part + 1.0f;
    return (Lanes)((WideLanes)series + ((WideLanes)shifted << 23));
}

inline float sum(Lanes x) {
    float total = 0;
    for (int64_t i = 0; i < kLanes; ++i) total += x[i];
    return total;
}

inline float highest(Lanes x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float best = x[0];
    for (int64_t i = 1; i < kLanes; ++i) best = std::max(best, x[i]);
    return best;
#endif
}

// `other` in the lanes of vector `v` that are not among the first `seen` values of their row.
inline Lanes masked(Lanes x, int64_t v, int64_t seen, float other) {
    if (seen >= (v + 1) * kLanes) return x;
    IntLanes order;
    for (int64_t i = 0; i < kLanes; ++i) order[i] = int32_t(i);
    return order < int32_t(seen - v * kLanes) ? x : Lanes{} + other;
}

// The units of a product: floats, or pairs of bf16.
struct Pair {
    bf16 first, second;
};

template <class Unit>
using Value = std::conditional_t<std::is_same_v<Unit, Pair>, bf16, float>;
template <class Unit>
constexpr int64_t kPerUnit = sizeof(Unit) / sizeof(Value<Unit>);
#if defined(ARRIERO_TILES)
template <class Unit>
constexpr int64_t kWhole = kPerUnit<Unit> == 2 ? 32 : kLanes;  // matrices are padded with zeros to multiples of it
#else
template <class Unit>
constexpr int64_t kWhole = kLanes;
#endif

inline Lanes load_units(const float* p) { return load(p); }
inline Lanes spread(const float* p) { return Lanes{} + *p; }
inline Lanes add_product(Lanes sums, Lanes a, Lanes b) { return sums + a * b; }
inline void store_along(float* to, const Lanes (&rows)[1]) { store(to, rows[0]); }

#if defined(__AVX512BF16__)
using UnitOfBf16 = Pair;

inline __m512bh load_units(const Pair* p) {
    __m512bh pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    return pairs;
}

inline __m512bh spread(const Pair* p) {
    int32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return (__m512bh)_mm512_set1_epi32(bits);
}

inline Lanes add_product(Lanes sums, __m512bh a, __m512bh b) { return (Lanes)_mm512_dpbf16_ps((__m512)sums, a, b); }

inline void store_along(Pair* to, const Lanes (&rows)[2]) {
    const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i pairs =
        _mm512_permutexvar_epi16(zip, (__m512i)_mm512_cvtne2ps_pbh((__m512)rows[1], (__m512)rows[0]));
    std::memcpy(to, &pairs, sizeof pairs);
}
#else
using UnitOfBf16 = float;
#endif

#if defined(__AVX512F__)
// kLanes rows and columns: the halves of rows that are kLanes / 2 apart change places, then quarters, and so on.
template <class Unit>
inline void turn_square(const Unit* from, int64_t ld_from, Unit* to, int64_t ld_to) {
    __m512i rows[kLanes];
    for (int64_t m = 0; m < kLanes; ++m) rows[m] = _mm512_loadu_si512(from + m * ld_from);
    for (int64_t step = kLanes / 2; step; step /= 2) {
        IntLanes upper, lower;
        for (int64_t i = 0; i < kLanes; ++i) {
            upper[i] = int32_t(i & step ? kLanes + i - step : i);
            lower[i] = int32_t(i & step ? kLanes + i : i + step);
        }
        for (int64_t m = 0; m < kLanes; ++m) {
            if (m & step) continue;
            const __m512i a = rows[m], b = rows[m + step];
            rows[m] = _mm512_permutex2var_epi32(a, (__m512i)upper, b);
            rows[m + step] = _mm512_permutex2var_epi32(a, (__m512i)lower, b);
        }
    }
    for (int64_t n = 0; n < kLanes; ++n) _mm512_storeu_si512(to + n * ld_to, rows[n]);
}
#endif

// to[n, m] = from[m, n], in units.
template <class Unit>
void turn(int64_t rows, int64_t columns, const Unit* from, int64_t ld_from, Unit* to, int64_t ld_to) {
    int64_t m = 0;
#if defined(__AVX512F__)
    if (columns % kLanes == 0)
        for (; m + kLanes <= rows; m += kLanes)
            for (int64_t n = 0; n < columns; n += kLanes)
                turn_square(from + m * ld_from + n, ld_from, to + n * ld_to + m, ld_to);
#endif
    for (; m < rows; ++m)
        for (int64_t n = 0; n < columns; ++n) to[n * ld_to + m] = from[m * ld_from + n];
}

// C[m, n] (+)= sum over k of A[m, k] B[k, n] for kRows rows and V vectors.
template <int64_t V, bool kAdd, class Unit>
inline void multiply_block(int64_t units, const Unit* a, int64_t lda, const Unit* b, int64_t ldb, float* c,
                           int64_t ldc) {
    Lanes sums[kRows][V];
    for (int64_t m = 0; m < kRows; ++m)
        for (int64_t v = 0; v < V; ++v) sums[m][v] = kAdd ? load(c + m * ldc + v * kLanes) : Lanes{};
    for (int64_t k = 0; k < units; ++k) {
        decltype(load_units(b)) right[V];
        for (int64_t v = 0; v < V; ++v) right[v] = load_units(b + k * ldb + v * kLanes);
        for (int64_t m = 0; m < kRows; ++m) {
            const auto left = spread(a + m * lda + k);
            for (int64_t v = 0; v < V; ++v) sums[m][v] = add_product(sums[m][v], left, right[v]);
        }
    }
    for (int64_t m = 0; m < kRows; ++m)
        for (int64_t v = 0; v < V; ++v) store(c + m * ldc + v * kLanes, sums[m][v]);
}

template <int64_t V, bool kAdd, class Unit>
void multiply_panel(int64_t rows, int64_t units, const Unit* a, int64_t lda, const Unit* b, int64_t ldb, float* c,
                    int64_t ldc) {
    for (int64_t m = 0; m < rows; m += kRows)
        multiply_block<V, kAdd>(units, a + m * lda, lda, b, ldb, c + m * ldc, ldc);
}

#if defined(ARRIERO_TILES)
// AMX: eight registers of 16 rows of 64 bytes. The kernel lends a process their state on request (Linux 5.16).
const bool tiles_lent = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;

struct TilesOfThread {  // configured while it lives
    TilesOfThread() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        asm volatile("" ::"r"(&config) : "memory");  // GCC does not know that all of it is read
        if (tiles_lent) _tile_loadconfig(&config);
    }
    ~TilesOfThread() {
        if (tiles_lent) _tile_release();
    }
};

// 32 x 32 sums in four tiles, two tiles of either factor at a time. Rows are rounded up: what lies past them must be
// readable, and makes sums that nobody reads.
static_assert(kWhole<Pair> == 32, "padding is whole blocks of tiles");
template <bool kAdd>
void multiply_tiles(int64_t rows, int64_t columns, int64_t units, const Pair* a, int64_t lda, const Pair* b,
                    int64_t ldb, float* c, int64_t ldc) {
    asm volatile("" ::: "memory");  // GCC does not know that tile loads read what was just stored
    for (int64_t m = 0; m < rows; m += 32)
        for (int64_t n = 0; n < columns; n += 32) {
            float *upper = c + m * ldc + n, *lower = upper + 16 * ldc;
            if (kAdd) {
                _tile_loadd(0, upper, ldc * 4);
                _tile_loadd(1, upper + 16, ldc * 4);
                _tile_loadd(2, lower, ldc * 4);
                _tile_loadd(3, lower + 16, ldc * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int64_t k = 0; k < units; k += 16) {
                _tile_loadd(4, a + m * lda + k, lda * 4);
                _tile_loadd(6, b + k * ldb + n, ldb * 4);
                _tile_loadd(7, b + k * ldb + n + 16, ldb * 4);
                _tile_loadd(5, a + (m + 16) * lda + k, lda * 4);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, upper, ldc * 4);
            _tile_stored(1, upper + 16, ldc * 4);
            _tile_stored(2, lower, ldc * 4);
            _tile_stored(3, lower + 16, ldc * 4);
        }
}
#else
struct TilesOfThread {};
#endif

// C[m, n] (+)= sum over k of A[m, k] B[k, n] for any number of rows (rounded up: buffers have room) and of vectors.
template <bool kAdd, class Unit>
void multiply(int64_t rows, int64_t vectors, int64_t depth, const Unit* a, int64_t lda, const Unit* b, int64_t ldb,
              float* c, int64_t ldc) {
#if defined(ARRIERO_TILES)
    if constexpr (std::is_same_v<Unit, Pair>)
        if (tiles_lent)
            return multiply_tiles<kAdd>(rows, vectors * kLanes, up(depth, 32) / 2, a, lda, b, ldb, c, ldc);
#endif
    const int64_t units = up(depth, kPerUnit<Unit>) / kPerUnit<Unit>;
    int64_t v = 0;
    for (; v + 2 <= vectors; v += 2)
        multiply_panel<2, kAdd>(rows, units, a, lda, b + v * kLanes, ldb, c + v * kLanes, ldc);
    if (v < vectors) multiply_panel<1, kAdd>(rows, units, a, lda, b + v * kLanes, ldb, c + v * kLanes, ldc);
}

// Words of 32 bits on whole cache lines, not initialised.
template <class Word>
class Buffer {
  public:
    explicit Buffer(int64_t words) : at_(static_cast<Word*>(::operator new(size_t(words) * 4, std::align_val_t(64)))) {}
    ~Buffer() { ::operator delete(at_, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator Word*() const { return at_; }

  private:
    Word* at_;
};

extern "C" struct Attention {
    int64_t n_documents, n_heads, n_kv_heads, width, threads, bf16;
    const int32_t *bounds, *leads;  // [n_documents + 1]; [n_documents], the document that each continues, or -1
    const void *q, *k, *v;          // [N, H, h], [N, K, h], [N, K, h]
    void* out;                      // [N, H, h]
    float* logsumexp;               // [N, H]
    const void* grad;               // [N, H, h], of out
    void *grad_q, *grad_k, *grad_v; // like q, k, v
};

template <class T, class Unit>
class Packed {
  public:
    explicit Packed(const Attention& a, bool backward)
        : a_(a), backward_(backward), width_(up(a.width, kWhole<Unit>)), units_(width_ / kPerUnit<Unit>),
          scale_(1 / (kLn2 * std::sqrt(float(a.width)))), first_block_(a.n_documents + 1), before_(a.n_documents),
          order_(a.n_documents) {
        for (int64_t d = 0; d < a.n_documents; ++d) {
            first_block_[d + 1] = first_block_[d] + (length(d) + kKeys - 1) / kKeys;
            if (a.leads[d] >= 0) before_[d] = before_[a.leads[d]] + length(a.leads[d]);
        }
        std::iota(order_.begin(), order_.end(), 0);
        std::stable_sort(order_.begin(), order_.end(), [&](int64_t x, int64_t y) { return length(x) > length(y); });
    }

    void forward() {
        const Buffer<Unit> keys(packed_size()), values(packed_size());
        keys_across_ = keys, values_along_ = values;
#pragma omp parallel num_threads(int(a_.threads))
        {
            pack();
            const Tile tile(width_);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < a_.n_documents * a_.n_heads; ++i)
                attend(order_[i / a_.n_heads], i % a_.n_heads, tile);
        }
    }

    void backward() {
        plan();
        int64_t needed = 0;
        for (Strand& strand : strands_) strand.sums = needed, needed += 2 * trees_[strand.tree].size;
        const Buffer<Unit> keys(packed_size()), keys_across(packed_size()), values(packed_size());
        const Buffer<float> sums(a_.n_kv_heads * needed);
        keys_along_ = keys, keys_across_ = keys_across, values_across_ = values;
#pragma omp parallel num_threads(int(a_.threads))
        {
            pack();
            const Buffer<float> own(2 * padded(order_[0]));
            const Tile tile(width_);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < int64_t(strands_.size()) * a_.n_kv_heads; ++i) {
                const Strand& strand = strands_[i / a_.n_kv_heads];
                const Tree& tree = trees_[strand.tree];
                const int64_t kv = i % a_.n_kv_heads;
                float* at_leads = sums + kv * needed + strand.sums;
                std::fill(at_leads, at_leads + 2 * tree.size, 0.0f);
                for (size_t j = strand.first; j < tree.documents.size(); j += tree.strands)
                    differentiate(tree.documents[j], kv, {at_leads, at_leads + tree.size}, own, tile);
            }
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < int64_t(trees_.size()) * a_.n_kv_heads; ++i)
                add_up(trees_[i / a_.n_kv_heads], i % a_.n_kv_heads, sums + i % a_.n_kv_heads * needed);
        }
    }

  private:
    static constexpr int64_t kQueries = kWhole<Unit> == 32 ? 64 : 32;  // a tile; products by registers gain by more
    static constexpr int64_t kTileUnits = kQueries / kPerUnit<Unit>, kBlockUnits = kKeys / kPerUnit<Unit>;
    static_assert(kQueries % kWhole<Unit> == 0 && kKeys % kWhole<Unit> == 0);

    struct Block {
        int64_t index, start, keys;  // in the packed copies; from the query's document, < 0 in a lead; its keys
        int64_t place;               // of its gradients, among those of all leads of the tree or the document's own
    };

    struct Gradients {  // of keys and of values, in blocks [W, kKeys]
        float *k, *v;
    };

    // Documents that hang together by leads. Many documents add to the gradients of a lead's keys, so a tree's documents
    // are dealt to strands, each with sums of its own for all the tree's leads, which are added up in order at the end.
    struct Tree {
        std::vector<int64_t> documents;  // the longest first
        int64_t pairs, size, strands;    // visible; floats of its leads' keys, one of two gradients; how many
        size_t first_strand;
    };

    struct Strand {
        size_t tree, first;  // of its documents, which are those of the tree `strands` apart
        int64_t sums;        // where its sums begin, among those of a KV head
    };

    struct Tile {  // what a thread works in
        explicit Tile(int64_t width)
            : units(5 * kQueries * width + 3 * kQueries * kKeys), words(kQueries * (width + 2 * kKeys)),  //
              q(units), q_turned(q + kQueries * width), grad(q_turned + kQueries * width),
              grad_turned(grad + kQueries * width), along(grad_turned + kQueries * width),
              weights(along + kQueries * width),
              slopes(weights + kQueries * kKeys), slopes_along(slopes + kQueries * kKeys),  //
              scores(words), grad_weights(scores + kQueries * kKeys), sums(grad_weights + kQueries * kKeys) {}

        const TilesOfThread registers{};
        const Buffer<Unit> units;
        const Buffer<float> words;
        Unit *const q, *const q_turned, *const grad, *const grad_turned, *const along;  // [kQueries, W]
        Unit *const weights, *const slopes, *const slopes_along;  // [kQueries, kKeys]; slopes are the scores' gradients
        float *const scores, *const grad_weights, *const sums;          // twice that; of out or grad_q [kQueries, W]
    };

    int64_t begin(int64_t d) const { return a_.bounds[d]; }
    int64_t length(int64_t d) const { return a_.bounds[d + 1] - a_.bounds[d]; }
    int64_t padded(int64_t d) const { return up(length(d), kKeys) * width_; }
    int64_t group() const { return a_.n_heads / a_.n_kv_heads; }
    int64_t at(int64_t kv, int64_t block) const { return (kv * first_block_.back() + block) * kKeys * units_; }
    int64_t packed_size() const { return at(a_.n_kv_heads, 0); }

    // All keys and values, [K, blocks, (a layout of [kKeys, W])].
    void pack() const {
        const Buffer<Unit> rows(kKeys * units_);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < a_.n_documents * a_.n_kv_heads; ++i) {
            const int64_t d = order_[i / a_.n_kv_heads], kv = i % a_.n_kv_heads;
            for (int64_t start = 0; start < length(d); start += kKeys) {
                const int64_t count = std::min(kKeys, length(d) - start), to = at(kv, first_block_[d] + start / kKeys);
                lay_rows(a_.k, begin(d) + start, a_.n_kv_heads, kv, count, rows);
                lay_across(rows, count, keys_across_ + to);
                if (backward_) lay_along(rows, count, keys_along_ + to);
                lay_rows(a_.v, begin(d) + start, a_.n_kv_heads, kv, count, rows);
                if (backward_) lay_across(rows, count, values_across_ + to);
                else lay_along(rows, count, values_along_ + to);
            }
        }
    }

    // By rows from `count` tokens of one of the heads of x [N, heads, h]; zeros up to whole vectors either way.
    void lay_rows(const void* x, int64_t token, int64_t heads, int64_t head, int64_t count, Unit* to) const {
        auto* values = reinterpret_cast<Value<Unit>*>(to);
        const T* from = row_of(x, token * heads + head);
        for (int64_t r = 0; r < count; ++r, from += heads * a_.width)
            for (int64_t i = 0; i < width_; i += kLanes)
                store(values + r * width_ + i, load_some(from + i, a_.width - i));
        std::fill(values + count * width_, values + up(count, kWhole<Unit>) * width_, Value<Unit>{});
    }

    void lay_along(const Unit* rows, int64_t count, Unit* to) const {
        const auto* from = reinterpret_cast<const Value<Unit>*>(rows);
        for (int64_t j = 0; j < up(count, kWhole<Unit>); j += kPerUnit<Unit>)
            for (int64_t i = 0; i < width_; i += kLanes, to += kLanes) {
                Lanes unit[kPerUnit<Unit>];
                for (int64_t part = 0; part < kPerUnit<Unit>; ++part) unit[part] = load(from + (j + part) * width_ + i);
                store_along(to, unit);
            }
    }

    void lay_across(const Unit* rows, int64_t count, Unit* to) const {
        turn(up(count, kWhole<Unit>), units_, rows, units_, to, kKeys);
    }

    void lay_turned(const Unit* rows, int64_t count, const Tile& tile, Unit* to) const {
        lay_along(rows, count, tile.along);
        turn(up(count, kWhole<Unit>) / kPerUnit<Unit>, width_, tile.along, width_, to, kTileUnits);
    }

    // Trees and their strands: about kStrands in all, shared out by the pairs that are visible.
    void plan() {
        std::vector<int64_t> tree_of(a_.n_documents);
        place_.assign(a_.n_documents, -1);
        for (int64_t d = 0; d < a_.n_documents; ++d) {
            const int64_t lead = a_.leads[d];
            tree_of[d] = lead < 0 ? int64_t(trees_.size()) : tree_of[lead];
            if (lead < 0) trees_.push_back({});
            else place_[lead] = 0;
        }
        int64_t pairs = 0;
        for (int64_t d : order_) {
            Tree& tree = trees_[tree_of[d]];
            tree.documents.push_back(d);
            const int64_t seen = length(d) * (before_[d] + (length(d) + 1) / 2);
            tree.pairs += seen, pairs += seen;
        }
        for (int64_t d = 0; d < a_.n_documents; ++d)
            if (place_[d] == 0) place_[d] = trees_[tree_of[d]].size, trees_[tree_of[d]].size += padded(d);
        for (size_t t = 0; t < trees_.size(); ++t) {
            Tree& tree = trees_[t];
            const int64_t share = kStrands * tree.pairs / std::max<int64_t>(pairs, 1);
            tree.strands = std::clamp<int64_t>(share, 1, int64_t(tree.documents.size()));
            tree.first_strand = strands_.size();
            for (int64_t s = 0; s < tree.strands; ++s) strands_.push_back({t, size_t(s), 0});
        }
        std::stable_sort(strands_.begin(), strands_.end(), [&](const Strand& x, const Strand& y) {
            return trees_[x.tree].pairs / trees_[x.tree].strands > trees_[y.tree].pairs / trees_[y.tree].strands;
        });
        for (size_t s = strands_.size(); s-- > 0;)
            if (strands_[s].first == 0) trees_[strands_[s].tree].first_strand = s;  // a tree's strands stay neighbours
    }

    // visit(block) for the blocks of the documents that d continues, the first of them first.
    template <class Visit>
    void over_leads(int64_t lead, int64_t d, Visit& visit) const {
        if (lead < 0) return;
        over_leads(a_.leads[lead], d, visit);
        for (int64_t start = 0; start < length(lead); start += kKeys)
            visit(Block{first_block_[lead] + start / kKeys, before_[lead] + start - before_[d],
                        std::min(kKeys, length(lead) - start), backward_ ? place_[lead] + start * width_ : 0});
    }

    // visit(block) for those, and for d's own up to the one that holds `last`.
    template <class Visit>
    void over_blocks(int64_t d, int64_t last, Visit visit) const {
        over_leads(a_.leads[d], d, visit);
        for (int64_t start = 0; start <= last; start += kKeys)
            visit(Block{first_block_[d] + start / kKeys, start, std::min(kKeys, length(d) - start), start * width_});
    }

    static int64_t seen(const Block& block, int64_t query) {  // how many keys of the block the query sees
        return std::max<int64_t>(0, std::min(block.keys, query - block.start + 1));
    }

    static int64_t vectors(const Block& block, int64_t last) { return up(seen(block, last), kWhole<Unit>) / kLanes; }

    void attend(int64_t d, int64_t head, const Tile& tile) const {
        for (int64_t start = 0; start < length(d); start += kQueries) {
            const int64_t count = std::min(kQueries, length(d) - start), token = begin(d) + start;
            float top[kQueries];
            Lanes total[kQueries] = {};
            std::fill(top, top + kQueries, -INFINITY);
            std::fill(tile.sums, tile.sums + kQueries * width_, 0.0f);
            lay_rows(a_.q, token, a_.n_heads, head, count, tile.q);
            over_blocks(d, start + count - 1, [&](const Block& block) {
                const int64_t n = vectors(block, start + count - 1), from = at(head / group(), block.index);
                multiply<false>(count, n, a_.width, tile.q, units_, keys_across_ + from, kKeys, tile.scores, kKeys);
                for (int64_t r = 0; r < count; ++r) soften(tile, r, n, seen(block, start + r), top[r], total[r]);
                multiply<true>(count, width_ / kLanes, n * kLanes, tile.weights, kBlockUnits, values_along_ + from,
                               width_, tile.sums, width_);
            });
            for (int64_t r = 0; r < count; ++r) {
                const int64_t row = (token + r) * a_.n_heads + head;
                const float all = sum(total[r]);
                write_row(tile.sums + r * width_, 1 / all, static_cast<T*>(a_.out) + row * a_.width);
                a_.logsumexp[row] = (top[r] + std::log2(all)) * kLn2;
            }
        }
    }

    // Scores of a row to 2^(score - top), top the highest so far; what was summed under a lower top is scaled down.
    void soften(const Tile& tile, int64_t r, int64_t n, int64_t visible, float& top, Lanes& total) const {
        const float* scores = tile.scores + r * kKeys;
        auto* weights = reinterpret_cast<Value<Unit>*>(tile.weights) + r * kKeys;
        if (!visible) return (void)std::fill(weights, weights + n * kLanes, Value<Unit>{});
        Lanes best = Lanes{} - INFINITY, added = Lanes{};
        for (int64_t v = 0; v < n; ++v) {
            const Lanes x = masked(load(scores + v * kLanes), v, visible, -INFINITY);
            best = best > x ? best : x;
        }
        const float raised = std::max(top, highest(best) * scale_);
        for (int64_t v = 0; v < n; ++v) {
            const Lanes weight = masked(power_of_two(load(scores + v * kLanes) * scale_ - raised), v, visible, 0);
            added += weight;
            store(weights + v * kLanes, weight);
        }
        if (raised > top) {
            const float shrink = std::exp2(top - raised);
            total *= shrink;
            float* sums = tile.sums + r * width_;
            for (int64_t i = 0; i < width_; i += kLanes) store(sums + i, load(sums + i) * shrink);
        }
        top = raised;
        total += added;
    }

    // One document and KV head: grad_q of its query heads, grad_k and grad_v of the keys that they see. Those of leads
    // are added to `at_leads`; a document that leads none writes its own keys', for which `room` is.
    void differentiate(int64_t d, int64_t kv, Gradients at_leads, float* room, const Tile& tile) const {
        Gradients own{room, room + padded(d)};
        if (place_[d] >= 0) own = {at_leads.k + place_[d], at_leads.v + place_[d]};
        else std::fill(room, room + 2 * padded(d), 0.0f);
        for (int64_t head = kv * group(); head < (kv + 1) * group(); ++head)
            for (int64_t start = 0; start < length(d); start += kQueries)
                differentiate_tile(d, head, start, at_leads, own, tile);
        if (place_[d] < 0) write_keys(begin(d), length(d), kv, own);
    }

    // The sums of a tree's strands for one KV head, in order, to the gradients of its leads' keys.
    void add_up(const Tree& tree, int64_t kv, float* sums) const {
        if (!tree.size) return;
        float* total = sums + strands_[tree.first_strand].sums;
        for (int64_t s = 1; s < tree.strands; ++s)
            for (int64_t j = 0; j < 2 * tree.size; ++j) total[j] += total[2 * s * tree.size + j];
        for (int64_t d : tree.documents)
            if (place_[d] >= 0)
                write_keys(begin(d), length(d), kv, {total + place_[d], total + tree.size + place_[d]});
    }

    void differentiate_tile(int64_t d, int64_t head, int64_t start, Gradients at_leads, Gradients own,
                            const Tile& tile) const {
        const int64_t count = std::min(kQueries, length(d) - start), token = begin(d) + start;
        const int64_t rows = up(count, kWhole<Unit>);  // with rows of zeros, whose weights do no harm
        float lse[kQueries] = {}, delta[kQueries] = {};  // log2 sum exp; rowsum(grad * out)
        lay_rows(a_.q, token, a_.n_heads, head, count, tile.q);
        lay_rows(a_.grad, token, a_.n_heads, head, count, tile.grad);
        lay_turned(tile.q, count, tile, tile.q_turned);
        lay_turned(tile.grad, count, tile, tile.grad_turned);
        for (int64_t r = 0; r < count; ++r) {
            const int64_t row = (token + r) * a_.n_heads + head;
            lse[r] = a_.logsumexp[row] / kLn2;
            delta[r] = dot(row_of(a_.grad, row), row_of(a_.out, row));
        }
        std::fill(tile.sums, tile.sums + kQueries * width_, 0.0f);
        over_blocks(d, start + count - 1, [&](const Block& block) {
            const int64_t n = vectors(block, start + count - 1), from = at(head / group(), block.index);
            multiply<false>(rows, n, a_.width, tile.q, units_, keys_across_ + from, kKeys, tile.scores, kKeys);
            multiply<false>(rows, n, a_.width, tile.grad, units_, values_across_ + from, kKeys, tile.grad_weights,
                            kKeys);
            for (int64_t r = 0; r < rows; r += kPerUnit<Unit>) weigh(tile, r, n, block, start, lse, delta);
            const Gradients& of = block.start < 0 ? at_leads : own;
            float *grad_v = of.v + block.place, *grad_k = of.k + block.place;
            multiply<true>(width_, n, rows, tile.grad_turned, kTileUnits, tile.weights, kKeys, grad_v, kKeys);
            multiply<true>(width_, n, rows, tile.q_turned, kTileUnits, tile.slopes_along, kKeys, grad_k, kKeys);
            multiply<true>(rows, width_ / kLanes, n * kLanes, tile.slopes, kBlockUnits, keys_along_ + from, width_,
                           tile.sums, width_);
        });
        for (int64_t r = 0; r < count; ++r)
            write_row(tile.sums + r * width_, scale_ * kLn2,
                      static_cast<T*>(a_.grad_q) + ((token + r) * a_.n_heads + head) * a_.width);
    }

    // The weights of a unit's rows again, along, and the gradients of their scores, along and by rows.
    void weigh(const Tile& tile, int64_t r, int64_t n, const Block& block, int64_t start, const float* lse,
               const float* delta) const {
        auto* slopes = reinterpret_cast<Value<Unit>*>(tile.slopes);
        for (int64_t v = 0; v < n; ++v) {
            Lanes weights[kPerUnit<Unit>], gradients[kPerUnit<Unit>];
            for (int64_t i = 0; i < kPerUnit<Unit>; ++i) {
                const int64_t from = (r + i) * kKeys + v * kLanes;
                const Lanes weight = power_of_two(load(tile.scores + from) * scale_ - lse[r + i]);
                weights[i] = masked(weight, v, seen(block, start + r + i), 0);
                gradients[i] = weights[i] * (load(tile.grad_weights + from) - delta[r + i]);
                store(slopes + from, gradients[i]);
            }
            const int64_t to = r / kPerUnit<Unit> * kKeys + v * kLanes;
            store_along(tile.weights + to, weights);
            store_along(tile.slopes_along + to, gradients);
        }
    }

    const T* row_of(const void* x, int64_t row) const { return static_cast<const T*>(x) + row * a_.width; }

    float dot(const T* a, const T* b) const {
        Lanes products = Lanes{};
        for (int64_t i = 0; i < a_.width; i += kLanes)
            products += load_some(a + i, a_.width - i) * load_some(b + i, a_.width - i);
        return sum(products);
    }

    void write_row(const float* from, float scale, T* to) const {
        for (int64_t i = 0; i < a_.width; i += kLanes) store_some(to + i, load(from + i) * scale, a_.width - i);
    }

    // The gradients of `count` keys and values, turned in blocks [W, kKeys].
    void write_keys(int64_t token, int64_t count, int64_t kv, Gradients grad) const {
        const Buffer<float> row(width_);
        for (int64_t j = 0; j < count; ++j) {
            const int64_t from = j / kKeys * kKeys * width_ + j % kKeys;
            const int64_t to = ((token + j) * a_.n_kv_heads + kv) * a_.width;
            for (int64_t i = 0; i < width_; ++i) row[i] = grad.k[from + i * kKeys];
            write_row(row, scale_ * kLn2, static_cast<T*>(a_.grad_k) + to);
            for (int64_t i = 0; i < width_; ++i) row[i] = grad.v[from + i * kKeys];
            write_row(row, 1, static_cast<T*>(a_.grad_v) + to);
        }
    }

    const Attention& a_;
    const bool backward_;
    const int64_t width_, units_;               // W, in values and in units
    const float scale_;                         // of scores, to exponents of two
    std::vector<int64_t> first_block_;          // [documents + 1]
    std::vector<int64_t> before_, order_;       // tokens that each document continues; documents, longest first
    std::vector<int64_t> place_;                // backward: of each lead among the sums of its tree, else -1
    std::vector<Tree> trees_;
    std::vector<Strand> strands_;
    Unit *keys_along_ = nullptr, *keys_across_ = nullptr, *values_along_ = nullptr, *values_across_ = nullptr;
};

}  // namespace

extern "C" void arriero_attention_forward(const Attention* a) {
    a->bf16 ? Packed<bf16, UnitOfBf16>(*a, false).forward() : Packed<float, float>(*a, false).forward();
}

extern "C" void arriero_attention_backward(const Attention* a) {
    a->bf16 ? Packed<bf16, UnitOfBf16>(*a, true).backward() : Packed<float, float>(*a, true).backward();
}
