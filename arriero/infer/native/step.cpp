// One step of a Llama on a CPU: some tokens of some sequences in, the logits that are wanted out.
//
// Every value of a token is computed by the same functions in the same order, whatever else is in the step: linear.h has
// the products, attention.h the attention. A token's logits are therefore the same bits alone and in any batch, with its
// prompt in one piece or in many, on one thread or several. Between products everything is fp32; what goes into a product
// is rounded once, to what its weights ask for.
// Compiled on first use by step.py, which describes the call; slow twin: torch_step.py.
//
// Shapes: n tokens of the step, D model width, H heads, K KV heads, h head width, F FFN width, V vocabulary.

#include "attention.h"
#include "team.h"

namespace {

enum Place : int64_t { kQ, kK, kV, kO, kGate, kUp, kDown, kPlaces };

extern "C" struct Adapter {  // of one matrix: y += b (a x); rank 0: none
    int64_t rank;
    const float *a, *b;  // [rank, in padded to 32]; panels [out / 32][rank][32], the scale in them
};

extern "C" struct Layer {
    Matrix matrices[kPlaces];
    const float *attention_norm, *ffn_norm;  // [D]
};

extern "C" struct Model {
    int64_t dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, vocab_size;
    double norm_eps, rope_attention;  // the second: what sines and cosines are multiplied by
    const Layer* layers;
    Matrix head;
    const void* embedding;            // [V, D], fp32 or bf16; null: it is the head
    int64_t embedding_bf16;
    const float *norm, *frequencies;  // [D], [h / 2]
    void *keys, *values;              // [L] layers of blocks, see attention.h
    int64_t n_blocks, cache_bf16;
};

extern "C" struct Batch {
    int64_t n, table_width, n_outputs;
    const int64_t* tokens;                // [n]
    const int32_t *positions, *sequences; // [n]
    const int32_t* tables;                // [sequences, table_width]
    const int32_t* outputs;               // [n_outputs], which tokens' logits are wanted
    const Adapter* const* adapters;       // [n], each null or [L, kPlaces]
    int64_t any_adapter;
    float* logits;                        // [n_outputs, V]
};

struct Engine {
    explicit Engine(int64_t threads) : team(threads) {}
    Team team;
    Buffer<float> x, normed, q, k, v, mixed, hidden, turns, rounded, scales, low, chunks;
    Buffer<bf16> halves;
    Buffer<int8_t> codes;
    Buffer<int32_t> offsets;
    Buffer<Part> parts;
};

constexpr int64_t kPhasesOfLayer = 16;  // at most

// How a product is cut into items for the threads: a panel and up to 256 rows, so that all threads end at about the same
// time. (Weights of a panel, and these rows, stay in a core's caches meanwhile.)
struct Tiling {
    static constexpr int64_t rows_of_item = 256;
    int64_t n, panels;
    Tiling(const Matrix& m, int64_t n) : n(n), panels((m.out + kPanel - 1) / kPanel) {}
    int64_t items() const { return panels * ((n + rows_of_item - 1) / rows_of_item); }
    template <class Emit>
    void multiply_item(const Matrix& m, const Rows& x, int64_t item, Emit emit) const {
        const int64_t panel = item % panels, begin = item / panels * rows_of_item;
        multiply(m, panel, x, begin, std::min(n, begin + rows_of_item), [&](int64_t row, float* y) { emit(panel, row, y); });
    }
};

template <class C>
class Step {
  public:
    Step(Engine& e, const Model& m, const Batch& b)
        : e_(e), m_(m), b_(b), n_(b.n), padded_(up(b.n, kRowPadding)), q_width_(m.n_heads * m.head_dim),
          kv_width_(m.n_kv_heads * m.head_dim), dim_(up(m.dim, kGroup)), ffn_(up(m.ffn_dim, kGroup)),
          mixed_width_(up(q_width_, kGroup)), group_(m.n_heads / m.n_kv_heads), head_(up(m.head_dim, kLanes)),
          x_(e.x.get(n_ * m.dim)), normed_(e.normed.get(n_ * dim_)), q_(e.q.get(n_ * q_width_)),
          k_(e.k.get(n_ * kv_width_)), v_(e.v.get(n_ * kv_width_)), mixed_(e.mixed.get(n_ * mixed_width_)),
          hidden_(e.hidden.get(n_ * ffn_)), turns_(e.turns.get(n_ * m.head_dim)) {
        const int64_t widest = std::max({dim_, ffn_, mixed_width_});
        halves_ = e.halves.get(padded_ * widest), rounded_ = e.rounded.get(padded_ * widest);
        codes_ = e.codes.get(2 * padded_ * widest);
        scales_ = e.scales.get(padded_ * widest / kGroup), offsets_ = e.offsets.get(padded_ * widest / kGroup);
        chunks_of_ = 1;
        for (int64_t i = 0; i < n_; ++i) chunks_of_ = std::max(chunks_of_, b.positions[i] / kChunk + 1);
        split_ = chunks_of_ > 1 && n_ * m.n_kv_heads < 4 * e.team.threads();
        if (split_) {
            chunks_ = e.chunks.get(n_ * m.n_heads * chunks_of_ * head_);
            parts_ = e.parts.get(n_ * m.n_heads * chunks_of_);
        }
        if (b.any_adapter) {
            for (int64_t i = 0; i < n_; ++i)
                for (int64_t j = 0; b.adapters[i] && j < m.n_layers * kPlaces; ++j)
                    rank_ = std::max(rank_, b.adapters[i][j].rank);
            low_ = e.low.get(n_ * 3 * rank_);
        }
    }

    void run() {
        e_.team.run(kPhasesOfLayer * m_.n_layers + 8, [this] {
            const Arithmetic arithmetic;
            work();
        });
    }

  private:
    template <class Work>
    void share(int64_t items, Work work) {
        e_.team.share(items, work);
    }

    void work() {  // what every thread does
        share(n_, [&](int64_t i) { begin(i); });
        for (int64_t l = 0; l < m_.n_layers; ++l) {
            const Layer& layer = m_.layers[l];
            normalise(layer.attention_norm, layer.matrices + kQ, 3, n_, nullptr);
            float* const to[] = {q_, k_, v_};
            products(layer, kQ, 3, normed_, dim_, [&](int64_t place, int64_t row, int64_t o, int64_t count, float* y) {
                std::memcpy(to[place] + row * (place == kQ ? q_width_ : kv_width_) + o, y, size_t(count) * 4);
            });
            share(n_, [&](int64_t i) { rotate_and_store(l, i); });
            attend(l);
            prepare(mixed_, mixed_width_, layer.matrices + kO, 1);
            products(layer, kO, 1, mixed_, mixed_width_, add_to_x());
            normalise(layer.ffn_norm, layer.matrices + kGate, 2, n_, nullptr);
            feed_forward(layer);
            prepare(hidden_, ffn_, layer.matrices + kDown, 1);
            products(layer, kDown, 1, hidden_, ffn_, add_to_x());
        }
        normalise(m_.norm, &m_.head, 1, b_.n_outputs, b_.outputs);
        const Rows rows = forms(normed_, dim_);
        product(m_.head, rows, b_.n_outputs, [&](int64_t row, int64_t o, int64_t count, float* y) {
            std::memcpy(b_.logits + row * m_.vocab_size + o, y, size_t(count) * 4);
        });
    }

    auto add_to_x() {
        return [this](int64_t, int64_t row, int64_t o, int64_t count, float* y) {
            float* x = x_ + row * m_.dim + o;
            for (int64_t j = 0; j < count; ++j) x[j] += y[j];
        };
    }

    void begin(int64_t i) {  // a token's embedding; sines and cosines of its position
        float* x = x_ + i * m_.dim;
        const int64_t token = b_.tokens[i];
        if (m_.embedding) {
            for (int64_t d = 0; d < m_.dim; ++d)
                x[d] = m_.embedding_bf16 ? widen(static_cast<const bf16*>(m_.embedding)[token * m_.dim + d])
                                         : static_cast<const float*>(m_.embedding)[token * m_.dim + d];
        } else {
            const int64_t at = token / kPanel * dim_ * kPanel, o = token % kPanel;
            for (int64_t d = 0; d < m_.dim; ++d)
                x[d] = m_.head.type == kFloat ? static_cast<const float*>(m_.head.data)[at + d * kPanel + o]
                                              : widen(weight_of(m_.head, at + d / 2 * 2 * kPanel + 2 * o + d % 2));
        }
        float* turn = turns_ + i * m_.head_dim;
        for (int64_t d = 0; d < m_.head_dim / 2; ++d) {
            const float angle = float(b_.positions[i]) * m_.frequencies[d];
            turn[d] = std::cos(angle) * float(m_.rope_attention);
            turn[m_.head_dim / 2 + d] = std::sin(angle) * float(m_.rope_attention);
        }
    }

    Rows forms(const float* floats, int64_t width) const {
        return {width, floats, halves_, rounded_, codes_, scales_, offsets_};
    }

    // Row i in the forms that these matrices take.
    void convert(const float* floats, int64_t width, const Matrix* matrices, int64_t count, int64_t i) {
        bool half = false, integer = false;
        for (int64_t j = 0; j < count; ++j)
            half |= is_half(matrices[j]), integer |= !is_half(matrices[j]) && matrices[j].type != kFloat;
        const float* x = floats + i * width;
        if (half)
            for (int64_t d = 0; d < width; d += kLanes) round(x + d, halves_ + i * width + d, rounded_ + i * width + d);
        if (integer) {
            const int64_t groups = width / kGroup;
            quantise(matrices->digits, x, width, codes_ + 2 * i * width, scales_ + i * groups, offsets_ + i * groups);
        }
    }

    void prepare(const float* floats, int64_t width, const Matrix* matrices, int64_t count) {
        share(n_, [&](int64_t i) { convert(floats, width, matrices, count, i); });
    }

    // RMSNorm of `rows` rows of x, those that `which` names or all, for these matrices.
    void normalise(const float* weight, const Matrix* matrices, int64_t count, int64_t rows, const int32_t* which) {
        share(rows, [&](int64_t i) {
            const float* x = x_ + (which ? which[i] : i) * m_.dim;
            float* to = normed_ + i * dim_;
            Lanes squares = {};
            int64_t d = 0;
            for (; d + kLanes <= m_.dim; d += kLanes) squares += load_lanes(x + d) * load_lanes(x + d);
            float square = sum(squares);
            for (; d < m_.dim; ++d) square += x[d] * x[d];
            const float scale = float(1 / std::sqrt(square / m_.dim + m_.norm_eps));
            for (d = 0; d < m_.dim; ++d) to[d] = weight[d] * (x[d] * scale);
            convert(normed_, dim_, matrices, count, i);
        });
    }

    // emit(row, first output, outputs, y): a product's results, 32 outputs of a row at a time.
    template <class Emit>
    void product(const Matrix& matrix, const Rows& rows, int64_t n, Emit emit) {
        const Tiling tiling(matrix, n);
        share(tiling.items(), [&](int64_t item) { one(matrix, rows, tiling, item, emit); });
    }

    template <class Emit>
    void one(const Matrix& matrix, const Rows& rows, const Tiling& tiling, int64_t item, Emit emit) {
        tiling.multiply_item(matrix, rows, item, [&](int64_t panel, int64_t row, float* y) {
            emit(row, panel * kPanel, std::min(kPanel, matrix.out - panel * kPanel), y);
        });
    }

    // The same for up to three matrices of a layer that take the same rows, with the adapters of each row.
    template <class Emit>
    void products(const Layer& layer, int64_t first, int64_t count, const float* floats, int64_t width, Emit emit) {
        lower(layer, first, count, floats, width);
        const Rows rows = forms(floats, width);
        int64_t ends[3], total = 0;
        for (int64_t j = 0; j < count; ++j) ends[j] = total += Tiling(layer.matrices[first + j], n_).items();
        share(total, [&](int64_t item) {
            int64_t j = 0;
            while (item >= ends[j]) ++j;
            const Matrix& matrix = layer.matrices[first + j];
            one(matrix, rows, Tiling(matrix, n_), item - (j ? ends[j - 1] : 0),
                [&](int64_t row, int64_t o, int64_t outputs, float* y) {
                    raise(layer, row, first, j, o / kPanel, y);
                    emit(first + j, row, o, outputs, y);
                });
        });
    }

    // What the adapters' first matrices make of the rows: low [n, 3, rank].
    void lower(const Layer& layer, int64_t first, int64_t count, const float* floats, int64_t width) {
        if (!b_.any_adapter) return;
        share(n_, [&](int64_t i) {
            if (!b_.adapters[i]) return;
            for (int64_t j = 0; j < count; ++j) {
                const Adapter& adapter = b_.adapters[i][(&layer - m_.layers) * kPlaces + first + j];
                for (int64_t r = 0; r < adapter.rank; ++r) {
                    Lanes sums = {};
                    for (int64_t d = 0; d < width; d += kLanes)
                        sums += load_lanes(adapter.a + r * width + d) * load_lanes(floats + i * width + d);
                    low_[(i * 3 + j) * rank_ + r] = sum(sums);
                }
            }
        });
    }

    void raise(const Layer& layer, int64_t row, int64_t first, int64_t j, int64_t panel, float* y) const {  // y [32] += b low
        if (!b_.any_adapter || !b_.adapters[row]) return;
        const Adapter& adapter = b_.adapters[row][(&layer - m_.layers) * kPlaces + first + j];
        const float* b = adapter.b + panel * adapter.rank * kPanel;
        const float* low = low_ + (row * 3 + j) * rank_;
        for (int64_t o = 0; o < kPanel; o += kLanes) {
            Lanes sums = {};
            for (int64_t r = 0; r < adapter.rank; ++r) sums += load_lanes(b + r * kPanel + o) * low[r];
            store(y + o, load_lanes(y + o) + sums);
        }
    }

    Paged<C> cache(int64_t layer) const {
        Paged<C> one{nullptr, nullptr, m_.n_kv_heads, m_.head_dim};
        one.keys = static_cast<C*>(m_.keys) + layer * m_.n_blocks * m_.n_kv_heads * one.size_of_keys();
        one.values = static_cast<C*>(m_.values) + layer * m_.n_blocks * m_.n_kv_heads * kBlock * one.padded();
        return one;
    }

    const int32_t* table(int64_t i) const { return b_.tables + b_.sequences[i] * b_.table_width; }

    void rotate(float* head, int64_t i) const {  // RoPE: the halves of a head turn against each other
        const int64_t half = m_.head_dim / 2;
        const float* turn = turns_ + i * m_.head_dim;
        for (int64_t d = 0; d < half; ++d) {
            const float c = turn[d], s = turn[half + d], a = head[d], b = head[d + half];
            head[d] = a * c - b * s;
            head[d + half] = b * c + a * s;
        }
    }

    void rotate_and_store(int64_t layer, int64_t i) {
        const int64_t h = m_.head_dim, slot = b_.positions[i] % kBlock;
        const Paged<C> paged = cache(layer);
        const int32_t block = table(i)[b_.positions[i] / kBlock];
        for (int64_t head = 0; head < m_.n_heads; ++head) rotate(q_ + i * q_width_ + head * h, i);
        for (int64_t head = 0; head < m_.n_kv_heads; ++head) {
            float* key = k_ + i * kv_width_ + head * h;
            rotate(key, i);
            write_key(paged, paged.keys_of(block, head), slot, key);
            C* to = paged.values_of(block, head) + slot * head_;
            for (int64_t d = 0; d < h; ++d) narrow(v_[i * kv_width_ + head * h + d], to + d);
        }
    }

    // softmax(q k^T / sqrt(h)) v. Few tokens with long pasts: their chunks are dealt out, and joined when all are done.
    void attend(int64_t layer) {
        const int64_t items = n_ * m_.n_kv_heads;
        if (!split_)
            return share(items, [&](int64_t item) {
                const int64_t i = item / m_.n_kv_heads, kv = item % m_.n_kv_heads;
                heads(kv, [&](auto count, int64_t head) {
                    constexpr int G = decltype(count)::value;
                    alignas(64) float out[G * kWidestHead], next[G * kWidestHead];
                    Part parts[G], others[G];
                    attend_chunk_of<G>(layer, i, kv, head, 0, out, parts);
                    for (int64_t start = kChunk; start <= b_.positions[i]; start += kChunk) {
                        attend_chunk_of<G>(layer, i, kv, head, start, next, others);
                        for (int g = 0; g < G; ++g) join(out + g * head_, parts[g], next + g * head_, others[g], head_);
                    }
                    for (int g = 0; g < G; ++g) finish(i, head + g, out + g * head_, parts[g]);
                });
            });
        share(items * chunks_of_, [&](int64_t item) {
            const int64_t i = item / chunks_of_ / m_.n_kv_heads, kv = item / chunks_of_ % m_.n_kv_heads;
            const int64_t chunk = item % chunks_of_;
            if (chunk * kChunk > b_.positions[i]) return;
            heads(kv, [&](auto count, int64_t head) {
                constexpr int G = decltype(count)::value;
                alignas(64) float out[G * kWidestHead];
                Part parts[G];
                attend_chunk_of<G>(layer, i, kv, head, chunk * kChunk, out, parts);
                for (int g = 0; g < G; ++g) {
                    const int64_t at = (i * m_.n_heads + head + g) * chunks_of_ + chunk;
                    std::memcpy(chunks_ + at * head_, out + g * head_, size_t(head_) * 4);
                    parts_[at] = parts[g];
                }
            });
        });
        share(n_ * m_.n_heads, [&](int64_t item) {
            float* out = chunks_ + item * chunks_of_ * head_;
            Part part = parts_[item * chunks_of_];
            for (int64_t c = 1; c * kChunk <= b_.positions[item / m_.n_heads]; ++c)
                join(out, part, out + c * head_, parts_[item * chunks_of_ + c], head_);
            finish(item / m_.n_heads, item % m_.n_heads, out, part);
        });
    }

    static constexpr int64_t kWidestHead = 512;

    template <int G>
    void attend_chunk_of(int64_t layer, int64_t i, int64_t kv, int64_t head, int64_t start, float* out, Part* parts) {
        Query<C> queries[G * kWidestHead];
        for (int g = 0; g < G; ++g)
            ::convert(q_ + i * q_width_ + (head + g) * m_.head_dim, m_.head_dim, queries + g * m_.head_dim,
                      static_cast<const C*>(nullptr));
        attend_chunk<G>(cache(layer), table(i), kv, start, b_.positions[i], queries,
                        1 / std::sqrt(float(m_.head_dim)), out, parts);
    }

    template <class Work>
    void heads(int64_t kv, Work work) {  // the query heads of a KV head, up to four at a time
        int64_t head = kv * group_;
        const int64_t end = head + group_;
        for (; head + kHeads <= end; head += kHeads) work(Number<kHeads>{}, head);
        if (end - head == 3) work(Number<3>{}, head);
        else if (end - head == 2) work(Number<2>{}, head);
        else if (end - head == 1) work(Number<1>{}, head);
    }

    void finish(int64_t i, int64_t head, const float* out, const Part& part) {
        const float scale = 1 / part.total;
        float* to = mixed_ + i * mixed_width_ + head * m_.head_dim;
        for (int64_t d = 0; d < m_.head_dim; ++d) to[d] = out[d] * scale;
    }

    void feed_forward(const Layer& layer) {  // hidden = silu(gate x) * (up x), a panel of both at a time
        lower(layer, kGate, 2, normed_, dim_);
        const Rows rows = forms(normed_, dim_);
        const Matrix &gate = layer.matrices[kGate], &other = layer.matrices[kUp];
        const Tiling tiling(gate, n_);
        share(tiling.items(), [&](int64_t item) {
            one(gate, rows, tiling, item, [&](int64_t row, int64_t o, int64_t count, float* y) {
                raise(layer, row, kGate, 0, o / kPanel, y);
                for (int64_t j = 0; j < kPanel; j += kLanes) {
                    const Lanes x = load_lanes(y + j);
                    store(y + j, x / (exponential(-x) + 1.0f));
                }
                std::memcpy(hidden_ + row * ffn_ + o, y, size_t(count) * 4);
            });
            one(other, rows, tiling, item, [&](int64_t row, int64_t o, int64_t count, float* y) {
                raise(layer, row, kGate, 1, o / kPanel, y);
                float* to = hidden_ + row * ffn_ + o;
                for (int64_t j = 0; j < count; ++j) to[j] *= y[j];
            });
        });
    }

    Engine& e_;
    const Model& m_;
    const Batch& b_;
    const int64_t n_, padded_, q_width_, kv_width_, dim_, ffn_, mixed_width_, group_, head_;
    float *const x_, *const normed_, *const q_, *const k_, *const v_, *const mixed_, *const hidden_, *const turns_;
    float *rounded_, *scales_, *low_ = nullptr, *chunks_ = nullptr;
    bf16* halves_;
    int8_t* codes_;
    int32_t* offsets_;
    Part* parts_ = nullptr;
    int64_t chunks_of_ = 1, rank_ = 1;
    bool split_ = false;
};

}  // namespace

extern "C" Engine* arriero_open(int64_t threads) { return new Engine(threads); }

extern "C" void arriero_close(Engine* engine) { delete engine; }

extern "C" void arriero_step(Engine* engine, const Model* model, const Batch* batch) {
    model->cache_bf16 ? Step<bf16>(*engine, *model, *batch).run() : Step<float>(*engine, *model, *batch).run();
}

// work(data, item) for each of the items on the engine's threads: what is between steps needs no threads of its own.
extern "C" void arriero_share(Engine* engine, int64_t items, void (*work)(void*, int64_t), void* data) {
    engine->team.run(1, [&] { engine->team.share(items, [&](int64_t item) { work(data, item); }); });
}

// y [n, out] = x w^T by the same products, for tests and measurements; x fp32 [n, width], width the padded input's.
extern "C" void arriero_product(Engine* engine, const Matrix* matrix, const float* x, int64_t n, int64_t repeat, float* y) {
    const int64_t width = up(matrix->in, kGroup), groups = width / kGroup, padded = up(n, kRowPadding);
    bf16* halves = engine->halves.get(padded * width);
    float* rounded = engine->rounded.get(padded * width);
    int8_t* codes = engine->codes.get(2 * padded * width);
    float* scales = engine->scales.get(padded * groups);
    int32_t* offsets = engine->offsets.get(padded * groups);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t d = i * width; d < (i + 1) * width; d += kLanes) round(x + d, halves + d, rounded + d);
        quantise(matrix->digits, x + i * width, width, codes + 2 * i * width, scales + i * groups, offsets + i * groups);
    }
    const Rows rows{width, x, halves, rounded, codes, scales, offsets};
    const Tiling tiling(*matrix, n);
    engine->team.run(repeat, [&] {
        const Arithmetic arithmetic;
        for (int64_t again = 0; again < repeat; ++again)
            engine->team.share(tiling.items(), [&](int64_t item) {
                tiling.multiply_item(*matrix, rows, item, [&](int64_t panel, int64_t row, const float* found) {
                    const int64_t o = panel * kPanel, count = std::min(kPanel, matrix->out - o);
                    std::memcpy(y + row * matrix->out + o, found, size_t(count) * 4);
                });
            });
    });
}
