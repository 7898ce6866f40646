// Causal attention over the packed documents of one row on a CPU, forward and backward, without stored scores.
//
// A tile of queries goes over its keys a block at a time, so that scores live in the first-level cache and die there;
// blocks that causality masks are never computed. All products run through one small matrix kernel on fp32 copies:
// sums are fp32 whatever the tensors are. Keys and values are copied once, keys (and, backward, values) transposed as
// well, so that the kernel always reads whole vectors. Backward as in arXiv 2205.14135, the scores computed again.
// Every number is the sum of the same terms in the same order whichever thread adds them: reruns are equal bit by bit.
//
// Compiled on first use by attention.py, which describes the call; slow twin: `naive_attention` there.
// Shapes: N tokens, H heads, K KV heads, G = H/K, h head width, W = h rounded up to whole vectors.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <numeric>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int64_t kBytes = 64, kRows = 8;  // of one vector; of the matrix kernel, whose sums fill half the registers
#elif defined(__AVX2__)
constexpr int64_t kBytes = 32, kRows = 4;
#else
constexpr int64_t kBytes = 16, kRows = 4;
#endif
constexpr int64_t kLanes = kBytes / 4;
constexpr int64_t kQueries = 32;  // a tile
constexpr int64_t kKeys = 64;     // a block
constexpr int64_t kStrands = 16;  // backward: documents are dealt to so many strands a KV head
static_assert(kLanes % kRows == 0 && kQueries % kRows == 0 && kKeys % kLanes == 0, "no kernel row crosses a block");

typedef float Lanes __attribute__((vector_size(kBytes)));
typedef int32_t IntLanes __attribute__((vector_size(kBytes)));
typedef uint32_t WideLanes __attribute__((vector_size(kBytes)));
typedef uint16_t HalfLanes __attribute__((vector_size(kBytes / 2)));

struct bf16 {
    uint16_t bits;
};

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
    const WideLanes bits = (WideLanes)lanes;
    const HalfLanes half = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, HalfLanes);
    std::memcpy(p, &half, sizeof half);
}

// to[i] = from[i] * scale for i < width, then zeros up to whole vectors.
template <class T>
inline void widen_row(const T* from, int64_t width, float scale, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(to + i, load(from + i) * scale);
    if (i == width) return;
    T rest[kLanes] = {};
    std::copy(from + i, from + width, rest);
    store(to + i, load(rest) * scale);
}

template <class T>
inline void narrow_row(const float* from, int64_t width, float scale, T* to) {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(to + i, load(from + i) * scale);
    if (i == width) return;
    T rest[kLanes];
    store(rest, load(from + i) * scale);
    std::copy(rest, rest + (width - i), to + i);
}

inline Lanes exponential(Lanes x) {  // relative error below 3e-7 on [-87, 88], clamped outside
    x = x < -87.0f ? Lanes{} - 87.0f : x;
    x = x > 88.0f ? Lanes{} + 88.0f : x;
    const Lanes magic = Lanes{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const Lanes whole = (x * 1.44269504f + magic) - magic;
    const Lanes part = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // x - whole * ln 2, in two parts
    Lanes series = part * (1.0f / 720) + 1.0f / 120;
    series = series * part + 1.0f / 24;
    series = series * part + 1.0f / 6;
    series = series * part + 0.5f;
    series = series * part + 1.0f;
    series = series * part + 1.0f;
    return (Lanes)((IntLanes)series + (__builtin_convertvector(whole, IntLanes) << 23));
}

inline float sum(Lanes x) {
    float total = 0;
    for (int64_t i = 0; i < kLanes; ++i) total += x[i];
    return total;
}

inline float highest(Lanes x) {
    float best = x[0];
    for (int64_t i = 1; i < kLanes; ++i) best = std::max(best, x[i]);
    return best;
}

// Zero (or `other`) in the lanes of vector `v` that are not among the first `seen` values of their row.
inline Lanes masked(Lanes x, int64_t v, int64_t seen, float other) {
    IntLanes order;
    for (int64_t i = 0; i < kLanes; ++i) order[i] = int32_t(i);
    return order < int32_t(seen - v * kLanes) ? x : Lanes{} + other;
}

// C[m, n] (+)= sum over k of A[m, k] B[k, n] for kRows rows and V vectors; A[m, k] lies at a[m * am + k * ak].
template <int64_t V, bool kAdd>
inline void multiply_block(int64_t depth, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, float* c,
                           int64_t ldc) {
    Lanes sums[kRows][V];
    for (int64_t m = 0; m < kRows; ++m)
        for (int64_t v = 0; v < V; ++v) sums[m][v] = kAdd ? load(c + m * ldc + v * kLanes) : Lanes{};
    for (int64_t k = 0; k < depth; ++k) {
        Lanes right[V];
        for (int64_t v = 0; v < V; ++v) right[v] = load(b + k * ldb + v * kLanes);
        for (int64_t m = 0; m < kRows; ++m)
            for (int64_t v = 0; v < V; ++v) sums[m][v] += a[m * am + k * ak] * right[v];
    }
    for (int64_t m = 0; m < kRows; ++m)
        for (int64_t v = 0; v < V; ++v) store(c + m * ldc + v * kLanes, sums[m][v]);
}

template <int64_t V, bool kAdd>
void multiply_panel(int64_t rows, int64_t depth, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb,
                    float* c, int64_t ldc) {
    for (int64_t m = 0; m < rows; m += kRows)
        multiply_block<V, kAdd>(depth, a + m * am, am, ak, b, ldb, c + m * ldc, ldc);
}

// The same for any number of rows (rounded up to kRows: buffers have room) and of vectors.
template <bool kAdd>
void multiply(int64_t rows, int64_t vectors, int64_t depth, const float* a, int64_t am, int64_t ak, const float* b,
              int64_t ldb, float* c, int64_t ldc) {
    int64_t v = 0;
    for (; v + 2 <= vectors; v += 2)
        multiply_panel<2, kAdd>(rows, depth, a, am, ak, b + v * kLanes, ldb, c + v * kLanes, ldc);
    if (v < vectors) multiply_panel<1, kAdd>(rows, depth, a, am, ak, b + v * kLanes, ldb, c + v * kLanes, ldc);
}

// Floats on whole cache lines, not initialised.
class Buffer {
  public:
    explicit Buffer(int64_t size) : at_(static_cast<float*>(::operator new(size_t(size) * 4, std::align_val_t(64)))) {}
    ~Buffer() { ::operator delete(at_, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    float* get() const { return at_; }
    float* zeroed(int64_t size) const { return std::fill(at_, at_ + size, 0.0f), at_; }

  private:
    float* at_;
};

extern "C" struct Attention {
    int64_t n_documents, n_heads, n_kv_heads, width, prefix, threads, bf16;
    const int32_t* cu_seqlens;      // [n_documents + 1]
    const void *q, *k, *v;          // [N, H, h], [N, K, h], [N, K, h]
    void* out;                      // [N, H, h]
    float* logsumexp;               // [N, H]
    const void* grad;               // [N, H, h], of out
    void *grad_q, *grad_k, *grad_v; // like q, k, v
};

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T>
class Packed {
  public:
    explicit Packed(const Attention& a, bool backward)
        : a_(a), backward_(backward), width_(up(a.width, kLanes)), scale_(1 / std::sqrt(float(a.width))),
          first_block_(a.n_documents + 1), order_(a.n_documents) {
        for (int64_t d = 0; d < a.n_documents; ++d)
            first_block_[d + 1] = first_block_[d] + (length(d) + kKeys - 1) / kKeys;
        std::iota(order_.begin(), order_.end(), 0);
        std::stable_sort(order_.begin(), order_.end(), [&](int64_t x, int64_t y) { return length(x) > length(y); });
    }

    void forward() {
        const Buffer keys(blocks() * kKeys * width_), values(blocks() * kKeys * width_);
        keys_t_ = keys.get(), values_ = values.get();
#pragma omp parallel num_threads(int(a_.threads))
        {
            pack();
            const Buffer scratch(kQueries * (2 * width_ + kKeys));
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < a_.n_documents * a_.n_heads; ++i)
                attend(order_[i / a_.n_heads], i % a_.n_heads, scratch.get());
        }
    }

    void backward() {
        const int64_t size = blocks() * kKeys * width_, strands = std::min(kStrands, a_.n_documents);
        const int64_t shared = up(a_.prefix, kKeys) * width_, longest = up(length(order_[0]), kKeys) * width_;
        const Buffer keys(size), keys_t(size), values_t(size), sums(2 * strands * a_.n_kv_heads * shared);
        keys_ = keys.get(), keys_t_ = keys_t.get(), values_t_ = values_t.get();
#pragma omp parallel num_threads(int(a_.threads))
        {
            pack();
            const Buffer own(2 * longest), scratch(kQueries * (3 * width_ + 2 * kKeys));
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < strands * a_.n_kv_heads; ++i) {
                float* lead = sums.get() + 2 * i * shared;  // what this strand's documents ask of the prefix
                std::fill(lead, lead + 2 * shared, 0.0f);
                for (int64_t d = i / a_.n_kv_heads; d < a_.n_documents; d += strands)
                    differentiate(order_[d], i % a_.n_kv_heads, lead, own.get(), scratch.get());
            }
#pragma omp for
            for (int64_t i = 0; i < a_.n_kv_heads; ++i) {
                float* total = sums.get() + 2 * i * shared;
                for (int64_t s = 1; s < strands; ++s)
                    for (int64_t j = 0; j < 2 * shared; ++j) total[j] += total[2 * s * a_.n_kv_heads * shared + j];
                write_keys(0, a_.prefix, i, total, total + shared);
            }
        }
    }

  private:
    struct Block {
        int64_t index, start, keys;  // in the packed copies; in the document, < 0 in the prefix; its keys
    };

    int64_t begin(int64_t d) const { return a_.cu_seqlens[d]; }
    int64_t length(int64_t d) const { return a_.cu_seqlens[d + 1] - a_.cu_seqlens[d]; }
    int64_t blocks() const { return a_.n_kv_heads * first_block_.back(); }

    // Copies of all keys and values: [K, blocks, kKeys, W], and transposed [K, blocks, W, kKeys].
    void pack() const {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < a_.n_documents * a_.n_kv_heads; ++i) {
            const int64_t d = order_[i / a_.n_kv_heads], kv = i % a_.n_kv_heads;
            for (int64_t start = 0; start < length(d); start += kKeys) {
                const int64_t token = begin(d) + start, count = std::min(kKeys, length(d) - start);
                const int64_t to = at(kv, first_block_[d] + start / kKeys);
                const T* k = static_cast<const T*>(a_.k) + (token * a_.n_kv_heads + kv) * a_.width;
                const T* v = static_cast<const T*>(a_.v) + (token * a_.n_kv_heads + kv) * a_.width;
                pack_across(k, count, keys_t_ + to);
                pack_along(backward_ ? k : v, count, (backward_ ? keys_ : values_) + to);
                if (backward_) pack_across(v, count, values_t_ + to);
            }
        }
    }

    void pack_along(const T* from, int64_t count, float* to) const {
        for (int64_t j = 0; j < count; ++j)
            widen_row(from + j * a_.n_kv_heads * a_.width, a_.width, 1, to + j * width_);
        std::fill(to + count * width_, to + up(count, kLanes) * width_, 0.0f);
    }

    void pack_across(const T* from, int64_t count, float* to) const {
        const int64_t padded = up(count, kLanes);
        float rows[kKeys][kLanes];
        for (int64_t c = 0; c < width_; c += kLanes) {
            for (int64_t j = 0; j < padded; ++j)
                if (j < count)
                    widen_row(from + j * a_.n_kv_heads * a_.width + c, std::min(kLanes, a_.width - c), 1, rows[j]);
                else
                    store(rows[j], Lanes{});
            for (int64_t i = 0; i < kLanes; ++i)
                for (int64_t j = 0; j < padded; ++j) to[(c + i) * kKeys + j] = rows[j][i];
        }
    }

    int64_t at(int64_t kv, int64_t block) const { return (kv * first_block_.back() + block) * kKeys * width_; }

    // visit(block) for the prefix's blocks, if d continues it, and for d's own up to the one that holds `last`.
    template <class Visit>
    void over_blocks(int64_t d, int64_t last, Visit visit) const {
        if (a_.prefix && d > 0)
            for (int64_t start = 0; start < a_.prefix; start += kKeys)
                visit(Block{start / kKeys, start - a_.prefix, std::min(kKeys, a_.prefix - start)});
        for (int64_t start = 0; start <= last; start += kKeys)
            visit(Block{first_block_[d] + start / kKeys, start, std::min(kKeys, length(d) - start)});
    }

    static int64_t seen(const Block& block, int64_t query) {  // how many keys of the block the query sees
        return std::max<int64_t>(0, std::min(block.keys, query - block.start + 1));
    }

    static int64_t vectors(const Block& block, int64_t last) { return (seen(block, last) + kLanes - 1) / kLanes; }

    // Rows [count, W] of one head from x [N, H, h], times scale; zeros up to whole kernel rows.
    void widen_tile(const void* x, int64_t token, int64_t head, int64_t count, float scale, float* to) const {
        const T* from = static_cast<const T*>(x) + (token * a_.n_heads + head) * a_.width;
        for (int64_t r = 0; r < count; ++r) widen_row(from + r * a_.n_heads * a_.width, a_.width, scale, to + r * width_);
        std::fill(to + count * width_, to + up(count, kRows) * width_, 0.0f);
    }

    void attend(int64_t d, int64_t head, float* scratch) const {
        float *q = scratch, *out = q + kQueries * width_, *scores = out + kQueries * width_;
        for (int64_t start = 0; start < length(d); start += kQueries) {
            const int64_t count = std::min(kQueries, length(d) - start), token = begin(d) + start;
            float top[kQueries], total[kQueries] = {};
            std::fill(top, top + kQueries, -INFINITY);
            std::fill(out, out + kQueries * width_, 0.0f);
            widen_tile(a_.q, token, head, count, scale_, q);
            over_blocks(d, start + count - 1, [&](const Block& block) {
                const int64_t n = vectors(block, start + count - 1), from = at(head / group(), block.index);
                multiply<false>(count, n, a_.width, q, width_, 1, keys_t_ + from, kKeys, scores, kKeys);
                for (int64_t r = 0; r < count; ++r)
                    soften(scores + r * kKeys, n, seen(block, start + r), top[r], total[r], out + r * width_);
                multiply<true>(count, width_ / kLanes, n * kLanes, scores, kKeys, 1, values_ + from, width_, out, width_);
            });
            for (int64_t r = 0; r < count; ++r) {
                const int64_t row = (token + r) * a_.n_heads + head;
                narrow_row(out + r * width_, a_.width, 1 / total[r], static_cast<T*>(a_.out) + row * a_.width);
                a_.logsumexp[row] = top[r] + std::log(total[r]);
            }
        }
    }

    // Scores to exp(score - top), top the highest so far; what was summed under a lower top is scaled down.
    void soften(float* scores, int64_t n, int64_t visible, float& top, float& total, float* out) const {
        if (!visible) return (void)std::fill(scores, scores + n * kLanes, 0.0f);
        Lanes best = Lanes{} + top, sums = Lanes{};
        for (int64_t v = 0; v < n; ++v) {
            const Lanes x = masked(load(scores + v * kLanes), v, visible, -INFINITY);
            best = best > x ? best : x;
        }
        const float raised = highest(best);
        for (int64_t v = 0; v < n; ++v) {
            const Lanes p = masked(exponential(load(scores + v * kLanes) - raised), v, visible, 0);
            sums += p;
            store(scores + v * kLanes, p);
        }
        if (raised > top) {
            const float shrink = std::exp(top - raised);
            total *= shrink;
            for (int64_t i = 0; i < width_; i += kLanes) store(out + i, load(out + i) * shrink);
        }
        top = raised;
        total += sum(sums);
    }

    // One document and KV head: grad_q of its query heads, grad_k and grad_v of its own keys; the prefix's into `lead`.
    void differentiate(int64_t d, int64_t kv, float* lead, float* own, float* scratch) const {
        const int64_t shared = up(a_.prefix, kKeys) * width_, size = up(length(d), kKeys) * width_;
        const bool is_prefix = a_.prefix && d == 0;
        if (is_prefix) own = lead;
        else std::fill(own, own + 2 * size, 0.0f);
        for (int64_t head = kv * group(); head < (kv + 1) * group(); ++head)
            for (int64_t start = 0; start < length(d); start += kQueries)
                differentiate_tile(d, head, start, lead, lead + shared, own, own + size, scratch);
        if (!is_prefix) write_keys(begin(d), length(d), kv, own, own + size);
    }

    void differentiate_tile(int64_t d, int64_t head, int64_t start, float* lead_k, float* lead_v, float* own_k,
                            float* own_v, float* scratch) const {
        float *q = scratch, *grad = q + kQueries * width_, *grad_q = grad + kQueries * width_;
        float *p = grad_q + kQueries * width_, *grad_p = p + kQueries * kKeys;
        const int64_t count = std::min(kQueries, length(d) - start), token = begin(d) + start, wide = width_ / kLanes;
        float delta[kQueries];
        widen_tile(a_.out, token, head, count, 1, grad_q);  // only lent, for delta = rowsum(grad * out)
        widen_tile(a_.grad, token, head, count, 1, grad);
        widen_tile(a_.q, token, head, count, scale_, q);
        for (int64_t r = 0; r < count; ++r) {
            Lanes products = Lanes{};
            for (int64_t i = 0; i < width_; i += kLanes)
                products += load(grad + r * width_ + i) * load(grad_q + r * width_ + i);
            delta[r] = sum(products);
        }
        std::fill(grad_q, grad_q + kQueries * width_, 0.0f);
        over_blocks(d, start + count - 1, [&](const Block& block) {
            const int64_t n = vectors(block, start + count - 1), from = at(head / group(), block.index);
            multiply<false>(count, n, a_.width, q, width_, 1, keys_t_ + from, kKeys, p, kKeys);
            multiply<false>(count, n, a_.width, grad, width_, 1, values_t_ + from, kKeys, grad_p, kKeys);
            for (int64_t r = 0; r < count; ++r) {
                const float lse = a_.logsumexp[(token + r) * a_.n_heads + head];
                const int64_t visible = seen(block, start + r);
                for (int64_t v = 0; v < n; ++v) {
                    float *x = p + r * kKeys + v * kLanes, *y = grad_p + r * kKeys + v * kLanes;
                    const Lanes weight = masked(exponential(load(x) - lse), v, visible, 0);
                    store(x, weight);
                    store(y, weight * (load(y) - delta[r]));
                }
            }
            const int64_t to = (block.start < 0 ? block.start + a_.prefix : block.start) * width_;
            float *grad_v = (block.start < 0 ? lead_v : own_v) + to, *grad_k = (block.start < 0 ? lead_k : own_k) + to;
            multiply<true>(n * kLanes, wide, count, p, 1, kKeys, grad, width_, grad_v, width_);
            multiply<true>(n * kLanes, wide, count, grad_p, 1, kKeys, q, width_, grad_k, width_);
            multiply<true>(count, wide, n * kLanes, grad_p, kKeys, 1, keys_ + from, width_, grad_q, width_);
        });
        for (int64_t r = 0; r < count; ++r)
            narrow_row(grad_q + r * width_, a_.width, scale_,
                       static_cast<T*>(a_.grad_q) + ((token + r) * a_.n_heads + head) * a_.width);
    }

    void write_keys(int64_t token, int64_t count, int64_t kv, const float* grad_k, const float* grad_v) const {
        for (int64_t j = 0; j < count; ++j) {
            const int64_t to = ((token + j) * a_.n_kv_heads + kv) * a_.width;
            narrow_row(grad_k + j * width_, a_.width, 1, static_cast<T*>(a_.grad_k) + to);
            narrow_row(grad_v + j * width_, a_.width, 1, static_cast<T*>(a_.grad_v) + to);
        }
    }

    int64_t group() const { return a_.n_heads / a_.n_kv_heads; }

    const Attention& a_;
    const bool backward_;
    const int64_t width_;
    const float scale_;
    std::vector<int64_t> first_block_, order_;  // [documents + 1]; documents, longest first
    float *keys_ = nullptr, *keys_t_ = nullptr, *values_ = nullptr, *values_t_ = nullptr;
};

}  // namespace

extern "C" void arriero_attention_forward(const Attention* a) {
    a->bf16 ? Packed<bf16>(*a, false).forward() : Packed<float>(*a, false).forward();
}

extern "C" void arriero_attention_backward(const Attention* a) {
    a->bf16 ? Packed<bf16>(*a, true).backward() : Packed<float>(*a, true).backward();
}
