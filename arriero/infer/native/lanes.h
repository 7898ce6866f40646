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
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#define UNROLL _Pragma("GCC unroll 16")  // whole: the numbers in arrays then live in registers
#define ROLLED _Pragma("GCC unroll 1")   // not at all: GCC would gather what the rounds prefetch into one burst, which stalls

constexpr int64_t kLanes = 16;

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#if defined(__AVX512BW__)
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t IntLanes __attribute__((vector_size(64)));
typedef uint32_t WideLanes __attribute__((vector_size(64)));
typedef uint16_t Words __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));

template <class Mask, class V>
inline V select(Mask mask, V yes, V no) {
    return mask ? yes : no;
}

template <class To, class From>
inline To convert(From from) {
    return __builtin_convertvector(from, To);
}
#else
// Vectors wider than the CPU's in halves, which may be in halves themselves. (GCC takes them apart into single numbers.)
template <class V>
struct Two {
    V lo, hi;
    template <class W>
    explicit operator Two<W>() const {  // the same bits
        return {(W)lo, (W)hi};
    }
    auto operator[](int64_t i) const {
        constexpr int64_t half = sizeof(V) / sizeof(lo[0]);
        return i < half ? lo[i] : hi[i - half];
    }
};

#define ARRIERO_OPERATOR(op)                                                                  \
    template <class V>                                                                        \
    inline auto operator op(const Two<V>& a, const Two<V>& b) {                               \
        return Two<decltype(a.lo op b.lo)>{a.lo op b.lo, a.hi op b.hi};                       \
    }                                                                                         \
    template <class V, class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>            \
    inline auto operator op(const Two<V>& a, T b) {                                           \
        using Number = std::decay_t<decltype(a[0])>;                                          \
        return Two<decltype(a.lo op Number(b))>{a.lo op Number(b), a.hi op Number(b)};        \
    }
ARRIERO_OPERATOR(+)
ARRIERO_OPERATOR(-)
ARRIERO_OPERATOR(*)
ARRIERO_OPERATOR(/)
ARRIERO_OPERATOR(&)
ARRIERO_OPERATOR(|)
ARRIERO_OPERATOR(<<)
ARRIERO_OPERATOR(>>)
ARRIERO_OPERATOR(<)
ARRIERO_OPERATOR(>)
ARRIERO_OPERATOR(!=)
#undef ARRIERO_OPERATOR

template <class V>
inline Two<V>& operator+=(Two<V>& a, const Two<V>& b) {
    return a = a + b;
}

template <class V>
inline Two<V> operator-(const Two<V>& a) {
    return {-a.lo, -a.hi};
}

template <class Mask, class V>
inline V select(Mask mask, V yes, V no) {
    return mask ? yes : no;
}

template <class Mask, class V>
inline Two<V> select(const Two<Mask>& mask, const Two<V>& yes, const Two<V>& no) {
    return {select(mask.lo, yes.lo, no.lo), select(mask.hi, yes.hi, no.hi)};
}

template <class To, class From>
struct Conversion {
    static To of(From from) { return __builtin_convertvector(from, To); }
};

template <class To, class From>
struct Conversion<Two<To>, Two<From>> {
    static Two<To> of(const Two<From>& from) {
        return {Conversion<To, From>::of(from.lo), Conversion<To, From>::of(from.hi)};
    }
};

template <class To, class From>
inline To convert(const From& from) {
    return Conversion<To, From>::of(from);
}

#if defined(__AVX2__)
#define ARRIERO_WIDE(T, name)                          \
    typedef T Part_##name __attribute__((vector_size(32))); \
    typedef Two<Part_##name> name
#else
#define ARRIERO_WIDE(T, name)                          \
    typedef T Part_##name __attribute__((vector_size(16))); \
    typedef Two<Two<Part_##name>> name
#endif
ARRIERO_WIDE(float, Lanes);
ARRIERO_WIDE(int32_t, IntLanes);
ARRIERO_WIDE(uint32_t, WideLanes);
ARRIERO_WIDE(uint16_t, Words);
ARRIERO_WIDE(uint8_t, Bytes);
#undef ARRIERO_WIDE
#endif

struct bf16 {
    uint16_t bits;
};

template <class V>
struct Memory {
    static V load(const char* p) {
        V v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(char* p, const V& v) { std::memcpy(p, &v, sizeof v); }
};

#if !defined(__AVX512BW__)
template <class V>
struct Memory<Two<V>> {  // by halves: GCC would copy 16 bytes at a time
    static Two<V> load(const char* p) { return {Memory<V>::load(p), Memory<V>::load(p + sizeof(V))}; }
    static void store(char* p, const Two<V>& v) { Memory<V>::store(p, v.lo), Memory<V>::store(p + sizeof(V), v.hi); }
};
#endif

template <class V, class T>
inline V load(const T* p) {
    return Memory<V>::load(reinterpret_cast<const char*>(p));
}

template <class T, class V>
inline void store(T* p, const V& v) {
    Memory<V>::store(reinterpret_cast<char*>(p), v);
}

inline Lanes load_lanes(const float* p) { return load<Lanes>(p); }

inline WideLanes load_words(const uint16_t* p) {  // sixteen, to 32 bits
#if defined(__AVX512BW__)
    return (WideLanes)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    const __m256i parts[2] = {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
                              _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8)))};
    return load<WideLanes>(parts);
#else
    uint32_t words[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) words[i] = p[i];
    return load<WideLanes>(words);
#endif
}

inline void store_words(uint16_t* p, WideLanes words) {  // sixteen below 2^16
#if defined(__AVX512BW__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)words));
#elif defined(__AVX2__)
    __m256i parts[2];
    std::memcpy(parts, &words, sizeof parts);
    const __m256i both = _mm256_packus_epi32(parts[0], parts[1]);  // by turns, 64 bits of each
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(both, 0xd8));
#else
    uint32_t wide[kLanes];
    std::memcpy(wide, &words, sizeof wide);
    for (int64_t i = 0; i < kLanes; ++i) p[i] = uint16_t(wide[i]);
#endif
}

inline Words load_bytes(const uint8_t* p) {  // thirty-two, to 16 bits
#if defined(__AVX512BW__)
    return (Words)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    const __m256i parts[2] = {_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)),
                              _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(p + 16)))};
    return load<Words>(parts);
#else
    uint16_t words[32];
    for (int64_t i = 0; i < 32; ++i) words[i] = p[i];
    return load<Words>(words);
#endif
}

inline Lanes load_lanes(const bf16* p) { return (Lanes)(load_words(&p->bits) << 16); }

inline Lanes all(float x) { return Lanes{} + x; }

inline IntLanes counting() {
    const int32_t numbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load<IntLanes>(numbers);
}

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

inline void round(const float* from, bf16* to, float* wide) {  // sixteen of the same, and widened again
    const Lanes x = load_lanes(from);
    const WideLanes bits = (WideLanes)x;
    const WideLanes rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const WideLanes half = select(x != x, WideLanes{} + 0x7fc0, rounded);
    store_words(&to->bits, half);
    store(wide, (Lanes)(half << 16));
}

inline float sum(Lanes lanes) {  // in one order, whatever the width of the CPU's vectors
    float v[kLanes];
    store(v, lanes);
    for (int64_t width = kLanes / 2; width; width /= 2)
        for (int64_t i = 0; i < width; ++i) v[i] += v[i + width];
    return v[0];
}

inline float largest(Lanes lanes) {
    float values[kLanes];
    store(values, lanes);
    return *std::max_element(values, values + kLanes);
}

inline Lanes larger(Lanes a, Lanes b) { return select(a > b, a, b); }

// e^x, relative error below 3e-7 on [-87, 88], clamped outside: 2^whole * 2^part with |part| <= 1/2.
inline Lanes exponential(Lanes x) {
    x = select(x < all(-87.0f), all(-87.0f), x);
    x = select(x > all(88.0f), all(88.0f), x);
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
    return (Lanes)((IntLanes)series + (convert<IntLanes>(whole) << 23));
}

// Sixteen values of IEEE's half precision, widened.
inline Lanes load_half(const uint16_t* p) {
#if defined(__AVX512BW__)
    return (Lanes)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && defined(__AVX2__)
    const __m256 parts[2] = {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
                             _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
    return load<Lanes>(parts);
#else
    const WideLanes bits = load_words(p);
    // exponent and mantissa moved to their places and multiplied by 2^112
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
