// Vectors of sixteen floats and the few functions on them that every kernel shares.
//
// Vectors are the compilers' own extension, so AVX-512, AVX2 and NEON come from one source; what a CPU has an instruction
// for beyond that stands in one #if each, with a plain twin of the same bits beside it.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr int64_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(64)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t IntLanes __attribute__((vector_size(64)));
typedef uint32_t WideLanes __attribute__((vector_size(64)));
typedef uint16_t HalfLanes __attribute__((vector_size(32)));
typedef uint16_t Words __attribute__((vector_size(64)));
typedef uint8_t HalfBytes __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(64)));

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct bf16 {
    uint16_t bits;
};

template <class V, class T>
inline V load(const T* p) {
    V lanes;
    std::memcpy(&lanes, p, sizeof lanes);
    return lanes;
}

inline Lanes load_lanes(const float* p) { return load<Lanes>(p); }

inline Lanes load_lanes(const bf16* p) {
    const HalfLanes half = load<HalfLanes>(p);
    return (Lanes)(__builtin_convertvector(half, WideLanes) << 16);
}

inline void store(float* p, Lanes lanes) { std::memcpy(p, &lanes, sizeof lanes); }

inline Lanes all(float x) { return Lanes{} + x; }

inline float widen(float x) { return x; }

inline float widen(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void narrow(float x, float* to) { *to = x; }

inline void narrow(float x, bf16* to) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline HalfLanes narrow(Lanes x) {  // the same, of sixteen
    const WideLanes bits = (WideLanes)x;
    const WideLanes rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const WideLanes kept = x != x ? WideLanes{} + 0x7fc0 : rounded;
    return __builtin_convertvector(kept, HalfLanes);
}

inline void store(bf16* p, Lanes lanes) {
    const HalfLanes half = narrow(lanes);
    std::memcpy(p, &half, sizeof half);
}

inline void round(const float* from, bf16* to, float* wide) {  // sixteen values as bf16, and widened again
    const HalfLanes half = narrow(load_lanes(from));
    std::memcpy(to, &half, sizeof half);
    store(wide, (Lanes)(__builtin_convertvector(half, WideLanes) << 16));
}

inline float sum(Lanes lanes) {
    Eight half[2];
    std::memcpy(half, &lanes, sizeof half);
    half[0] += half[1];
    Four quarter[2];
    std::memcpy(quarter, half, sizeof quarter);
    quarter[0] += quarter[1];
    return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

inline float largest(Lanes lanes) {
    float values[kLanes];
    store(values, lanes);
    return *std::max_element(values, values + kLanes);
}

inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

// e^x, relative error below 3e-7 on [-87, 88], clamped outside: 2^whole * 2^part with |part| <= 1/2.
inline Lanes exponential(Lanes x) {
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    const Lanes magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const Lanes shifted = x * 1.44269504f + magic;
    const Lanes whole = shifted - magic;
    const Lanes part = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // x - whole * ln 2, in two parts
    Lanes series = part * (1.0f / 720) + 1.0f / 120;
    series = series * part + 1.0f / 24;
    series = series * part + 1.0f / 6;
    series = series * part + 0.5f;
    series = series * part + 1.0f;
    series = series * part + 1.0f;
    return (Lanes)((IntLanes)series + (__builtin_convertvector(whole, IntLanes) << 23));
}

// Sixteen values of IEEE's half precision, widened.
inline Lanes load_half(const uint16_t* p) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    Eight wide[2] = {(Eight)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
                     (Eight)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
    return load<Lanes>(wide);
#else
    const WideLanes bits = __builtin_convertvector(load<HalfLanes>(p), WideLanes);
    // exponent and mantissa moved to their places and multiplied by 2^112: right for subnormals as well
    const Lanes value = (Lanes)((bits & 0x7fff) << 13) * 5.192296858534828e33f;
    return (Lanes)((WideLanes)value | (bits & 0x8000) << 16);
#endif
}

// Memory that grows when it must and is kept from step to step.
template <class T>
class Buffer {
  public:
    T* get(int64_t count) {
        if (count > size_) {
            size_ = count + count / 4;
            memory_.reset(static_cast<T*>(::operator new(size_t(size_) * sizeof(T), std::align_val_t(64))));
            std::memset(static_cast<void*>(memory_.get()), 0, size_t(size_) * sizeof(T));
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
    };
    std::unique_ptr<T, Free> memory_;
    int64_t size_ = 0;
};


}  // namespace
