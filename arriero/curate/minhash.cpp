// MinHash signatures; minhash.py says what they are, and makes the same in numpy.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr uint64_t MULTIPLIER = 0x9E3779B97F4A7C15ull, FINAL = 0xD6E8FEB86659FD93ull;

inline uint64_t mix(uint64_t hash) {
    hash = (hash ^ (hash >> 32)) * FINAL;
    return hash ^ (hash >> 29);
}

}  // namespace

extern "C" void signatures(const uint64_t *words, const int64_t *first, int64_t documents, int64_t ngram,
                           const uint64_t *factors, const uint64_t *terms, int64_t functions, uint32_t *out) {
    std::vector<uint64_t> least(functions);
    for (int64_t d = 0; d < documents; ++d) {
        if (first[d + 1] - first[d] < ngram) continue;
        std::fill(least.begin(), least.end(), ~0ull);
        for (int64_t i = first[d]; i + ngram <= first[d + 1]; ++i) {
            uint64_t shingle = 0;
            for (int64_t j = 0; j < ngram; ++j) shingle = shingle * MULTIPLIER ^ words[i + j];
            shingle = mix(shingle);
            uint64_t *low = least.data();
            for (int64_t h = 0; h < functions; ++h) low[h] = std::min(low[h], shingle * factors[h] + terms[h]);
        }
        for (int64_t h = 0; h < functions; ++h) out[d * functions + h] = least[h] >> 32;
    }
}
