// Cuts a batch of documents into words, lines and paragraphs; analysis_twin.py is the same in Python, and says what the
// steps mean. Texts come as UTF-32, one after another; bits and folds of characters come as tables.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

enum Class : uint16_t {  // as in characters.py
    SPACE = 1 << 0, ALPHA = 1 << 1, ALNUM = 1 << 2, DIGIT = 1 << 3, UPPER = 1 << 4, LOWER = 1 << 5, SYMBOL = 1 << 6,
    PREFIX = 1 << 7, SUFFIX = 1 << 8, ICON = 1 << 9, CURRENCY = 1 << 10, HYPHEN = 1 << 11, UNSPACED = 1 << 12,
    TERMINAL = 1 << 13, APOSTROPHE = 1 << 14, QUOTE = 1 << 15,
};
enum WordKind : uint8_t { HAS_LETTER = 1, IS_SYMBOL = 2, AFTER_SPACE = 4, ENDS_SENTENCE = 8 };  // as in spans.py
enum LineKind : uint8_t { BLANK = 1, ENDS_TERMINAL = 2, STARTS_BULLET = 4, ENDS_ELLIPSIS = 8 };

constexpr uint64_t MULTIPLIER = 0x9E3779B97F4A7C15ull, FINAL = 0xD6E8FEB86659FD93ull;
constexpr int64_t LONGEST_UNIT = 4, LONGEST_WHOLE = 8;  // characters, of the lists in lexicon.py

inline uint64_t step(uint64_t hash, uint64_t value) { return (hash ^ value) * MULTIPLIER; }

inline uint64_t mix(uint64_t hash) {
    hash = (hash ^ (hash >> 32)) * FINAL;
    return hash ^ (hash >> 29);
}

struct Pieces {
    int64_t *start, *length;
    uint64_t *hash;
    uint8_t *kind;
    int64_t *first;
    int64_t count;

    void add(int64_t from, int64_t to, uint64_t its_hash, uint8_t its_kind) {
        start[count] = from, length[count] = to - from, hash[count] = its_hash, kind[count] = its_kind;
        ++count;
    }
};

struct Hashes {  // sorted
    const uint64_t *begin;
    int64_t size;

    bool has(uint64_t hash) const {
        int64_t low = 0, high = size;
        while (low < high) {
            int64_t middle = (low + high) / 2;
            (begin[middle] < hash ? low : high) = begin[middle] < hash ? middle + 1 : middle;
        }
        return low < size && begin[low] == hash;
    }
};

struct Scanner {
    const uint32_t *s;
    const uint16_t *classes;
    const uint32_t *folds;
    int64_t limit;
    Hashes whole, contracting, units;
    Pieces words, lines, paragraphs;
    uint64_t *folded;
    std::vector<int64_t> tails;  // where each suffix begins, from the right
    uint8_t after_space;         // for the next word

    uint16_t bits(int64_t i) const { return classes[s[i] < limit ? s[i] : limit - 1]; }
    bool is(int64_t i, int bit) const { return bits(i) & bit; }

    uint64_t hash(int64_t from, int64_t to) const {
        uint64_t value = MULTIPLIER;
        for (int64_t i = from; i < to; ++i) value = step(value, s[i]);
        return mix(value);
    }

    uint64_t fold_hash(int64_t from, int64_t to) const {
        uint64_t value = MULTIPLIER;
        bool any = false, after_digit = false;
        for (int64_t i = from; i < to; ++i) {
            uint32_t fold = s[i] < limit ? folds[s[i]] : 0;
            if (!fold) continue;
            bool digit = is(i, DIGIT);
            if (!(digit && after_digit)) value = step(value, fold);
            any = true, after_digit = digit;
        }
        return any ? mix(value) : 0;
    }

    // ---- words

    void word(int64_t from, int64_t to) {
        uint64_t value = MULTIPLIER, fold_value = MULTIPLIER;
        bool any = false, after_digit = false;
        uint16_t some = 0, all = 0xFFFF;
        for (int64_t i = from; i < to; ++i) {
            uint32_t c = s[i] < limit ? s[i] : limit - 1;
            uint16_t b = classes[c];
            some |= b, all &= b;
            value = step(value, s[i]);
            if (uint32_t fold = folds[c]) {
                bool digit = b & DIGIT;
                if (!(digit && after_digit)) fold_value = step(fold_value, fold);
                any = true, after_digit = digit;
            }
        }
        folded[words.count] = any ? mix(fold_value) : 0;
        uint8_t kind = (some & ALPHA ? HAS_LETTER : 0) | (all & SYMBOL ? IS_SYMBOL : 0) | after_space |
                       (to - from == 1 && all & TERMINAL ? ENDS_SENTENCE : 0);
        after_space = 0;
        words.add(from, to, mix(value), kind);
    }

    int64_t dots(int64_t i, int64_t end) const {
        int64_t from = i;
        while (i < end && s[i] == '.') ++i;
        return i - from;
    }

    bool cannot(int64_t from, int64_t to) const {
        const char *word = "annot";
        if (to - from != 6 || (s[from] | 32) != 'c') return false;
        for (int i = 0; i < 5; ++i)
            if (s[from + 1 + i] != uint32_t(word[i])) return false;
        return true;
    }

    // Where to cut what stays whole (at its end) or a contraction; 0 for anything else.
    int64_t special(int64_t from, int64_t to) const {
        int64_t length = to - from;
        if (length == 2 && s[to - 1] == '.' && is(from, LOWER) && !is(from, UPPER)) return to;
        if (length <= LONGEST_WHOLE && whole.has(hash(from, to))) return to;
        if (cannot(from, to)) return from + 3;
        int64_t at = length >= 2 && is(to - 2, APOSTROPHE) ? to - 2 : to - 3;
        if (at <= from || !is(at, APOSTROPHE)) return 0;
        auto lower = [&](int64_t i) { return s[i] >= 'A' && s[i] <= 'Z' ? s[i] + 32 : s[i]; };
        bool two = at + 2 < to;
        uint32_t a = lower(at + 1), b = two ? lower(at + 2) : 0;
        if (a == 't' && !two)
            return at - from >= 2 && (s[at - 1] | 32) == 'n' && is(at - 2, ALPHA) ? at - 1 : 0;
        bool tail = two ? (a == 'l' && b == 'l') || (a == 'r' && b == 'e') || (a == 'v' && b == 'e') : a == 'd' || a == 'm';
        return tail && contracting.has(fold_hash(from, at)) ? at : 0;
    }

    // Length of what comes off the beginning; 0 for nothing.
    int64_t prefix(int64_t from, int64_t to) const {
        if (to - from > 1 && s[from] == '\'' && s[from + 1] == '\'') return 2;
        if (is(from, PREFIX)) return s[from] == '+' && from + 1 < to && is(from + 1, DIGIT) ? 0 : 1;
        int64_t run = dots(from, to);
        return run > 1 ? run : 0;
    }

    // Length of what comes off the end; 0 for nothing.
    int64_t suffix(int64_t from, int64_t to) const {
        uint32_t last = s[to - 1];
        uint16_t before = to - from > 1 ? bits(to - 2) : 0;
        if (is(to - 1, SUFFIX)) return to - from > 1 && last == '\'' && s[to - 2] == '\'' ? 2 : 1;
        if ((last == 's' || last == 'S') && before & APOSTROPHE) return 2;
        if (last == '.') {
            int64_t run = 1;
            while (run < to - from && s[to - 1 - run] == '.') ++run;
            if (run > 1) return run;
            if (to - from < 2) return 0;
            uint32_t c = s[to - 2];
            bool two_capitals = before & UPPER && to - from > 2 && is(to - 3, UPPER);
            return before & (DIGIT | LOWER | SUFFIX) || c == '%' || c == 0xB2 || c == '-' || c == '+' || two_capitals;
        }
        if ((last == '+' || is(to - 1, CURRENCY)) && before & DIGIT) return 1;
        return unit(from, to);
    }

    // Length of a unit that ends a number.
    int64_t unit(int64_t from, int64_t to) const {
        int64_t length = 0;
        while (length < to - from && length < LONGEST_UNIT && !is(to - length - 1, DIGIT)) ++length;
        bool after_number = length > 0 && length < to - from && is(to - length - 1, DIGIT);
        return after_number && units.has(hash(to - length, to)) ? length : 0;
    }

    bool address(int64_t from, int64_t to) const {
        if (to - from >= 4 && s[from] == 'w' && s[from + 1] == 'w' && s[from + 2] == 'w' && s[from + 3] == '.') return true;
        int64_t slash = from;
        while (slash < to && s[slash] != '/') ++slash;
        if (slash < from + 1 || slash + 1 >= to) return false;
        if (s[slash - 1] == ':' && s[slash + 1] == '/') {
            for (int64_t i = from; i < slash - 1; ++i)
                if (!is(i, ALPHA)) return false;
            return slash > from + 1;
        }
        int64_t dot = slash - 1;
        while (dot > from && s[dot] != '.') {
            if (!is(dot, ALPHA)) return false;
            --dot;
        }
        return dot > from && slash - dot > 2;
    }

    // Length of the infix at i; 0 for none.
    int64_t infix(int64_t i, int64_t to) const {
        uint32_t c = s[i];
        uint16_t kind = bits(i), before = bits(i - 1), after = i + 1 < to ? bits(i + 1) : 0;
        if (kind & ICON) return 1;
        if (c == '.') {
            int64_t run = dots(i, to);
            return run > 1 ? run : before & (LOWER | QUOTE) && after & (UPPER | QUOTE);
        }
        if (before & DIGIT && (c == '+' || c == '-' || c == '*' || c == '^') && i + 1 < to &&
            (after & DIGIT || s[i + 1] == '-'))
            return 1;
        if (c == ',') return before & ALPHA && after & ALPHA;
        if (kind & HYPHEN) {
            int64_t end = i;
            while (end < to && is(end, HYPHEN)) ++end;
            return before & (ALPHA | DIGIT) && end < to && is(end, ALPHA) ? end - i : 0;
        }
        bool joins = c == ':' || c == '<' || c == '>' || c == '=' || c == '/';
        return joins && before & (ALPHA | DIGIT) && after & ALPHA;
    }

    // A token between infixes: each letter of a script without spaces stands alone.
    void letters_alone(int64_t from, int64_t to) {
        for (int64_t i = from + 1; i < to; ++i)
            if (is(i, UNSPACED) || (is(i - 1, UNSPACED) && is(i, ALNUM | SYMBOL))) word(from, i), from = i;
        if (from < to) word(from, to);
    }

    // A run without white space, and the bits that some and all of its characters have.
    void cut(int64_t from, int64_t to, uint16_t some, uint16_t all) {
        tails.clear();
        after_space = AFTER_SPACE;
        if (all & ALPHA && !(some & UNSPACED) && !cannot(from, to)) return word(from, to);
        int64_t at = 0, end = to;
        while (from < end && !(at = special(from, end))) {
            if (int64_t length = prefix(from, end)) {
                word(from, from + length);
                from += length;
            } else if (int64_t length = suffix(from, end)) {
                end -= length;
                tails.push_back(end);
            } else {
                break;
            }
        }
        if (from < end) {
            if (at) {
                word(from, at);
                if (at < end) word(at, end);
            } else if (address(from, end)) {
                word(from, end);
            } else {
                int64_t last = from;
                for (int64_t i = from + 1; i < end;) {
                    if (int64_t length = infix(i, end)) {
                        letters_alone(last, i);
                        word(i, i + length);
                        last = i = i + length;
                    } else {
                        ++i;
                    }
                }
                letters_alone(last, end);
            }
        }
        for (size_t n = tails.size(); n-- > 0;) word(tails[n], n > 0 ? tails[n - 1] : to);
    }

    // ---- lines and paragraphs

    void line(int64_t from, int64_t to) {
        int64_t left = from, right = to;
        while (left < right && is(left, SPACE)) ++left;
        while (left < right && is(right - 1, SPACE)) --right;
        uint8_t kind = (left == right ? BLANK : 0) | (to > from && is(to - 1, TERMINAL) ? ENDS_TERMINAL : 0);
        if (left < right) {
            if (s[left] == 0x2022 || s[left] == '-') kind |= STARTS_BULLET;
            bool three = right - left >= 3 && s[right - 1] == '.' && s[right - 2] == '.' && s[right - 3] == '.';
            if (s[right - 1] == 0x2026 || three) kind |= ENDS_ELLIPSIS;
        }
        lines.add(from, to, hash(from, to), kind);
    }

    int64_t document(int64_t from, int64_t to) {
        int64_t alphanumeric = 0, run = -1, last = from;
        uint16_t some = 0, all = 0;  // bits of any and of every character in the run
        for (int64_t i = from; i < to; ++i) {
            uint16_t kind = bits(i);
            alphanumeric += (kind & ALNUM) > 0;
            if (kind & SPACE) {
                if (run >= 0) cut(run, i, some, all), run = -1;
                if (s[i] == '\n') line(last, i), last = i + 1;
            } else {
                if (run < 0) run = i, some = 0, all = 0xFFFF;
                some |= kind, all &= kind;
            }
        }
        if (run >= 0) cut(run, to, some, all);
        line(last, to);

        int64_t left = from, right = to;
        while (left < right && is(left, SPACE)) ++left;
        while (left < right && is(right - 1, SPACE)) --right;
        for (int64_t i = last = left; i < right; ++i)
            if (s[i] == '\n' && s[i + 1] == '\n') {
                paragraphs.add(last, i, hash(last, i), 0);
                while (s[i + 1] == '\n') ++i;
                last = i + 1;
            }
        paragraphs.add(last, right, hash(last, right), 0);
        return alphanumeric;
    }
};

}  // namespace

// sizes: of the character tables, and of the three sorted lists of hashes. Each `first` begins with 0.
extern "C" void scan(const uint32_t *points, const int64_t *documents, int64_t count, const uint16_t *classes,
                     const uint32_t *folds, const uint64_t *whole, const uint64_t *contracting,
                     const uint64_t *units, const int64_t *sizes,
                     int64_t *word_start, int64_t *word_length, uint64_t *word_hash, uint8_t *word_kind, int64_t *word_first,
                     int64_t *line_start, int64_t *line_length, uint64_t *line_hash, uint8_t *line_kind, int64_t *line_first,
                     int64_t *paragraph_start, int64_t *paragraph_length, uint64_t *paragraph_hash,
                     uint8_t *paragraph_kind, int64_t *paragraph_first, uint64_t *folded, int64_t *alphanumeric) {
    Scanner scanner{points, classes, folds, sizes[0],
                    {whole, sizes[1]}, {contracting, sizes[2]}, {units, sizes[3]},
                    {word_start, word_length, word_hash, word_kind, word_first, 0},
                    {line_start, line_length, line_hash, line_kind, line_first, 0},
                    {paragraph_start, paragraph_length, paragraph_hash, paragraph_kind, paragraph_first, 0},
                    folded, {}, 0};
    for (int64_t d = 0; d < count; ++d) {
        alphanumeric[d] = scanner.document(documents[d], documents[d + 1]);
        word_first[d + 1] = scanner.words.count;
        line_first[d + 1] = scanner.lines.count;
        paragraph_first[d + 1] = scanner.paragraphs.count;
    }
}
