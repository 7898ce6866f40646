// One decode step of a Llama on a CPU: token ids in, logits out, nothing allocated that grows with the model.
//
// Decoding reads every weight once for each token and does two flops with it, so the only thing that matters is
// that the reading never stops, and how much there is to read. Hence: rows dealt out to the threads as they come
// free, one barrier between phases, fp32 sums, and weights either as the model has them or, bf16 ones, packed into
// twelve bits with no loss. n sequences may step at once: their weights are read once.
// Compiled on first use by kernels.py, which describes the calls; slow twin: Llama.forward with a KVCache.
//
// Shapes: n sequences in this step, D model width, H heads, K KV heads, h head width, F FFN width, V vocabulary,
// S cache capacity. Vectors are the compilers' own extension: AVX-512, AVX2 and NEON come from one source.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr int64_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(64)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t IntLanes __attribute__((vector_size(64)));
typedef uint32_t WideLanes __attribute__((vector_size(64)));
typedef uint16_t HalfLanes __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef uint8_t HalfBytes __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

inline Lanes load_lanes(const float* p) {
    Lanes lanes;
    std::memcpy(&lanes, p, sizeof lanes);
    return lanes;
}

// How weights of one type are widened 64 bytes at a time. Sixteen 32-bit words hold 32 bf16 values, and a shift and
// a mask widen them, the even ones in one vector and the odd ones in another: no shuffle. So what they are multiplied
// with is kept in the same order: value j lies at `place(j, width)`; the ends that fill no 64 bytes stay in order.
template <class W>
struct Chunk;

template <>
struct Chunk<float> {
    using Stored = float;
    static constexpr int64_t parts = 1, values = 16;
    static void load(const float* p, Lanes (&out)[1]) { out[0] = load_lanes(p); }
    static int64_t place(int64_t j, int64_t) { return j; }
};

template <>
struct Chunk<bf16> {
    using Stored = bf16;
    static constexpr int64_t parts = 2, values = 32;
    static void widen(WideLanes pairs, Lanes* out) {
        out[0] = (Lanes)(pairs << 16);
        out[1] = (Lanes)(pairs & 0xffff0000u);
    }
    static void load(const bf16* p, Lanes (&out)[2]) {
        WideLanes pairs;
        std::memcpy(&pairs, p, sizeof pairs);
        widen(pairs, out);
    }
    static int64_t place(int64_t j, int64_t width) {
        return j < width / 32 * 32 ? j / 32 * 32 + j % 2 * 16 + j % 32 / 2 : j;
    }
};

inline void store(float* p, Lanes lanes) { std::memcpy(p, &lanes, sizeof lanes); }

inline float widen(float x) { return x; }

inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void narrow(float x, float* to) { *to = x; }

inline void narrow(float x, bf16* to) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    to->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float sum(Lanes lanes) {
    Eight half[2];
    std::memcpy(half, &lanes, sizeof half);
    half[0] += half[1];
    Four quarter[2];
    std::memcpy(quarter, half, sizeof quarter);
    quarter[0] += quarter[1];
    return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

// e^x, relative error below 3e-7 on [-87, 88], clamped outside: 2^whole * 2^part with |part| <= 1/2.
inline Lanes exponential(Lanes x) {
    x = x < -87.0f ? Lanes{} - 87.0f : x;
    x = x > 88.0f ? Lanes{} + 88.0f : x;
    const Lanes magic = Lanes{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const Lanes shifted = x * 1.44269504f + magic;
    const Lanes whole = shifted - magic;
    const Lanes part = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // x - whole * ln 2, in two parts
    Lanes series = part * (1.0f / 720) + 1.0f / 120;
    series = series * part + 1.0f / 24;
    series = series * part + 1.0f / 6;
    series = series * part + 0.5f;
    series = series * part + 1.0f;
    series = series * part + 1.0f;
    return (Lanes)((IntLanes)series + (__builtin_convertvector(whole, IntLanes) << 23));
}

template <class Function>
void map_lanes(float* x, int64_t width, Function function) {  // x = function(x), in place
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(x + i, function(load_lanes(x + i)));
    if (i < width) {
        float rest[kLanes] = {};
        std::copy(x + i, x + width, rest);
        store(rest, function(load_lanes(rest)));
        std::copy(rest, rest + (width - i), x + i);
    }
}

// Weights are read once and in order, and yet the hardware's prefetcher alone leaves a fifth of the bandwidth unused.
// They pass through the first-level cache only (hint 0), for nothing reads them again in this step.
constexpr int64_t kAhead = 3072;  // bytes

// The inner products of R rows of w [R, width] with N rows of x [N, width], x in the order of Chunk<W>.
template <int R, int N, class W>
inline void dots(const W* w, const float* x, int64_t width, float (&out)[R][N]) {
    constexpr int64_t parts = Chunk<W>::parts;
    Lanes sums[R][N][parts] = {};
    int64_t j = 0;
    for (; j + Chunk<W>::values <= width; j += Chunk<W>::values)
        for (int r = 0; r < R; ++r) {
            Lanes wide[parts];
            Chunk<W>::load(w + r * width + j, wide);
            const W* here = w + r * width + j;
            N > 1 ? __builtin_prefetch(here + R * width) : __builtin_prefetch((const char*)here + kAhead, 0, 0);
            for (int n = 0; n < N; ++n)
                for (int p = 0; p < parts; ++p)
                    sums[r][n][R * N > 4 ? 0 : p] += wide[p] * load_lanes(x + n * width + j + p * kLanes);
        }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) {
            out[r][n] = sum(sums[r][n][0]) + (parts > 1 ? sum(sums[r][n][parts - 1]) : 0);
            for (int64_t rest = j; rest < width; ++rest) out[r][n] += widen(w[r * width + rest]) * x[n * width + rest];
        }
}

template <int R, int N, class W, class Emit>
inline int64_t emit_dots(const W* w, int64_t row, const float* x, int64_t i, int64_t n, int64_t width, Emit emit) {
    float out[R][N];
    for (; i + N <= n; i += N) {
        dots<R, N>(w + row * width, x + i * width, width, out);
        for (int r = 0; r < R; ++r)
            for (int k = 0; k < N; ++k) emit(row + r, i + k, out[r][k]);
    }
    return i;
}

// emit(row, i, w[row] . x[i]) for rows begin..end of w [rows, width] and all i of x [n, width]. One sequence: row after
// row, for the prefetcher follows few streams (four rows side by side halve the bandwidth). Many sequences are bound
// by loads of x as well, so two rows share them, and the next two are fetched by hand.
template <class W, class Emit>
void multiply(const W* w, int64_t begin, int64_t end, const float* x, int64_t n, int64_t width, Emit emit) {
    int64_t row = begin;
    if (n >= 4)
        for (; row + 2 <= end; row += 2) {
            const int64_t i = emit_dots<2, 8>(w, row, x, 0, n, width, emit);
            emit_dots<2, 1>(w, row, x, i, n, width, emit);
        }
    for (; row < end; ++row) emit_dots<1, 1>(w, row, x, 0, n, width, emit);
}

// A bf16 matrix at twelve bits a weight, bit for bit the same. The high byte of a bf16 value is its sign and all but
// the last bit of its exponent, and a trained matrix uses few of them: fifteen make up all but one weight in five
// thousand. So the low byte is kept as it is, and the high byte as the four bits of its place in a table. Code 0
// stands for 0, and for a rare weight, which reads as zero there and is listed beside its row with its value.
// (Three bits would leave three weights in a hundred out, and listing these costs what the bit saves.)
struct Packed {
    struct alignas(32) Block {  // 64 weights: 16-bit word i has the low bytes of weights 32 + i and i, byte i their codes
        uint16_t low[32];
        uint8_t codes[32];
    };
    struct Rare {
        uint32_t place;  // in x, in the order of Chunk<bf16>
        bf16 value;
    };
    static constexpr int64_t width = 64;  // weights in a block

    const bf16* plain;           // the matrix itself
    const Block* blocks;         // [rows, width / 64]; null where packing does not pay: then `plain` is read
    Bytes table;                 // code -> high byte, four times over
    std::vector<Rare> rare;      // row after row
    std::vector<uint32_t> ends;  // [1 + rows] of the rows in `rare`; the first is 0
};

template <>
struct Chunk<Packed> : Chunk<bf16> {};

inline Bytes lookup(Bytes table, Bytes codes) {
#if defined(__AVX512BW__)
    return (Bytes)_mm512_shuffle_epi8((__m512i)table, (__m512i)codes);
#elif defined(__AVX2__)
    __m256i from[2], at[2];
    std::memcpy(from, &table, sizeof table);
    std::memcpy(at, &codes, sizeof codes);
    for (int i = 0; i < 2; ++i) at[i] = _mm256_shuffle_epi8(from[i], at[i]);
    std::memcpy(&codes, at, sizeof codes);
    return codes;
#elif defined(__aarch64__)
    uint8x16_t from[4], at[4];
    std::memcpy(from, &table, sizeof table);
    std::memcpy(at, &codes, sizeof codes);
    for (int i = 0; i < 4; ++i) at[i] = vqtbl1q_u8(from[i], at[i]);
    std::memcpy(&codes, at, sizeof codes);
    return codes;
#else
    for (int i = 0; i < 64; ++i) codes[i] = table[codes[i]];
    return codes;
#endif
}

inline void unpack(const Packed::Block& block, Bytes table, Lanes (&out)[4]) {  // as two loads of Chunk<bf16>
    HalfLanes low;
    HalfBytes codes;
    std::memcpy(&low, block.low, sizeof low);
    std::memcpy(&codes, block.codes, sizeof codes);
    const HalfLanes both = __builtin_convertvector(codes, HalfLanes);  // 16 bits: 0, 0, code of i, code of 32 + i
    const HalfLanes high = (HalfLanes)lookup(table, (Bytes)((both | both << 4) & 0x0f0f));
    Chunk<bf16>::widen((WideLanes)(low >> 8 | (high & 0xff00)), out);
    Chunk<bf16>::widen((WideLanes)((low & 0x00ff) | high << 8), out + 2);
}

constexpr uint8_t kRare = 16;  // what stands beside the codes of the table while packing

void choose_table(const bf16* w, int64_t rows, int64_t width, uint8_t (&table)[16], uint8_t (&code_of)[256]) {
    int64_t counts[256] = {};
    for (int64_t row = 0; row < rows; row += 16)  // a sixteenth of the rows will tell
        for (int64_t j = 0; j < width; ++j) ++counts[w[row * width + j].bits >> 8];
    std::fill(code_of + 1, code_of + 256, kRare);
    for (int code = 1; code < 16; ++code) {
        const auto most = std::max_element(counts + 1, counts + 256);
        table[code] = uint8_t(most - counts);
        code_of[table[code]] = uint8_t(code);
        *most = -1;
    }
}

Packed* pack(const bf16* w, int64_t rows, int64_t width, Packed::Block* block) {
    Packed* out = new Packed{w, block, {}, {}, {0}};
    uint8_t table[16] = {}, code_of[256] = {};
    choose_table(w, rows, width, table, code_of);
    for (int i = 0; i < 64; ++i) out->table[i] = table[i % 16];
    for (int64_t row = 0; row < rows; ++row, w += width) {
        for (int64_t j = 0; j < width; j += Packed::width, ++block) {
            uint16_t bits[64];
            uint8_t codes[64], any = 0;
            std::memcpy(bits, w + j, sizeof bits);
            for (int i = 0; i < 64; ++i) any |= codes[i] = code_of[bits[i] >> 8];
            for (int i = 0; any >= kRare && i < 64; ++i)
                if (codes[i] == kRare) {
                    out->rare.push_back({uint32_t(Chunk<bf16>::place(j + i, width)), {bits[i]}});
                    codes[i] = 0, bits[i] = 0;
                }
            for (int i = 0; i < 32; ++i) {
                block->low[i] = uint16_t(bits[i] << 8 | (bits[32 + i] & 0xff));
                block->codes[i] = uint8_t(codes[i] << 4 | codes[32 + i]);
            }
        }
        out->ends.push_back(uint32_t(out->rare.size()));
    }
    if (int64_t(out->rare.size()) > rows * width / 128) out->blocks = nullptr;  // at eight bytes each it does not pay
    return out;
}

inline float dot(const Packed& w, int64_t row, const float* x, int64_t width) {
    const Packed::Block* block = &w.blocks[row * width / Packed::width];
    const Bytes table = w.table;
    Lanes sums[4] = {};
    for (int64_t j = 0; j < width; j += Packed::width, ++block) {
        __builtin_prefetch((const char*)block + kAhead, 0, 0);
        __builtin_prefetch((const char*)block + kAhead + 64, 0, 0);
        Lanes wide[4];
        unpack(*block, table, wide);
        for (int p = 0; p < 4; ++p) sums[p] += wide[p] * load_lanes(x + j + p * kLanes);
    }
    float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (uint32_t i = w.ends[row]; i < w.ends[row + 1]; ++i) total += widen(w.rare[i].value) * x[w.rare[i].place];
    return total;
}

template <class Emit>
void multiply(const Packed* w, int64_t begin, int64_t end, const float* x, int64_t n, int64_t width, Emit emit) {
    if (!w->blocks) return multiply(w->plain, begin, end, x, n, width, emit);
    for (int64_t row = begin; row < end; ++row)
        for (int64_t i = 0; i < n; ++i) emit(row, i, dot(*w, row, x + i * width, width));
}

// out = sum over s of p[s] * v[s, :], v [length, width], out in the order of Chunk<T>.
template <class T>
void weigh(const float* p, const T* v, int64_t length, int64_t width, float* out) {
    constexpr int64_t parts = Chunk<T>::parts;
    int64_t column = 0;
    for (; column + Chunk<T>::values <= width; column += Chunk<T>::values) {
        Lanes sums[parts] = {};
        for (int64_t s = 0; s < length; ++s) {
            Lanes values[parts];
            Chunk<T>::load(v + s * width + column, values);
            for (int i = 0; i < parts; ++i) sums[i] += p[s] * values[i];
        }
        for (int i = 0; i < parts; ++i) store(out + column + i * kLanes, sums[i]);
    }
    for (; column < width; ++column) {
        out[column] = 0;
        for (int64_t s = 0; s < length; ++s) out[column] += p[s] * widen(v[s * width + column]);
    }
}

void softmax(float* scores, int64_t length) {
    const float highest = *std::max_element(scores, scores + length);
    map_lanes(scores, length, [=](Lanes x) { return exponential(x - highest); });
    double total = 0;
    for (int64_t s = 0; s < length; ++s) total += scores[s];
    const float scale = float(1 / total);
    for (int64_t s = 0; s < length; ++s) scores[s] *= scale;
}

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

// Threads that live for one step. Every phase is one `share`: items are taken one by one, then all wait.
class Team {
  public:
    explicit Team(int64_t threads) : threads_(threads) {}

    template <class Work>
    void share(int64_t items, Work work) {
        for (int64_t item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < items;) work(item);
        const int64_t phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int64_t spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins)
            spins < 10000 ? relax() : std::this_thread::yield();  // yield: the core may be wanted by others
    }

    // The same, in runs of `size` out of `total`: work(begin, end).
    template <class Work>
    void share_runs(int64_t total, int64_t size, Work work) {
        share((total + size - 1) / size,
              [&](int64_t item) { work(item * size, std::min(total, (item + 1) * size)); });
    }

  private:
    const int64_t threads_;
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int64_t> arrived_{0};
    alignas(64) std::atomic<int64_t> phase_{0};
};

extern "C" struct Layer {
    const void *q, *k, *v, *o;                 // [H*h, D], [K*h, D], [K*h, D], [D, H*h]
    const void *gate, *up, *down;              // [F, D], [F, D], [D, F]
    const float *attention_norm, *ffn_norm;    // [D]
};

enum Weights : int64_t { kFloat, kBf16, kPacked };  // what the pointers of Layer and `head` point to

extern "C" struct Step {
    int64_t dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, vocab_size;
    double norm_eps, rope_attention;  // the second: what sines and cosines are multiplied by
    const Layer* layers;
    const void *embedding, *head;  // [V, D]; the embedding is never packed
    const float *norm, *frequencies;  // [D], [h/2]
    void *keys, *values;  // [L, cache_rows, K, S, h]
    int64_t cache_rows, capacity, n;
    const int64_t *tokens, *rows, *positions;  // [n]
    float* logits;  // [n, V]
    int64_t threads, bf16_cache;
    Weights weights;
};

// Weight rows a thread takes at a time: tens of kilobytes, long enough to prefetch, and whole chunks of `place`.
constexpr int64_t kRun = 96;

template <class W, class C>
class Decode {
  public:
    Decode(const Step& step)
        : s_(step), team_(step.threads), q_width_(s_.n_heads * s_.head_dim), kv_width_(s_.n_kv_heads * s_.head_dim),
          x_(s_.n * s_.dim), normed_(s_.n * s_.dim), q_(s_.n * q_width_), k_(s_.n * kv_width_), v_(s_.n * kv_width_),
          mixed_(s_.n * q_width_), hidden_(s_.n * s_.ffn_dim), turns_(s_.n * s_.head_dim) {}

    void run() {
        std::vector<std::thread> others;
        for (int64_t i = 1; i < s_.threads; ++i) others.emplace_back([this] { work(); });
        work();
        for (auto& other : others) other.join();
    }

  private:
    void work() {  // what every thread does
        std::vector<float> scratch(2 * s_.head_dim + 1 + *std::max_element(s_.positions, s_.positions + s_.n));
        team_.share(s_.n, [&](int64_t i) {
            const auto* from = static_cast<const typename Chunk<W>::Stored*>(s_.embedding) + s_.tokens[i] * s_.dim;
            for (int64_t d = 0; d < s_.dim; ++d) x_[i * s_.dim + d] = widen(from[d]);
            for (int64_t d = 0; d < s_.head_dim / 2; ++d) {
                const float angle = float(s_.positions[i]) * s_.frequencies[d];
                turns_[i * s_.head_dim + 2 * d] = std::cos(angle) * float(s_.rope_attention);
                turns_[i * s_.head_dim + 2 * d + 1] = std::sin(angle) * float(s_.rope_attention);
            }
        });
        for (int64_t l = 0; l < s_.n_layers; ++l) {
            const Layer& layer = s_.layers[l];
            normalise(layer.attention_norm);
            project(layer);
            team_.share(s_.n, [&](int64_t i) { rotate_and_store(l, i); });
            team_.share(s_.n * s_.n_heads, [&](int64_t j) { attend(l, j / s_.n_heads, j % s_.n_heads, scratch.data()); });
            add_linear(layer.o, mixed_.data(), q_width_);
            normalise(layer.ffn_norm);
            feed_forward(layer);
            add_linear(layer.down, hidden_.data(), s_.ffn_dim);
        }
        normalise(s_.norm);
        team_.share_runs(s_.vocab_size, 4 * kRun, [&](int64_t begin, int64_t end) {
            linear(s_.head, begin, end, s_.dim, normed_.data(), s_.logits, s_.vocab_size);
        });
    }

    void linear(const void* w, int64_t begin, int64_t end, int64_t width, const float* x, float* y, int64_t stride) {
        multiply(static_cast<const W*>(w), begin, end, x, s_.n, width,
                 [=](int64_t row, int64_t i, float value) { y[i * stride + row] = value; });
    }

    void add_linear(const void* w, const float* from, int64_t width) {  // x += w from
        team_.share_runs(s_.dim, kRun, [&](int64_t begin, int64_t end) {
            multiply(static_cast<const W*>(w), begin, end, from, s_.n, width,
                     [&](int64_t row, int64_t i, float value) { x_[i * s_.dim + row] += value; });
        });
    }

    void normalise(const float* weight) {  // RMSNorm
        team_.share(s_.n, [&](int64_t i) {
            const float* x = &x_[i * s_.dim];
            float square[1][1];
            dots<1, 1>(x, x, s_.dim, square);
            const float scale = float(1 / std::sqrt(square[0][0] / s_.dim + s_.norm_eps));
            for (int64_t d = 0; d < s_.dim; ++d)
                normed_[i * s_.dim + Chunk<W>::place(d, s_.dim)] = weight[d] * (x[d] * scale);
        });
    }

    void project(const Layer& layer) {  // q, k and v dealt out as one list of rows
        const int64_t q_runs = (q_width_ + kRun - 1) / kRun, kv_runs = (kv_width_ + kRun - 1) / kRun;
        team_.share(q_runs + 2 * kv_runs, [&](int64_t run) {
            const bool is_q = run < q_runs, is_k = run < q_runs + kv_runs;
            const int64_t rows = is_q ? q_width_ : kv_width_;
            const int64_t begin = (is_q ? run : (run - q_runs) % kv_runs) * kRun;
            linear(is_q ? layer.q : is_k ? layer.k : layer.v, begin, std::min(rows, begin + kRun), s_.dim,
                   normed_.data(), (is_q ? q_ : is_k ? k_ : v_).data(), rows);
        });
    }

    int64_t cache_offset(int64_t layer, int64_t i, int64_t kv_head) const {
        return ((layer * s_.cache_rows + s_.rows[i]) * s_.n_kv_heads + kv_head) * s_.capacity * s_.head_dim;
    }

    void rotate(float* head, int64_t i) const {  // RoPE: the halves of a head turn against each other
        const int64_t half = s_.head_dim / 2;
        for (int64_t d = 0; d < half; ++d) {
            const float c = turns_[i * s_.head_dim + 2 * d], s = turns_[i * s_.head_dim + 2 * d + 1];
            const float a = head[d], b = head[d + half];
            head[d] = a * c - b * s;
            head[d + half] = b * c + a * s;
        }
    }

    void rotate_and_store(int64_t layer, int64_t i) {
        const int64_t h = s_.head_dim;
        for (int64_t head = 0; head < s_.n_heads; ++head) rotate(&q_[i * q_width_ + head * h], i);
        for (int64_t head = 0; head < s_.n_kv_heads; ++head) {
            float* key = &k_[i * kv_width_ + head * h];
            const float* value = &v_[i * kv_width_ + head * h];
            rotate(key, i);
            const int64_t at = cache_offset(layer, i, head) + s_.positions[i] * h;
            for (int64_t d = 0; d < h; ++d) {
                narrow(key[d], static_cast<C*>(s_.keys) + at + d);
                narrow(value[d], static_cast<C*>(s_.values) + at + d);
            }
        }
    }

    void attend(int64_t layer, int64_t i, int64_t head, float* scratch) {  // softmax(q k^T / sqrt(h)) v of one head
        const int64_t at = cache_offset(layer, i, head / (s_.n_heads / s_.n_kv_heads));
        const int64_t length = s_.positions[i] + 1, h = s_.head_dim;
        float *query = scratch, *answer = scratch + h, *scores = scratch + 2 * h;
        for (int64_t d = 0; d < h; ++d)
            query[Chunk<C>::place(d, h)] = q_[i * q_width_ + head * h + d] / std::sqrt(float(h));
        multiply(static_cast<const C*>(s_.keys) + at, 0, length, query, 1, h,
                 [=](int64_t row, int64_t, float value) { scores[row] = value; });
        softmax(scores, length);
        weigh(scores, static_cast<const C*>(s_.values) + at, length, h, answer);
        for (int64_t d = 0; d < h; ++d)
            mixed_[i * q_width_ + Chunk<W>::place(head * h + d, q_width_)] = answer[Chunk<C>::place(d, h)];
    }

    void feed_forward(const Layer& layer) {  // hidden = silu(gate x) * (up x)
        const int64_t width = s_.ffn_dim;
        team_.share_runs(width, kRun, [&](int64_t begin, int64_t end) {
            multiply(static_cast<const W*>(layer.gate), begin, end, normed_.data(), s_.n, s_.dim,
                     [&](int64_t row, int64_t i, float x) { hidden_[i * width + Chunk<W>::place(row, width)] = x; });
            for (int64_t i = 0; i < s_.n; ++i)
                map_lanes(&hidden_[i * width + begin], end - begin,
                          [](Lanes x) { return x / (1.0f + exponential(-x)); });
            multiply(static_cast<const W*>(layer.up), begin, end, normed_.data(), s_.n, s_.dim,
                     [&](int64_t row, int64_t i, float x) { hidden_[i * width + Chunk<W>::place(row, width)] *= x; });
        });
    }

    const Step& s_;
    Team team_;
    const int64_t q_width_, kv_width_;
    std::vector<float> x_, normed_, q_, k_, v_, mixed_, hidden_, turns_;
};

}  // namespace

// Pack matrix [rows, width] into blocks [rows * width * 3 / 2 bytes]; both must outlive what is returned. width must be
// a multiple of 64, or blocks null: the matrix then stays as it is.
extern "C" Packed* arriero_pack(const bf16* matrix, int64_t rows, int64_t width, Packed::Block* blocks) {
    return blocks ? pack(matrix, rows, width, blocks) : new Packed{matrix, nullptr, {}, {}, {}};
}

extern "C" void arriero_free_packed(Packed* packed) { delete packed; }

// The way back: the weights into out [rows, width], through what the step itself uses.
extern "C" void arriero_unpack(const Packed* packed, int64_t rows, int64_t width, bf16* out) {
    if (!packed->blocks) return void(std::copy(packed->plain, packed->plain + rows * width, out));
    std::vector<bf16> in_place(width);
    for (int64_t row = 0; row < rows; ++row, out += width) {
        for (int64_t j = 0; j < width; j += Packed::width) {
            Lanes wide[4];
            unpack(packed->blocks[(row * width + j) / Packed::width], packed->table, wide);
            for (int64_t i = 0; i < Packed::width; ++i) narrow(wide[i / kLanes][i % kLanes], &in_place[j + i]);
        }
        for (uint32_t i = packed->ends[row]; i < packed->ends[row + 1]; ++i)
            in_place[packed->rare[i].place] = packed->rare[i].value;
        for (int64_t j = 0; j < width; ++j) out[j] = in_place[Chunk<bf16>::place(j, width)];
    }
}

namespace {

template <class W>
void run_step(const Step& step) {
    step.bf16_cache ? Decode<W, bf16>(step).run() : Decode<W, float>(step).run();
}

}  // namespace

extern "C" void arriero_decode_step(const Step* step) {
    switch (step->weights) {
        case kFloat: return run_step<float>(*step);
        case kBf16: return run_step<bf16>(*step);
        case kPacked: return run_step<Packed>(*step);
    }
}
