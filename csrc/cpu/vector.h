// Vectors of floats as wide as the instruction set this file is compiled for, in the compilers'
// portable vector extension (GCC and Clang).
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace r2vpo {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t Words __attribute__((vector_size(4 * kLanes)));

inline Floats broadcast(float x) { return x - Floats{}; }

template <typename To, typename From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// a·b + c, in one rounding where the instruction set has it. Contraction is off elsewhere, so that
// kernels that share a function give the same bits.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// The larger of each pair, and b where they do not compare.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// The halves of a vector; GCC would take one of 64 bytes apart in memory.
template <typename Lane, int kCount>
struct Halves {
  typedef Lane Half __attribute__((vector_size(kCount / 2 * sizeof(Lane))));
  Half low, high;

  template <typename Vector>
  explicit Halves(Vector x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(x) == 64) {
      const __m512i all = bits_of<__m512i>(x);
      low = bits_of<Half>(_mm512_castsi512_si256(all));
      high = bits_of<Half>(_mm512_extracti64x4_epi64(all, 1));
      return;
    }
#endif
    std::memcpy(&low, &x, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof(low), sizeof(high));
  }
};

// All lanes put together.
template <typename Lane, int kCount, typename Vector, typename Op>
inline Lane folded(Vector x, Op op) {
  if constexpr (kCount == 2) {
    return op(x[0], x[1]);
  } else {
    const Halves<Lane, kCount> halves(x);
    return folded<Lane, kCount / 2>(op(halves.low, halves.high), op);
  }
}

inline float largest(Floats x) {
  return folded<float, kLanes>(x, [](auto a, auto b) { return a > b ? a : b; });
}

// In double precision.
inline double sum(Floats x) {
  typedef double Doubles __attribute__((vector_size(4 * kLanes)));
  const Halves<float, kLanes> halves(x);
  const Doubles both = __builtin_convertvector(halves.low, Doubles) +
                       __builtin_convertvector(halves.high, Doubles);
  return folded<double, kLanes / 2>(both, [](auto a, auto b) { return a + b; });
}

// Exponents below it are 0 to exp2. As a bound on them it is finite: -inf meets no 0·inf.
constexpr float kLowestExponent = -127.0f;

// 2^x for x = d·scale from -127 to 1, but for the rounding of x within 3.3U, U = 2^-24; 0 below
// -126.5; NaN for NaN. With x = n + f, |f| <= 1/2, it is 2^n by its bits times a minimax polynomial
// of degree 5 in f, which is 1 at 0. Its relative error is 1.57U, and roundings add the rest
// (docs/derivation/2-numerics.md).
inline Floats exp2(Floats d, Floats scale) {
  // Adding 1.5·2^23 rounds to a whole number, which then stands in the low bits; 127 is the bias.
  const Floats shift = broadcast(12582912.0f + 127.0f);
  const Floats shifted = fma(d, scale, shift);
  const Floats f = fma(d, scale, shift - shifted);
  Floats p = broadcast(0x1.5bda58p-10f);
  p = fma(p, f, broadcast(0x1.3ce8aep-7f));
  p = fma(p, f, broadcast(0x1.c6b6d8p-5f));
  p = fma(p, f, broadcast(0x1.ebf9c2p-3f));
  p = fma(p, f, broadcast(0x1.62e42ap-1f));
  p = fma(p, f, broadcast(1.0f));
  return p * bits_of<Floats>(bits_of<Words>(shifted) << 23);
}

// Logits are read and written two vectors at a time. Of a half precision the first vector holds the
// even columns and the second the odd ones: the low and the high halves of the words in memory.
struct Pair {
  Floats first, second;
};

constexpr int kStep = 2 * kLanes;

struct Float32 {
  float value;

  static Floats ties_to_even(Floats x) { return x; }
};

// Vector by vector: of both at once GCC makes moves of 16 bytes through the stack, which a load of
// a vector then has to wait for.
inline Pair load(const Float32* from) {
  Pair x;
  std::memcpy(&x.first, from, sizeof(x.first));
  std::memcpy(&x.second, from + kLanes, sizeof(x.second));
  return x;
}

inline void store(Float32* to, Pair x) {
  std::memcpy(to, &x.first, sizeof(x.first));
  std::memcpy(to + kLanes, &x.second, sizeof(x.second));
}

// The low half of each word of `even`, the high half of each of `odd`.
inline Words halves_of(Words even, Words odd) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return bits_of<Words>(_mm256_blend_epi16(bits_of<__m256i>(even), bits_of<__m256i>(odd), 0xaa));
#else
  return (even & 0xffff) | (odd & 0xffff0000);
#endif
}

// `widen` takes the halves of words apart, `narrow` puts them together.
struct BFloat16 {
  std::uint16_t bits;

  static Pair widen(Words halves) {
    return {bits_of<Floats>(halves << 16), bits_of<Floats>(halves & 0xffff0000)};
  }

  // To nearest, ties away from 0. A NaN stays one unless all its bits are set (see plain_nan).
  static Words narrow(Pair x) {
    const Words even = bits_of<Words>(x.first) + 0x8000, odd = bits_of<Words>(x.second) + 0x8000;
    return halves_of(even >> 16, odd);
  }

  // What `narrow` rounds as it would round x with ties to even.
  static Floats ties_to_even(Floats x) {
    const Words bits = bits_of<Words>(x);
    return bits_of<Floats>(bits - 1 + ((bits >> 16) & 1));
  }
};

struct Float16 {
  std::uint16_t bits;

  static Pair widen(Words halves) { return {single(halves & 0xffff), single(halves >> 16)}; }

  static Words narrow(Pair x) { return half(x.first) | (half(x.second) << 16); }

  static Floats single(Words half) {
    const Words magnitude = (half & 0x7fff) << 13;
    // The product moves the exponent from one bias to the other, subnormal numbers too.
    const Words finite = bits_of<Words>(bits_of<Floats>(magnitude) * broadcast(0x1p112f));
    const Words value = magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000 : finite;
    return bits_of<Floats>(value | ((half & 0x8000) << 16));
  }

  static Words half(Floats x) {
    const Words bits = bits_of<Words>(x);
    const Words magnitude = bits & 0x7fffffff;
    // From 2^-14 up: the bias moves, and 13 bits round away, to nearest, ties to even.
    const Words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Below, a sum with 1/2 rounds to multiples of 2^-24, which then stand in the low bits.
    const Floats half = broadcast(0.5f);
    const Words sum = bits_of<Words>(bits_of<Floats>(magnitude) + half);
    const Words special = magnitude > 0x7f800000u ? Words{} + 0x7e00 : Words{} + 0x7c00;
    Words value = magnitude < (113u << 23) ? sum - bits_of<Words>(half) : normal;
    value = magnitude >= (143u << 23) ? special : value;
    return value | ((bits >> 16) & 0x8000);
  }

  static Floats ties_to_even(Floats x) { return x; }
};

template <typename Half>
inline Pair load(const Half* from) {
  Words halves;
  std::memcpy(&halves, from, sizeof(halves));
  return Half::widen(halves);
}

template <typename Half>
inline void store(Half* to, Pair x) {
  const Words halves = Half::narrow(x);
  std::memcpy(to, &halves, sizeof(halves));
}

// The first `count` columns in memory; the others are `nothing`: -inf adds nothing to a sum of
// exponentials.
template <typename T>
inline Pair load_part(const T* from, std::int64_t count,
                      float nothing = -std::numeric_limits<float>::infinity()) {
  T part[kStep];
  store(part, {broadcast(nothing), broadcast(nothing)});
  std::memcpy(part, from, count * sizeof(T));
  return load(part);
}

inline float load_one(const Float32* from) { return from->value; }

template <typename Half>
inline float load_one(const Half* from) {
  return Half::widen(Words{} + from->bits).first[0];
}

inline void store_one(Float32* to, float value) { to->value = value; }

template <typename Half>
inline void store_one(Half* to, float value) {
  to->bits = Half::narrow({broadcast(value), Floats{}})[0];
}

template <typename T>
inline void store_part(T* to, Pair x, std::int64_t count) {
  T part[kStep];
  store(part, x);
  std::memcpy(to, part, count * sizeof(T));
}

// Zeros, past the cache where the processor can: they are not read again here, and what they
// overwrite is not read first.
inline void stream_zeros(void* to, std::size_t bytes) {
#if defined(__x86_64__)
  char* begin = static_cast<char*>(to);
  char* const end = begin + bytes;
  for (; begin < end && reinterpret_cast<std::uintptr_t>(begin) % 16 != 0; ++begin) *begin = 0;
  for (; begin + 16 <= end; begin += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(begin), _mm_setzero_si128());
  }
  std::memset(begin, 0, end - begin);
#else
  std::memset(to, 0, bytes);
#endif
}

// Results too small for a normal number become 0 while this lives: on x86 an instruction that meets
// one takes some 140 cycles longer. What is read keeps its meaning, whatever the caller's setting.
class FlushToZero {
 public:
#if defined(__x86_64__)
  FlushToZero() : saved_(_mm_getcsr()) {
    _mm_setcsr((saved_ | _MM_FLUSH_ZERO_ON) & ~_MM_DENORMALS_ZERO_ON);
  }
  ~FlushToZero() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

}  // namespace
}  // namespace r2vpo
