// Repeated n-grams within groups of words; ngrams.py says what is counted, and does the same in Python.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr uint64_t MULTIPLIER = 0x9E3779B97F4A7C15ull, FINAL = 0xD6E8FEB86659FD93ull;

struct Slot {
    uint64_t key;
    uint32_t round;  // the slot is empty unless this is the table's
    int32_t count;
    int64_t position;  // of the first
};

// n-gram -> how often and where first; emptied in no time.
class Table {
  public:
    void begin(int64_t most) {
        size_t size = 64;
        while (size < size_t(most) * 2) size *= 2;
        if (size > slots.size()) slots.assign(size, Slot{0, 0, 0, 0}), round = 0;
        mask = size - 1;
        if (++round == 0) slots.assign(slots.size(), Slot{0, 0, 0, 0}), round = 1;
    }

    Slot &at(uint64_t key) {  // count 0 where it is new
        size_t i = ((key ^ (key >> 32)) * FINAL >> 20) & mask;
        while (slots[i].round == round && slots[i].key != key) i = (i + 1) & mask;
        if (slots[i].round != round) slots[i] = Slot{key, round, 0, 0};
        return slots[i];
    }

  private:
    std::vector<Slot> slots;
    uint32_t round = 0;
    size_t mask = 0;
};

// Walks n = 1, 2, ... over one group and keeps the positions whose n-gram occurs more than once.
struct Walk {
    const uint64_t *hashes;
    int64_t words, n = 0;
    std::vector<uint64_t> gram;     // of the n-gram at each position
    std::vector<int64_t> positions;  // where an n-gram that repeats may begin
    Table table;
    int64_t best_count, best_position;

    void begin(const uint64_t *its_hashes, int64_t its_words) {
        hashes = its_hashes, words = its_words, n = 1;
        gram.assign(hashes, hashes + words);
        positions.resize(std::max<int64_t>(words, 0));
        for (int64_t i = 0; i < words; ++i) positions[i] = i;
    }

    void longer() {  // n + 1; positions whose n-gram and the next one's both repeat
        ++n;
        size_t kept = 0;
        for (size_t j = 0; j < positions.size(); ++j) {
            int64_t i = positions[j];
            bool all = int64_t(positions.size()) == words - n + 2;
            if (i + n <= words && (all || (j + 1 < positions.size() && positions[j + 1] == i + 1))) {
                gram[i] = (gram[i] * MULTIPLIER) ^ hashes[i + n - 1];  // the order of words counts
                positions[kept++] = i;
            }
        }
        positions.resize(kept);
    }

    void count() {  // keep what repeats; the most frequent n-gram, the earliest of equals
        best_count = words >= n ? 1 : 0, best_position = 0;
        table.begin(positions.size());
        for (int64_t i : positions) {
            Slot &slot = table.at(gram[i]);
            if (slot.count++ == 0) slot.position = i;
            if (slot.count > best_count || (slot.count == best_count && slot.position < best_position))
                best_count = slot.count, best_position = slot.position;
        }
        if (best_count < 2) {
            positions.clear();
            return;
        }
        size_t kept = 0;
        for (int64_t i : positions)
            if (table.at(gram[i]).count > 1) positions[kept++] = i;
        positions.resize(kept);
    }
};

template <class Measure>
void each_group(const uint64_t *hashes, const int64_t *first, int64_t groups, const int64_t *sizes, int64_t n_sizes,
                int64_t *out, Measure measure) {
    Walk walk;
    for (int64_t g = 0; g < groups; ++g) {
        int64_t from = first[g];
        walk.begin(hashes + from, first[g + 1] - from);
        for (int64_t k = 0; k < n_sizes; ++k) {
            while (walk.n < sizes[k]) {
                walk.longer();
                walk.count();
            }
            out[g * n_sizes + k] = measure(walk, from);
        }
    }
}

}  // namespace

extern "C" {

void top_ngram(const uint64_t *hashes, const int64_t *lengths, const int64_t *first, int64_t groups, const int64_t *sizes,
               int64_t n_sizes, int64_t *out) {
    each_group(hashes, first, groups, sizes, n_sizes, out, [&](Walk &walk, int64_t from) -> int64_t {
        if (walk.words < walk.n) return 0;
        int64_t characters = walk.n - 1;
        for (int64_t i = 0; i < walk.n; ++i) characters += lengths[from + walk.best_position + i];
        return characters * walk.best_count;
    });
}

void duplicate_ngrams(const uint64_t *hashes, const int64_t *lengths, const int64_t *first, int64_t groups,
                      const int64_t *sizes, int64_t n_sizes, int64_t *out) {
    Table seen;
    each_group(hashes, first, groups, sizes, n_sizes, out, [&](Walk &walk, int64_t from) {
        seen.begin(walk.positions.size());
        int64_t characters = 0, next = 0;
        for (int64_t i : walk.positions) {
            if (i < next) continue;
            if (seen.at(walk.gram[i]).count++ == 0) continue;
            for (int64_t j = 0; j < walk.n; ++j) characters += lengths[from + i + j];
            next = i + walk.n;
        }
        return characters;
    });
}

void ngram_coverage(const uint64_t *hashes, const int64_t *lengths, const int64_t *first, int64_t groups,
                    const int64_t *sizes, int64_t n_sizes, int64_t *out) {
    each_group(hashes, first, groups, sizes, n_sizes, out, [&](Walk &walk, int64_t from) {
        int64_t characters = 0, next = 0;
        for (int64_t i : walk.positions)
            for (int64_t j = std::max(i, next); j < i + walk.n; ++j) characters += lengths[from + j], next = j + 1;
        return characters;
    });
}

}  // extern "C"
