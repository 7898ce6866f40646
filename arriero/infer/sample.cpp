// The next token of each row: penalties, masks, filters and the draw, in a few passes over the logits.
//
// Every filter (top-k, top-p, min-p) keeps the tokens whose logit reaches some threshold, so a filter is a search for
// its threshold, and no vocabulary is sorted: a pass measures what lies above a trial threshold (tokens for top-k,
// probability for top-p), which halves what is undecided; the last few are sorted. The random number of a token is a
// function of the row's seed and the token's index, every sum runs in one order, and a row is one thread's, so nothing
// but the row itself decides its token, bit for bit.
// Compiled on first use by sample.py, which describes the call; slow twin: sample_twin.py.
//
// Shapes: m rows, V vocabulary. Vectors are the compilers' own extension: AVX-512, AVX2 and NEON come from one source.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// Of the CPU's own width: GCC takes wider vectors apart into single numbers, which is ten times as slow.
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
typedef float Lanes __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t IntLanes __attribute__((vector_size(VECTOR_BYTES)));
constexpr int64_t kLanes = VECTOR_BYTES / 4, kBlock = 512;  // logits of a vector; of a block, whose sum is kept
constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kLowest = -std::numeric_limits<float>::max();
constexpr float kHighest = 1e30f;  // stands for a logit of +inf, so that differences of logits are numbers
constexpr int64_t kFew = 32;       // candidates that are sorted

inline Lanes load(const float* p) {
    Lanes lanes;
    std::memcpy(&lanes, p, sizeof lanes);
    return lanes;
}
inline void store(float* p, Lanes lanes) { std::memcpy(p, &lanes, sizeof lanes); }
inline Lanes all(float x) { return x - Lanes{}; }

inline float highest(Lanes x) {
    float out = x[0];
    for (int j = 1; j < kLanes; ++j) out = x[j] > out ? x[j] : out;
    return out;
}
inline float sum(Lanes x) {
    float part[kLanes];
    std::memcpy(part, &x, sizeof part);
    for (int64_t width = kLanes / 2; width; width /= 2)
        for (int64_t j = 0; j < width; ++j) part[j] += part[j + width];
    return part[0];
}

// e^x for x <= 0, within 2 units in the last place; 0 below -87 (Cephes' polynomial).
inline Lanes exp_of(Lanes x) {
    const Lanes low = all(-87.0f);
    Lanes z = x > low ? x : low;
    Lanes n = (z * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
    Lanes r = z - n * 0.693359375f + n * 2.12194440e-4f;
    Lanes y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    IntLanes power = (__builtin_convertvector(n, IntLanes) + 127) << 23;
    Lanes scale;
    std::memcpy(&scale, &power, sizeof scale);
    return x > low ? y * scale : all(0.0f);
}

// Philox4x64-10 (Salmon et al. 2011): the first word of the block at `counter` under `key`.
inline uint64_t philox(uint64_t key, uint64_t counter) {
    uint64_t c[4] = {counter, 0, 0, 0}, k[2] = {key, 0};
    for (int round = 0; round < 10; ++round) {
        const unsigned __int128 a = (unsigned __int128)0xD2E7470EE14C6C93u * c[0];
        const unsigned __int128 b = (unsigned __int128)0xCA5A826395121157u * c[2];
        const uint64_t next[4] = {(uint64_t)(b >> 64) ^ c[1] ^ k[0], (uint64_t)b, (uint64_t)(a >> 64) ^ c[3] ^ k[1],
                                  (uint64_t)a};
        std::memcpy(c, next, sizeof c);
        k[0] += 0x9E3779B97F4A7C15u;
        k[1] += 0xBB67AE8584CAA73Bu;
    }
    return c[0];
}

struct Row {  // as `NativeRow` in sampler_row.py
    double top_p;
    float temperature, log_min_p, repetition, presence, frequency;
    int32_t top_k, n_top, wants_logprobs, top_of_sampled;
    int64_t given;  // the token to be scored, or -1: draw one
    uint64_t seed, index;
    const uint32_t *words, *allowed;  // bit masks; null: every token
    int64_t n_words, n_allowed;
    const int32_t* tokens;  // prompt, then answer
    int64_t n_prompt, n_tokens;
    const int32_t* bias_ids;
    const float* bias;
    int64_t n_bias;
};

struct Out {  // as `_Out` in sample.py
    int64_t id;
    float raw, sampled;
};

struct Pair {
    float logit;
    int32_t id;
};

struct Work {  // one row's, kept from call to call: fresh memory costs more than the sampling
    std::vector<float> logits, weights, candidates, their_weights;
    std::vector<float> tops;  // the largest logit of each block, at least: what lies below a threshold is passed over
    std::vector<uint8_t> weighed;  // of each block, whether its weights are there
    float max = 0;                 // the largest logit, whose weight is 1
    std::vector<double> sums;
    std::vector<int32_t> counts;
    std::vector<Pair> pairs;
    void fit(int64_t V) {
        const int64_t n = (V + kBlock - 1) / kBlock * kBlock;
        if ((int64_t)logits.size() == n) return;
        for (auto* v : {&logits, &weights}) v->assign(n, 0);
        for (auto* v : {&candidates, &their_weights}) v->assign(n + kLanes, 0);
        sums.assign(n / kBlock, 0);
        tops.assign(n / kBlock, 0);
        weighed.assign(n / kBlock, 0);
        counts.assign(n, 0);
    }
    int64_t padded() const { return (int64_t)logits.size(); }
};

// What lies at or above `threshold`: the sum of the weights, or without any the count.
double measure(const float* logits, const float* weights, int64_t n, float threshold) {
    const Lanes bound = all(threshold), one = all(1.0f), none = all(0.0f);
    double total = 0;
    int64_t i = 0;
    while (i + kLanes <= n) {
        Lanes part = none;
        for (const int64_t end = std::min(n - kLanes + 1, i + kBlock); i < end; i += kLanes)
            part += load(logits + i) >= bound ? (weights ? load(weights + i) : one) : none;
        total += sum(part);
    }
    for (; i < n; ++i) total += logits[i] >= threshold ? (weights ? weights[i] : 1.0f) : 0.0f;
    return total;
}

// Keep the candidates within [low, high), in place or from elsewhere; returns how many.
int64_t narrow(const float* logits, const float* weights, int64_t n, float low, float high, float* out, float* out_w) {
    int64_t kept = 0, i = 0;
#if defined(__AVX512F__)
    const __m512 lo = _mm512_set1_ps(low), hi = _mm512_set1_ps(high);
    for (; i + kLanes <= n; i += kLanes) {
        const __m512 x = _mm512_loadu_ps(logits + i);
        const __mmask16 in = _mm512_cmp_ps_mask(x, lo, _CMP_GE_OQ) & _mm512_cmp_ps_mask(x, hi, _CMP_LT_OQ);
        if (!in) continue;
        const __m512 w = weights ? _mm512_maskz_compress_ps(in, _mm512_loadu_ps(weights + i)) : x;
        _mm512_storeu_ps(out + kept, _mm512_maskz_compress_ps(in, x));
        if (weights) _mm512_storeu_ps(out_w + kept, w);
        kept += __builtin_popcount(in);
    }
#elif defined(__AVX2__)
    const __m256 lo = _mm256_set1_ps(low), hi = _mm256_set1_ps(high);
    for (; i + kLanes <= n; i += kLanes) {
        const __m256 x = _mm256_loadu_ps(logits + i);
        int in = _mm256_movemask_ps(_mm256_and_ps(_mm256_cmp_ps(x, lo, _CMP_GE_OQ), _mm256_cmp_ps(x, hi, _CMP_LT_OQ)));
        for (; in; in &= in - 1, ++kept) {
            const int64_t j = i + __builtin_ctz(in);
            out[kept] = logits[j];
            if (weights) out_w[kept] = weights[j];
        }
    }
#endif
    for (; i < n; ++i) {
        const float x = logits[i], w = weights ? weights[i] : 1.0f;
        out[kept] = x;
        if (weights) out_w[kept] = w;
        kept += x >= low && x < high;
    }
    return kept;
}

// Weights e^(l - max) of a block, stored or not; returns their sum.
template <bool kStore>
double weigh_block(Work& w, int64_t b) {
    const Lanes shift = all(w.max);
    Lanes part = all(0.0f);
    for (int64_t i = b * kBlock; i < (b + 1) * kBlock; i += kLanes) {
        const Lanes e = exp_of(load(&w.logits[i]) - shift);
        if (kStore) store(&w.weights[i], e);
        part += e;
    }
    return sum(part);
}

// The weights of all tokens, stored where all are wanted later, else when a block is first asked for: filters leave few
// blocks, and storing costs more than the exponentials. Returns their sum.
double weigh(Work& w, float max, bool stored) {
    w.max = max;
    std::fill(w.weighed.begin(), w.weighed.end(), stored);
    double total = 0;
    for (int64_t b = 0; b < w.padded() / kBlock; ++b) total += stored ? weigh_block<true>(w, b) : weigh_block<false>(w, b);
    return total;
}

const float* weights_of(Work& w, int64_t b) {
    if (!w.weighed[b]) weigh_block<true>(w, b), w.weighed[b] = 1;
    return &w.weights[b * kBlock];
}

// `measure` and `narrow` for all logits of the row, by weight or by count.
double measure(Work& w, bool by_weight, float threshold) {
    double total = 0;
    for (int64_t b = 0; b < w.padded() / kBlock; ++b)
        if (w.tops[b] >= threshold)
            total += measure(&w.logits[b * kBlock], by_weight ? weights_of(w, b) : nullptr, kBlock, threshold);
    return total;
}

int64_t narrow(Work& w, bool by_weight, float low, float high, float* out, float* out_w) {
    int64_t kept = 0;
    for (int64_t b = 0; b < w.padded() / kBlock; ++b)
        if (w.tops[b] >= low)
            kept += narrow(&w.logits[b * kBlock], by_weight ? weights_of(w, b) : nullptr, kBlock, low, high, out + kept,
                           by_weight ? out_w + kept : nullptr);
    return kept;
}

// The highest threshold at or above which the logits measure `target`, which all of them do. floor: a threshold known
// to do so, or -inf. Logits at -inf are no tokens.
float cut(Work& w, bool by_weight, double target, float max, float floor) {
    float high = std::nextafter(max, kInf), low = floor;
    double above = 0;  // measure at or above `high`
    for (float step = 2.0f; low == -kInf; step *= 2) {
        const float trial = std::max(max - step, kLowest);
        const double m = measure(w, by_weight, trial);
        if (m >= target || trial == kLowest) low = trial;
        else high = trial, above = m;
    }
    float *kept = w.candidates.data(), *kept_w = by_weight ? w.their_weights.data() : nullptr;
    int64_t count = narrow(w, by_weight, low, high, kept, kept_w);
    while (count > kFew) {
        const float middle = low + (high - low) / 2;
        if (middle <= low || middle >= high) return low;  // all of one value
        const double m = above + measure(kept, kept_w, count, middle);
        if (m >= target) low = middle;
        else high = middle, above = m;
        count = narrow(kept, kept_w, count, low, high, kept, kept_w);
    }
    std::pair<float, float> last[kFew];
    for (int64_t i = 0; i < count; ++i) last[i] = {kept[i], by_weight ? kept_w[i] : 1.0f};
    std::sort(last, last + count, [](auto a, auto b) { return a.first > b.first; });
    for (int64_t i = 0; i < count; ++i)
        if ((above += last[i].second) >= target) return last[i].first;
    return count ? last[count - 1].first : low;
}

// The `n` largest of the logits that are tokens, by logit and then id, with their log-probabilities.
void best(Work& w, int64_t n, float max, double log_total, int32_t* ids, float* logprobs) {
    const int64_t there = (int64_t)measure(w, false, kLowest);
    n = std::min(n, there);
    if (n <= 0) return;
    const float from = n == there ? kLowest : cut(w, false, n, max, -kInf);
    w.pairs.clear();
    for (int64_t i = 0; i < w.padded(); ++i) {
        if (i % kBlock == 0 && w.tops[i / kBlock] < from) i += kBlock - 1;
        else if (w.logits[i] >= from) w.pairs.push_back({w.logits[i], (int32_t)i});
    }
    std::sort(w.pairs.begin(), w.pairs.end(),
              [](Pair a, Pair b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); });
    for (int64_t i = 0; i < n; ++i) {
        ids[i] = w.pairs[i].id;
        logprobs[i] = (float)((double)(w.pairs[i].logit - max) - log_total);
    }
}

// Copy the logits, NaN as -inf and +inf as `kHighest`; what pads the last block is no token. Returns the largest.
float take(const float* logits, int64_t V, Work& w, bool& finite) {
    const Lanes lowest = all(-kInf), top = all(kHighest);
    Lanes largest = lowest;
    IntLanes wrong = {};
    int64_t i = 0;
    for (; i + kLanes <= V; i += kLanes) {
        Lanes x = load(logits + i);
        wrong |= (x != x) | (x == kInf);
        x = x > top ? top : x;
        x = x == x ? x : lowest;
        largest = x > largest ? x : largest;
        store(&w.logits[i], x);
    }
    finite = true;
    for (int j = 0; j < kLanes; ++j) finite &= !wrong[j];
    float max = highest(largest);
    for (; i < V; ++i) {
        finite &= logits[i] == logits[i] && logits[i] != kInf;
        w.logits[i] = logits[i] == logits[i] ? std::min(logits[i], kHighest) : -kInf;
        max = std::max(max, w.logits[i]);
    }
    std::fill(w.logits.begin() + V, w.logits.end(), -kInf);
    return max;
}

inline bool has_penalties(const Row& r) {
    return r.n_bias || r.repetition != 1 || r.presence != 0 || r.frequency != 0;
}

// Logit bias, then the penalties: repetition over prompt and answer, presence and frequency over the answer.
void penalise(const Row& r, int64_t V, Work& w) {
    for (int64_t i = 0; i < r.n_bias; ++i)
        if (r.bias_ids[i] < V) w.logits[r.bias_ids[i]] += r.bias[i];
    const bool answers = r.presence != 0 || r.frequency != 0;
    if (r.repetition == 1 && !answers) return;
    for (int64_t i = r.n_prompt; i < r.n_tokens; ++i)
        if (r.tokens[i] < V) ++w.counts[r.tokens[i]];
    for (int64_t i = 0; i < r.n_tokens; ++i) {
        const int32_t id = r.tokens[i];
        if (id >= V || w.counts[id] < 0) continue;  // below 0: done
        float& x = w.logits[id];
        if (r.repetition != 1) x = x > 0 ? x / r.repetition : x * r.repetition;
        if (answers && w.counts[id])  // in fp64, where the product is exact, so that it is rounded once
            x = (float)(x - ((double)r.frequency * w.counts[id] + (double)r.presence));
        w.counts[id] = -1;
    }
    for (int64_t i = 0; i < r.n_tokens; ++i)
        if (r.tokens[i] < V) w.counts[r.tokens[i]] = 0;
}

struct Masks {  // bit i % 32 of word i / 32 allows token i, if both masks have it; a null one allows every token
    const uint32_t *a, *b;
    int64_t n_a, n_b;
    uint32_t word(int64_t i) const {
        return (!a ? ~0u : i < n_a ? a[i] : 0) & (!b ? ~0u : i < n_b ? b[i] : 0);
    }
};

// The logits `from` (those of the row as the model gave them, or as they are in `w` by now), tokens outside both masks at
// -inf, divided by the temperature; returns the largest, and how many are allowed.
float restrict_to(const Masks& masks, float temperature, const float* from, int64_t V, Work& w, int64_t& allowed) {
    IntLanes bits;
    for (int j = 0; j < kLanes; ++j) bits[j] = 1 << j;
    const Lanes lowest = all(-kInf), top = all(kHighest), divisor = all(temperature);
    float most = -kInf;
    allowed = 0;
    for (int64_t b = 0; b < w.padded() / kBlock; ++b) {
        Lanes largest = lowest;
        for (int64_t i = b * kBlock; i < (b + 1) * kBlock; i += 32) {
            const uint32_t mask = masks.word(i / 32) & (i + 32 <= V ? ~0u : i >= V ? 0u : ~0u >> (i + 32 - V));
            allowed += __builtin_popcount(mask);
            float last[32];
            const float* these = from + i;
            if (i + 32 > V) {
                std::fill(last, last + 32, -kInf);
                if (i < V) std::copy(these, from + V, last);
                these = last;
            }
            for (int64_t j = 0; j < 32; j += kLanes) {
                const IntLanes mine = ((int32_t)(mask >> j & ((1u << kLanes) - 1)) - IntLanes{}) & bits;
                Lanes x = load(these + j);
                x = x == x ? x : lowest;
                if (temperature != 1) x = x / divisor;
                x = x > top ? top : x;
                x = mine != 0 ? x : lowest;
                largest = x > largest ? x : largest;
                store(&w.logits[i + j], x);
            }
        }
        w.tops[b] = highest(largest);
        most = std::max(most, w.tops[b]);
    }
    return most;
}

// A row without any finite logit (diverged weights): its allowed tokens become equally likely.
void level(const Masks& masks, int64_t V, Work& w) {
    for (int64_t i = 0; i < V; ++i) w.logits[i] = masks.word(i / 32) >> (i % 32) & 1 ? 0.0f : -kInf;
    std::fill(w.tops.begin(), w.tops.end(), 0.0f);
}

// The token at which the summed weight of those at or above `threshold` first exceeds uniform times their total.
int64_t draw(Work& w, float threshold, double uniform, double& total) {
    const int64_t n_blocks = (int64_t)w.sums.size();
    total = 0;
    for (int64_t b = 0; b < n_blocks; ++b)
        total += w.sums[b] =
            w.tops[b] >= threshold ? measure(&w.logits[b * kBlock], weights_of(w, b), kBlock, threshold) : 0;
    const double target = uniform * total;
    double before = 0, reached = 0;
    int64_t chosen = 0, last = 0;
    for (int64_t b = 0; b < n_blocks && before <= target; before += w.sums[b++])
        if (w.sums[b] > 0) chosen = b, reached = before;  // the last with a token, should rounding lead past the end
    const float* const weights = weights_of(w, chosen);
    for (int64_t i = chosen * kBlock; i < (chosen + 1) * kBlock; ++i) {
        const float weight = weights[i - chosen * kBlock];
        if (!(w.logits[i] >= threshold) || !(weight > 0)) continue;
        last = i;
        if ((reached += weight) > target) break;
    }
    return last;
}

int64_t first_of(const Work& w, float value) {
    const Lanes sought = all(value);
    for (int64_t b = 0; b < w.padded(); b += kBlock) {
        IntLanes found = {};
        for (int64_t i = b; i < b + kBlock; i += kLanes) found |= load(&w.logits[i]) == sought;
        int32_t any = 0;
        for (int j = 0; j < kLanes; ++j) any |= found[j];
        for (int64_t i = b; any; ++i)
            if (w.logits[i] == value) return i;
    }
    return -1;
}

// Whether a token is drawn from all, so that all weights are wanted.
inline bool draws_from_all(const Row& r) {
    return r.given < 0 && r.temperature != 0 && !(r.top_k > 0) && r.top_p >= 1 && r.log_min_p == -kInf;
}

float threshold_of(const Row& r, Work& w, float max, double total, int64_t allowed) {
    float threshold = kLowest;
    if (r.top_k > 0 && r.top_k < allowed) {
        const int64_t there = (int64_t)measure(w, false, threshold);
        if (r.top_k < there) threshold = cut(w, false, r.top_k, max, -kInf);
    }
    if (r.top_p < 1) {
        const bool fewer = threshold > kLowest;
        const double kept = fewer ? measure(w, true, threshold) : total;
        threshold = cut(w, true, r.top_p * kept, max, fewer ? threshold : -kInf);
    }
    return std::max(threshold, max + r.log_min_p);
}

// Choose the row's token, and score it as sampled. logits: as in `restrict_to`. weighed: the sum of the weights that they
// have already, or NaN.
void choose(const Row& r, const float* logits, int64_t V, Work& w, double weighed, Out& out, int32_t* top_ids, float* tops) {
    const Masks masks{r.words, r.allowed, r.n_words, r.n_allowed};
    const bool greedy = r.temperature == 0;
    const float temperature = greedy ? 1.0f : r.temperature;
    if (has_penalties(r)) penalise(r, V, w);
    int64_t allowed;
    float max = restrict_to(masks, temperature, logits, V, w, allowed), threshold = kLowest;
    if (!allowed) return;
    const bool diverged = max == -kInf;
    if (diverged) level(masks, V, w), max = 0;
    const bool same = weighed == weighed && allowed == V && temperature == 1 && !has_penalties(r);
    double total = weighed;
    if (!same) total = greedy && !r.wants_logprobs && !r.n_top ? kNan : weigh(w, max, draws_from_all(r));
    if (greedy) {
        out.id = first_of(w, max);
    } else {
        threshold = threshold_of(r, w, max, total, allowed);
        out.id = draw(w, threshold, (double)(philox(r.seed, r.index) >> 11) * 0x1p-53, total);
    }
    const double log_total = diverged ? kNan : std::log(total);
    if (r.wants_logprobs) out.sampled = (float)((double)(w.logits[out.id] - max) - log_total);
    if (r.n_top && r.top_of_sampled) {
        for (float& x : w.logits) x = x >= threshold ? x : -kInf;
        best(w, r.n_top, max, log_total, top_ids, tops);
    }
}

void sample_row(const float* logits, int64_t V, const Row& r, Work& w, Out& out, int32_t* top_ids, float* tops) {
    out = {-1, kNan, kNan};
    w.fit(V);
    const bool raw_tops = r.n_top && !r.top_of_sampled, raw = r.wants_logprobs || raw_tops;
    const bool copied = raw || has_penalties(r);  // else the logits are read once, where they lie
    bool finite = true;
    float max = 0;
    if (copied) max = take(logits, V, w, finite);
    const double total = raw && finite ? weigh(w, max, draws_from_all(r)) : kNan, log_total = std::log(total);
    if (raw_tops) {  // the probabilities are of all that the model has logits for, those listed have a token
        int64_t there;
        restrict_to({r.words, nullptr, r.n_words, 0}, 1.0f, w.logits.data(), V, w, there);
        best(w, r.n_top, max, log_total, top_ids, tops);
    }
    if (r.given >= 0) out.id = r.given;
    else choose(r, copied ? w.logits.data() : logits, V, w, total, out, top_ids, tops);
    if (r.wants_logprobs && out.id >= 0 && out.id < V) out.raw = (float)((double)(logits[out.id] - max) - log_total);
}

std::mutex lock;
std::vector<std::unique_ptr<Work>> idle;  // memory of rows that nobody works on

std::unique_ptr<Work> borrow() {
    std::lock_guard<std::mutex> held(lock);
    if (idle.empty()) return std::make_unique<Work>();
    auto work = std::move(idle.back());
    idle.pop_back();
    return work;
}
void give_back(std::unique_ptr<Work> work) {
    std::lock_guard<std::mutex> held(lock);
    idle.push_back(std::move(work));
}

}  // namespace

// logits [m, V]; rows and out [m]; top_ids and tops [m, n_top], of which a row fills as many as it asks for.
// share: of a step's threads, `team`, or null: then by threads begun here.
extern "C" void sample_rows(const float* logits, int64_t m, int64_t V, const Row* const* rows, Out* out, int32_t* top_ids,
                            float* tops, int64_t n_top, int64_t n_threads,
                            void (*share)(void*, int64_t, void (*)(void*, int64_t), void*), void* team) {
    auto one = [&](int64_t i) {
        auto w = borrow();
        sample_row(logits + i * V, V, *rows[i], *w, out[i], top_ids + i * n_top, tops + i * n_top);
        give_back(std::move(w));
    };
    if (m == 1) return one(0);
    if (share) return share(team, m, [](void* f, int64_t i) { (*static_cast<decltype(one)*>(f))(i); }, &one);
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t i; (i = next++) < m;) one(i);
    };
    std::vector<std::thread> others;
    for (int64_t t = 1; t < std::min(n_threads, m); ++t) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
}
