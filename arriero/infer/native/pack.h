// Packing: from matrices as checkpoints have them to panels.

#pragma once

#include "matrix.h"

// Packing: from matrices as checkpoints have them, [out, in] row after row, to panels. `in` of the panels is padded to a
// multiple of 32, `out` to one of 64, with zeros. Panels first..last, so that threads may share the work.
namespace {

// place(p, i, o, weight) for the weights of these panels, input i of output o.
template <class T, class Place>
void each_weight(const T* from, int64_t out, int64_t in, int64_t first, int64_t last, Place place) {
    for (int64_t p = first; p < last; ++p)
        for (int64_t o = 0; o < kPanel; ++o)
            for (int64_t i = 0; i < up(in, kGroup); ++i) {
                const int64_t row = p * kPanel + o;
                place(p, i, o, row < out && i < in ? from[row * in + i] : T(0));
            }
}

}  // namespace

extern "C" void arriero_pack_float(const float* from, int64_t out, int64_t in, int64_t first, int64_t last, float* to) {
    const int64_t width = up(in, kGroup);
    each_weight(from, out, in, first, last,
                [=](int64_t p, int64_t i, int64_t o, float w) { to[(p * width + i) * kPanel + o] = w; });
}

extern "C" void arriero_pack_bf16(const uint16_t* from, int64_t out, int64_t in, int64_t first, int64_t last,
                                  uint16_t* to) {
    const int64_t width = up(in, kGroup);
    each_weight(from, out, in, first, last, [=](int64_t p, int64_t i, int64_t o, uint16_t w) {
        to[(p * width + i / 2 * 2) * kPanel + 2 * o + i % 2] = w;
    });
}

// codes int8 [out, in]; the padding reads as 0, which is 128 here.
extern "C" void arriero_pack_int8(const int8_t* from, int64_t out, int64_t in, int64_t first, int64_t last,
                                  uint8_t* to) {
    const int64_t width = up(in, kGroup);
    each_weight(from, out, in, first, last, [=](int64_t p, int64_t i, int64_t o, int8_t code) {
        to[(p * width + i / 4 * 4) * kPanel + 4 * o + i % 4] = uint8_t(code + 128);
    });
}

// codes uint8 0..15 [out, in]. Of a group's 32 inputs, 4 q..4 q + 3 lie in the low halves of byte vector q, and 16 more
// than these in the high halves. Padding has code 0; its activations are 0, so that it adds nothing.
extern "C" void arriero_pack_int4(const uint8_t* from, int64_t out, int64_t in, int64_t first, int64_t last,
                                  uint8_t* to) {
    const int64_t width = up(in, kGroup);
    const auto code = [&](int64_t row, int64_t i) { return row < out && i < in ? from[row * in + i] : uint8_t(0); };
    for (int64_t p = first; p < last; ++p)
        for (int64_t o = 0; o < kPanel; ++o)
            for (int64_t g = 0; g < width; g += kGroup)
                for (int64_t i = 0; i < kGroup / 2; ++i) {
                    const int64_t row = p * kPanel + o, at = (p * width + g) * kPanel / 2 + i / 4 * 4 * kPanel;
                    to[at + 4 * o + i % 4] = uint8_t(code(row, g + i) | code(row, g + i + kGroup / 2) << 4);
                }
}
