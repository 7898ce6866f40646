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

// 64 weights, two inputs of a panel's outputs. Byte j of `low` has its code in byte j % 32 of `codes`: the low four bits
// for the first 32. Their order is that in which a CPU interleaves the bytes of two vectors, sixteen by sixteen.
struct Twelve {
    static constexpr int64_t width = 2 * kPanel;
    uint8_t low[width];
    uint8_t codes[width / 2];
    static int64_t byte_of(int64_t i) { return i % 32 / 8 * 16 + i / 32 * 8 + i % 8; }  // of weight i
    int64_t code(int64_t byte) const { return codes[byte % 32] >> byte / 32 * 4 & 15; }
};
static_assert(sizeof(Twelve) == 96 && Twelve::width == 64);

inline bf16 weight_of(const Matrix& m, int64_t at) {  // one weight of a bf16 or twelve-bit matrix, by its place in it
    if (m.type == kBf16) return static_cast<const bf16*>(m.data)[at];
    const int64_t size = up(m.in, kGroup) * kPanel, panel = at / size;
    const Twelve& block = static_cast<const Twelve*>(m.data)[at / Twelve::width];
    const int64_t byte = Twelve::byte_of(at % Twelve::width), code = block.code(byte);
    for (int64_t r = m.rare_ends[panel]; !code && r < m.rare_ends[panel + 1]; ++r)
        if (m.rare[r].place == uint32_t(at % size)) return m.rare[r].value;
    return {uint16_t(block.low[byte] | m.values[code] << 8)};
}

// A panel of twelve bits, unpacked as it is multiplied.
class Unpacked {
  public:
    Unpacked(const Matrix& m, int64_t panel)
        : first_(static_cast<const Twelve*>(m.data) + panel * up(m.in, kGroup) * kPanel / Twelve::width), block_(first_),
          table_(table_of(m.values)), rare_(m.rare + m.rare_ends[panel]), end_(m.rare + m.rare_ends[panel + 1]) {
        find();
    }

    void next(WideLanes (&found)[kBlocks]) {
        prefetch(block_);
        prefetch(block_->codes);
        const Bytes low = load<Bytes>(block_->low), high = lookup(table_, load_nibbles(block_->codes));
        found[0] = (WideLanes)interleave<false>(low, high), found[1] = (WideLanes)interleave<true>(low, high);
        if (__builtin_expect(block_ == special_, false)) mend(found);
        ++block_;
    }

  private:
    void find() { special_ = rare_ < end_ ? first_ + rare_->place / Twelve::width : nullptr; }

    void mend(WideLanes (&found)[kBlocks]) {
        alignas(64) bf16 weights[Twelve::width];
        store(weights, found[0]), store(weights + 2 * kLanes, found[1]);
        for (; rare_ < end_ && first_ + rare_->place / Twelve::width == block_; ++rare_)
            weights[rare_->place % Twelve::width] = rare_->value;
        found[0] = load<WideLanes>(weights), found[1] = load<WideLanes>(weights + 2 * kLanes);
        find();
    }

    const Twelve *const first_, *block_, *special_;  // the last: the next block with a rare weight
    const Bytes table_;
    const Rare *rare_, *const end_;
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
            std::memset(blocks, 0, sizeof *blocks);
            for (int64_t i = 0; i < Twelve::width; ++i) {
                const int64_t byte = Twelve::byte_of(i);
                blocks->low[byte] = uint8_t(bits[i]);
                blocks->codes[byte % 32] |= uint8_t(codes[i] << byte / 32 * 4);
            }
        }
        rare_ends[p + 1] = found;
    }
    return found;
}
