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

// A query as the scores want it, for a cache of this type: rounded like the keys.
template <class C>
using Query = std::conditional_t<std::is_same_v<C, float>, float, Half>;

inline void convert(const float* query, int64_t width, float* to, const float*) { std::copy(query, query + width, to); }
template <class To>
inline void convert(const float* query, int64_t width, To* to, const bf16*) {
    for (int64_t d = 0; d < width; ++d) {
        bf16 rounded;
        narrow(query[d], &rounded);
        if constexpr (std::is_same_v<To, float>) to[d] = widen(rounded);
        else to[d] = rounded;
    }
}

// q . k for G queries [G, width] and 16 B of the keys of a block. ahead: of the block behind it, which is fetched meanwhile:
// blocks lie anywhere, so the hardware cannot guess where the next one begins.
template <int G, int B>
inline void score(const float* queries, int64_t width, const float* keys, const float* ahead, Lanes (&sums)[G][B]) {
    for (int64_t d = 0; d < width; ++d, keys += kBlock, ahead += kBlock)
        UNROLL for (int b = 0; b < B; ++b) {
            __builtin_prefetch(ahead + b * kLanes);
            const Lanes found = load_lanes(keys + b * kLanes);
            UNROLL for (int g = 0; g < G; ++g) sums[g][b] += found * queries[g * width + d];
        }
}

template <int G, int B>
inline void score(const Half* queries, int64_t width, const bf16* keys, const bf16* ahead, Lanes (&sums)[G][B]) {
    for (int64_t d = 0; d < width; d += 2, keys += 2 * kBlock, ahead += 2 * kBlock)
        UNROLL for (int b = 0; b < B; ++b) {
            __builtin_prefetch(ahead + b * 2 * kLanes);
            const Pairs found = pairs_of(load<WideLanes>(keys + b * 2 * kLanes));
            UNROLL for (int g = 0; g < G; ++g) sums[g][b] = add_pairs(sums[g][b], found, queries + g * width + d);
        }
}

// Vectors of keys, and of columns, that G heads take at once: as many sums as there are registers.
#if defined(__AVX512BW__)
constexpr int score_blocks(int) { return 2; }
constexpr int column_blocks(int) { return 4; }
#else
constexpr int score_blocks(int heads) { return heads < 3 ? 2 : 1; }
constexpr int column_blocks(int heads) { return heads == 1 ? 4 : heads == 2 ? 2 : 1; }
#endif

// out[g] += sum over the keys of weights[g][key] * values[key], for 16 B of the head's columns; ahead as above.
template <int G, int B, class C>
inline void weigh(const float* weights, const C* values, const C* ahead, int64_t stride, int64_t keys,
                  Lanes (&sums)[G][B]) {
    for (int64_t s = 0; s < keys; ++s, values += stride, ahead += stride) {
        __builtin_prefetch(ahead);
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
                  const Query<C>* queries, float scale, float* out, Part* parts) {
    alignas(64) float scores[G * kChunk];
    const int64_t keys = std::min(kChunk, position + 1 - start), width = cache.head_dim;
    Lanes most[G];
    UNROLL for (int g = 0; g < G; ++g) most[g] = all(-INFINITY);
    const IntLanes places = counting();
    constexpr int kAtOnce = score_blocks(G);
    constexpr int64_t kPerKey = std::is_same_v<C, float> ? 1 : 2;  // numbers of a key that lie together
    for (int64_t s = 0; s < keys; s += kAtOnce * kLanes) {
        const C* block = cache.keys_of(table[(start + s) / kBlock], kv) + s % kBlock * kPerKey;
        const bool more = s + kBlock < keys;  // else the values come next
        const C* ahead = more ? cache.keys_of(table[(start + s) / kBlock + 1], kv) + s % kBlock * kPerKey
                              : cache.values_of(table[start / kBlock], kv) + s % kBlock * kPerKey;
        Lanes found[G][kAtOnce] = {};
        score<G, kAtOnce>(queries, width, block, ahead, found);
        UNROLL for (int g = 0; g < G; ++g)
            UNROLL for (int b = 0; b < kAtOnce; ++b) {
                const int32_t left = int32_t(keys - s - b * kLanes);  // what lies behind may be anything
                const Lanes seen = select(places < left, found[g][b] * scale, all(-INFINITY));
                store(scores + g * kChunk + s + b * kLanes, seen);
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
        for (int64_t s = 0; s < keys; s += kBlock) {
            const C* block = cache.values_of(table[(start + s) / kBlock], kv) + column;
            const C* ahead = cache.values_of(table[(start + std::min(s + kBlock, keys - 1)) / kBlock], kv) + column;
            weigh<G, B>(scores + s, block, ahead, columns, std::min(kBlock, keys - s), sums);
        }
        UNROLL for (int g = 0; g < G; ++g) 
            UNROLL for (int b = 0; b < B; ++b) store(out + g * columns + column + b * kLanes, sums[g][b]);
    };
    int64_t column = 0;
    constexpr int kColumns = column_blocks(G);
    for (; column + kColumns * kLanes <= columns; column += kColumns * kLanes)
        values(std::integral_constant<int, kColumns>{}, column);
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
