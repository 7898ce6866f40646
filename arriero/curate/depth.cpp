// Whether a page nests too deeply or has a tag with too many attributes; depth.py says what counts, and what is done.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

namespace {

using View = std::string_view;

bool is_space(unsigned char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
unsigned char lower(unsigned char c) { return c >= 'A' && c <= 'Z' ? c + 32 : c; }
bool is_letter(unsigned char c) { return lower(c) >= 'a' && lower(c) <= 'z'; }
bool is_word(unsigned char c) { return is_letter(c) || (c >= '0' && c <= '9') || c == '_'; }

uint64_t hash(View name) {
    uint64_t h = 14695981039346656037ull;
    for (unsigned char c : name) h = (h ^ lower(c)) * 1099511628211ull;
    return h;
}

bool starts(View page, size_t at, View with) {  // in any case; `with` is in lower case
    if (page.size() - at < with.size()) return false;
    for (size_t i = 0; i < with.size(); i++)
        if (lower(page[at + i]) != (unsigned char)with[i]) return false;
    return true;
}

// Names with a space between them, as hashes.
struct Names {
    explicit Names(const char *names) {
        for (View rest(names); !rest.empty();) {
            size_t end = std::min(rest.find(' '), rest.size());
            hashes.push_back(hash(rest.substr(0, end)));
            rest.remove_prefix(std::min(end + 1, rest.size()));
        }
    }
    bool has(uint64_t name) const {
        for (uint64_t h : hashes)
            if (h == name) return true;
        return false;
    }
    std::vector<uint64_t> hashes;
};

constexpr View RAW[] = {"script", "style", "textarea", "title", "xmp"};

// Where the text ends that begins with such a tag at `at`, in which no tag counts; `at` itself for any other tag.
size_t end_of_raw(View page, size_t at) {
    for (View name : RAW) {
        size_t i = at + 1 + name.size();
        if (!starts(page, at + 1, name) || (i < page.size() && is_word(page[i]))) continue;
        while ((i = page.find("</", i)) != View::npos) {
            if (starts(page, i + 2, name)) return i + 2 + name.size();
            i += 2;
        }
        return page.size();
    }
    return at;
}

void close(std::vector<uint64_t> &open, uint64_t name, const Names &walls) {
    bool is_open = false;
    for (uint64_t h : open) is_open |= h == name;
    for (size_t i = open.size(); is_open && i-- > 0;) {
        if (open[i] == name) return open.resize(i);
        if (walls.has(open[i])) return;
    }
}

}  // namespace

extern "C" int exceeds(const char *data, int64_t size, int64_t deepest, int64_t most_attributes, const char *flat_names,
                       const char *wall_names) {
    View page(data, size);
    Names flat(flat_names), walls(wall_names);
    std::vector<uint64_t> open;
    for (size_t at = 0; (at = page.find('<', at)) != View::npos;) {
        if (starts(page, at + 1, "!--")) {
            size_t end = page.find("-->", at + 4);
            at = end == View::npos ? page.size() : end + 3;
            continue;
        }
        if (size_t end = end_of_raw(page, at); end != at) {
            at = end;
            continue;
        }
        bool closes = at + 1 < page.size() && page[at + 1] == '/';
        size_t begin = at + 1 + closes, i = begin;
        if (i >= page.size() || !is_letter(page[i])) {
            at++;
            continue;
        }
        while (i < page.size() && !is_space(page[i]) && page[i] != '/' && page[i] != '>') i++;
        uint64_t name = hash(page.substr(begin, i - begin));
        int64_t attributes = 0;
        for (bool in_word = false; i < page.size() && page[i] != '>'; i++) {
            bool space = is_space(page[i]);
            attributes += !space && !in_word;
            in_word = !space;
        }
        if (attributes > most_attributes) return 1;
        at = i < page.size() ? i + 1 : i;
        if (flat.has(name)) continue;
        if (closes) {
            close(open, name, walls);
        } else {
            open.push_back(name);
            if ((int64_t)open.size() > deepest) return 1;
        }
    }
    return 0;
}
