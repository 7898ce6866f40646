// Attention of one new token over the keys and values of its sequence, which lie in blocks of a paged cache.
//
// A block holds 32 positions of one KV head: keys [h / 2][32][2] in pairs along the head (fp32: [h][32]), so that the
// scores of 32 keys are one product whose outputs lie across the lanes; values [32][H], H = h rounded up to 16.
// Keys are walked in chunks of 256 whose borders are fixed by position: scores of a chunk, its own softmax, its weighted
// values; chunks are then joined in order. So the result depends on the query and on what the cache holds of its own
// sequence, never on what runs beside it or on how many threads there are.

#pragma once

#include "linear.h"

namespace {

constexpr int64_t kBlock = 32;          // positions; BLOCK in step.py
constexpr int64_t kChunk = 8 * kBlock;  // positions
constexpr int kHeads = 4;               // query heads at once

template <class C>
struct Paged {  // one layer
    C *keys, *values;
    int64_t n_kv_heads, head_dim;
    int64_t padded() const { return up(head_dim, kLanes); }
    int64_t size_of_keys() const { return kBlock * head_dim; }
    C* keys_of(int64_t block, int64_t head) const { return keys + (block * n_kv_heads + head) * size_of_keys(); }
    C* values_of(int64_t block, int64_t head) const {
        return values + (block * n_kv_heads + head) * kBlock * padded();
    }
};

inline void write_key(const Paged<float>& cache, float* to, int64_t slot, const float* key) {
    for (int64_t d = 0; d < cache.head_dim; ++d) to[d * kBlock + slot] = key[d];
}

inline void write_key(const Paged<bf16>& cache, bf16* to, int64_t slot, const float* key) {
    for (int64_t d = 0; d < cache.head_dim; ++d) narrow(key[d], to + d / 2 * 2 * kBlock + 2 * slot + d % 2);
}

// A query as the scores want it.
inline void convert(const float* query, int64_t width, float* to) { std::copy(query, query + width, to); }
inline void convert(const float* query, int64_t width, bf16* to) {
    for (int64_t d = 0; d < width; ++d) narrow(query[d], to + d);
}

// q . k for G queries [G, width] and the 32 keys of a block.
template <int G>
inline void score(const float* queries, int64_t width, const float* keys, Lanes (&scores)[G][2]) {
    Lanes sums[G][2] = {};
    for (int64_t d = 0; d < width; ++d, keys += kBlock) {
        const Lanes low = load_lanes(keys), high = load_lanes(keys + kLanes);
        UNROLL for (int g = 0; g < G; ++g) {
            sums[g][0] += low * queries[g * width + d];
            sums[g][1] += high * queries[g * width + d];
        }
    }
    UNROLL for (int g = 0; g < G; ++g) scores[g][0] = sums[g][0], scores[g][1] = sums[g][1];
}

template <int G>
inline void score(const bf16* queries, int64_t width, const bf16* keys, Lanes (&scores)[G][2]) {
    Lanes sums[G][2] = {};
    for (int64_t d = 0; d < width; d += 2, keys += 2 * kBlock) {
        const Lanes low = load<Lanes>(keys), high = load<Lanes>(keys + 2 * kLanes);
        UNROLL for (int g = 0; g < G; ++g) {
            uint32_t pair;
            std::memcpy(&pair, queries + g * width + d, sizeof pair);
            sums[g][0] = add_pairs(sums[g][0], low, broadcast_pair(pair));
            sums[g][1] = add_pairs(sums[g][1], high, broadcast_pair(pair));
        }
    }
    UNROLL for (int g = 0; g < G; ++g) scores[g][0] = sums[g][0], scores[g][1] = sums[g][1];
}

// out[g] += sum over the keys of weights[g][key] * values[key], for 16 B of the head's columns.
template <int G, int B, class C>
inline void weigh(const float* weights, const C* values, int64_t stride, int64_t keys, Lanes (&sums)[G][B]) {
    for (int64_t s = 0; s < keys; ++s, values += stride) {
        Lanes v[B];
        UNROLL for (int b = 0; b < B; ++b) v[b] = load_lanes(values + b * kLanes);
        UNROLL for (int g = 0; g < G; ++g)
            UNROLL for (int b = 0; b < B; ++b) sums[g][b] += v[b] * weights[g * kChunk + s];
    }
}

struct Part {  // of a softmax: its largest score, the sum of e^(score - largest); the values so weighed lie beside it
    float most, total;
};

// One chunk of the keys, from position `start`, for G query heads [G, h] of the token at `position`: out [G, H].
// scale: of the scores, 1 / sqrt(h).
template <int G, class C>
void attend_chunk(const Paged<C>& cache, const int32_t* table, int64_t kv, int64_t start, int64_t position,
                  const C* queries, float scale, float* out, Part* parts) {
    alignas(64) float scores[G * kChunk];
    const int64_t keys = std::min(kChunk, position + 1 - start), width = cache.head_dim;
    Lanes most[G];
    UNROLL for (int g = 0; g < G; ++g) most[g] = all(-INFINITY);
    const IntLanes places = counting();
    for (int64_t s = 0; s < keys; s += kBlock) {
        Lanes found[G][2];
        score<G>(queries, width, cache.keys_of(table[(start + s) / kBlock], kv), found);
        UNROLL for (int g = 0; g < G; ++g)
            UNROLL for (int half = 0; half < 2; ++half) {
                const int32_t left = int32_t(keys - s - half * kLanes);  // what lies behind may be anything
                const Lanes seen = select(places < left, found[g][half] * scale, all(-INFINITY));
                store(scores + g * kChunk + s + half * kLanes, seen);
                most[g] = larger(most[g], seen);
            }
    }
    UNROLL for (int g = 0; g < G; ++g) {
        const float highest = largest(most[g]);
        Lanes total = {};
        for (int64_t s = 0; s < keys; s += kLanes) {
            const Lanes weight = exponential(load_lanes(scores + g * kChunk + s) - highest);
            const Lanes kept = select(places < int32_t(keys - s), weight, Lanes{});
            store(scores + g * kChunk + s, kept);
            total += kept;
        }
        parts[g] = {highest, sum(total)};
    }
    const int64_t columns = cache.padded();
    const auto values = [&](auto count, int64_t column) {
        constexpr int B = decltype(count)::value;
        Lanes sums[G][B] = {};
        for (int64_t s = 0; s < keys; s += kBlock)
            weigh<G, B>(scores + s, cache.values_of(table[(start + s) / kBlock], kv) + column, columns,
                        std::min(kBlock, keys - s), sums);
        UNROLL for (int g = 0; g < G; ++g) 
            UNROLL for (int b = 0; b < B; ++b) store(out + g * columns + column + b * kLanes, sums[g][b]);
    };
    int64_t column = 0;
    for (; column + 4 * kLanes <= columns; column += 4 * kLanes) values(std::integral_constant<int, 4>{}, column);
    for (; column < columns; column += kLanes) values(std::integral_constant<int, 1>{}, column);
}

// Joins a chunk to those before it: out [H] and its part.
inline void join(float* out, Part& part, const float* next, const Part& other, int64_t columns) {
    const float most = std::max(part.most, other.most);
    const float old_scale = exponential(all(part.most - most))[0], new_scale = exponential(all(other.most - most))[0];
    for (int64_t c = 0; c < columns; c += kLanes)
        store(out + c, load_lanes(out + c) * old_scale + load_lanes(next + c) * new_scale);
    part = {most, part.total * old_scale + other.total * new_scale};
}

}  // namespace
