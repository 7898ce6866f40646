// bf16 in twelve bits, without loss.

#pragma once

#include "matrix.h"

namespace {

// bf16 in twelve bits, bit for bit the same. The high byte of a bf16 value is its sign and all but the last bit of its
// exponent, and a trained matrix uses few of them: fifteen make up all but one weight in five thousand. So the low byte is
// kept as it is, and the high byte as the four bits of its place in a table. Code 0 stands for 0, and for a rare weight,
// which is listed with its value. (Three bits would leave three weights in a hundred out, and listing these costs what
// the bit saves.)
struct Rare {
    uint32_t place;  // among the weights of its panel
    bf16 value;
};

struct Twelve {  // 64 weights: 16-bit word i has the low bytes of weights 32 + i and i, byte i their codes
    static constexpr int64_t width = 64;
    uint16_t low[32];
    uint8_t codes[32];
};
static_assert(sizeof(Twelve) == 96);

inline bf16 weight_of(const Matrix& m, int64_t at) {  // one weight of a bf16 or twelve-bit matrix, by its place in it
    if (m.type == kBf16) return static_cast<const bf16*>(m.data)[at];
    const int64_t size = up(m.in, kGroup) * kPanel, panel = at / size;
    const Twelve& block = static_cast<const Twelve*>(m.data)[at / Twelve::width];
    const int64_t i = at % 32;
    const bool second = at % Twelve::width >= 32;
    const uint8_t code = second ? block.codes[i] & 15 : block.codes[i] >> 4;
    for (int64_t r = m.rare_ends[panel]; !code && r < m.rare_ends[panel + 1]; ++r)
        if (m.rare[r].place == uint32_t(at % size)) return m.rare[r].value;
    const uint16_t low = second ? block.low[i] & 0xff : block.low[i] >> 8;
    return {uint16_t(low | m.values[code] << 8)};
}

// A panel of twelve bits, unpacked slice by slice into the nearest cache.
class Unpacked {
  public:
    Unpacked(const Matrix& m, int64_t panel)
        : blocks_(static_cast<const Twelve*>(m.data) + panel * up(m.in, kGroup) * kPanel / Twelve::width),
          table_(table_of(m.values)), rare_(m.rare + m.rare_ends[panel]), end_(m.rare + m.rare_ends[panel + 1]) {}

    const bf16* operator()(int64_t i) {
        unpack(i, slice_);
        return slice_;
    }

    void unpack(int64_t i, bf16* to) {  // in ascending order of i
        const Twelve* block = blocks_ + i * kPanel / Twelve::width;
        const Twelve* const end = block + kSlice * kPanel / Twelve::width;
        for (bf16* at = to; block < end; ++block, at += Twelve::width) {
            prefetch(block);
            prefetch(block->codes);
            const Words low = load<Words>(block->low);
            const Words codes = load_bytes(block->codes);
            const Words high = (Words)lookup(table_, (Bytes)((codes | codes << 4) & 0x0f0f));
            const Words first = low >> 8 | (high & 0xff00), second = (low & 0x00ff) | high << 8;
            store(at, first), store(at + 32, second);
        }
        for (; rare_ < end_ && rare_->place < (i + kSlice) * kPanel; ++rare_) to[rare_->place - i * kPanel] = rare_->value;
    }

  private:
    const Twelve* const blocks_;
    const Bytes table_;
    const Rare *rare_, *const end_;
    alignas(64) bf16 slice_[kSlice * kPanel];
};

}  // namespace

// Panels of bf16 in twelve bits: `blocks` has three quarters of their size. Writes the table of 16 high bytes, and for the
// rare weights (as many as `room` takes) their places and values, and where each panel's end. Returns how many there are.
extern "C" int64_t arriero_pack_twelve(const uint16_t* panels, int64_t n_panels, int64_t size, Twelve* blocks,
                                       uint8_t* values, Rare* rare, int64_t room, int64_t* rare_ends) {
    int64_t counts[256] = {};
    const int64_t total = n_panels * size;
    for (int64_t i = 0; i < total; ++i) ++counts[panels[i] >> 8];
    uint8_t code_of[256];
    std::fill(code_of, code_of + 256, uint8_t(16));
    values[0] = 0, code_of[0] = 0;
    for (int code = 1; code < 16; ++code) {
        const auto most = std::max_element(counts + 1, counts + 256);
        values[code] = uint8_t(most - counts), code_of[values[code]] = uint8_t(code);
        *most = -1;
    }
    int64_t found = 0;
    rare_ends[0] = 0;
    for (int64_t p = 0; p < n_panels; ++p) {
        for (int64_t j = 0; j < size; j += Twelve::width, ++blocks) {
            uint16_t bits[Twelve::width];
            uint8_t codes[Twelve::width];
            std::memcpy(bits, panels + p * size + j, sizeof bits);
            for (int64_t i = 0; i < Twelve::width; ++i) {
                codes[i] = code_of[bits[i] >> 8];
                if (codes[i] < 16) continue;
                if (found < room) rare[found] = {uint32_t(j + i), {bits[i]}};
                ++found, codes[i] = 0, bits[i] = 0;
            }
            for (int64_t i = 0; i < 32; ++i) {
                blocks->low[i] = uint16_t(bits[i] << 8 | (bits[32 + i] & 0xff));
                blocks->codes[i] = uint8_t(codes[i] << 4 | codes[32 + i]);
            }
        }
        rare_ends[p + 1] = found;
    }
    return found;
}
