// Vectors of SK_VBYTES bytes, conversions between storage and compute types, exp-based activations.
// Included once for every instruction set, inside its namespace and its `#pragma GCC target`, so no
// function here may be shared with another instruction set (nothing of std:: is called).

#define SK_INLINE static inline __attribute__((always_inline))

template <class C>
struct Simd;
template <>
struct Simd<float> {
  static constexpr int lanes = SK_VBYTES / 4;
  typedef float V __attribute__((vector_size(SK_VBYTES)));
  typedef int32_t I __attribute__((vector_size(SK_VBYTES)));
  typedef uint32_t U __attribute__((vector_size(SK_VBYTES)));
  typedef uint16_t Half __attribute__((vector_size(SK_VBYTES / 2)));
};
template <>
struct Simd<double> {
  static constexpr int lanes = SK_VBYTES / 8;
  typedef double V __attribute__((vector_size(SK_VBYTES)));
  typedef int64_t I __attribute__((vector_size(SK_VBYTES)));
};
template <class C>
using V = typename Simd<C>::V;
template <class C>
constexpr int kLanes = Simd<C>::lanes;

template <class T>
SK_INLINE T min_(T a, T b) {
  return a < b ? a : b;
}
template <class T>
SK_INLINE T max_(T a, T b) {
  return a < b ? b : a;
}
SK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SK_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class To, class From>
SK_INLINE To bit_cast(const From& f) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast");
  To t;
  __builtin_memcpy(&t, &f, sizeof(t));
  return t;
}

template <class C>
SK_INLINE V<C> splat(C x) {
  return x - V<C>{};  // x - 0 is x for every x, so this folds to a broadcast; x + 0 would not
}

// ---- load and store: any alignment; the _n forms touch n elements only and read zeros past them

SK_INLINE V<float> widen(Simd<float>::Half h, bf16) {
  auto u = __builtin_convertvector(h, Simd<float>::U) << 16;
  return bit_cast<V<float>>(u);
}

SK_INLINE V<float> widen(Simd<float>::Half h, f16) {
  using U = Simd<float>::U;
  using I = Simd<float>::I;
  const U u = __builtin_convertvector(h, U);
  const U sign = (u & 0x8000u) << 16, em = u & 0x7fffu;
  const U normal = (em << 13) + 0x38000000u;
  const U special = normal + 0x38000000u;  // infinities and NaN: the exponent goes to 255
  // Subnormal: em * 2^-24, exact in fp32.
  const V<float> tiny = __builtin_convertvector(bit_cast<I>(em), V<float>) * 0x1p-24f;
  U r = (em >= 0x7c00u) ? special : normal;
  r = (em < 0x400u) ? bit_cast<U>(tiny) : r;
  return bit_cast<V<float>>(r | sign);
}

SK_INLINE Simd<float>::Half narrow(V<float> v, bf16) {  // round to nearest even; NaN stays NaN
  using U = Simd<float>::U;
  const U u = bit_cast<U>(v);
  U r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  r = ((u & 0x7fffffffu) > 0x7f800000u) ? (u >> 16) | 0x40u : r;
  return __builtin_convertvector(r, Simd<float>::Half);
}

SK_INLINE Simd<float>::Half narrow(V<float> v, f16) {
  using U = Simd<float>::U;
  const U u = bit_cast<U>(v), a = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
  U r = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Below 2^-14 adding 0.5 leaves the rounded subnormal in the low bits.
  const U sub = bit_cast<U>(bit_cast<V<float>>(a) + 0.5f) - 0x3f000000u;
  r = (a < 0x38800000u) ? sub : r;
  r = (a >= 0x47800000u) ? (U{} + 0x7c00u) : r;
  r = (a > 0x7f800000u) ? (U{} + 0x7e00u) : r;
  return __builtin_convertvector(r | sign, Simd<float>::Half);
}

template <class C>
SK_INLINE V<C> load(const C* p) {
  V<C> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class C>
SK_INLINE void store(C* p, V<C> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
template <class S>
SK_INLINE V<float> load_half(const S* p) {
  Simd<float>::Half h;
  __builtin_memcpy(&h, p, sizeof(h));
  return widen(h, S{});
}
template <class S>
SK_INLINE void store_half(S* p, V<float> v) {
  const auto h = narrow(v, S{});
  __builtin_memcpy(p, &h, sizeof(h));
}
// load_as<C>: the compute vector of whatever type is stored.
template <class C>
SK_INLINE V<C> load_as(const C* p) {
  return load<C>(p);
}
template <class C>
SK_INLINE V<C> load_as(const bf16* p) {
  return load_half(p);
}
template <class C>
SK_INLINE V<C> load_as(const f16* p) {
  return load_half(p);
}
SK_INLINE void store_as(float* p, V<float> v) { store<float>(p, v); }
SK_INLINE void store_as(double* p, V<double> v) { store<double>(p, v); }
SK_INLINE void store_as(bf16* p, V<float> v) { store_half(p, v); }
SK_INLINE void store_as(f16* p, V<float> v) { store_half(p, v); }

// The ends of rows, out of line: they are rare, and every kernel has many of them.
template <class C, class S>
static __attribute__((noinline)) void load_end(const S* p, int64_t n, C* out) {
  S t[kLanes<C>] = {};
  for (int64_t i = 0; i < n; ++i) t[i] = p[i];
  store<C>(out, load_as<C>(t));
}
template <class C, class S>
static __attribute__((noinline)) void store_end(S* p, const C* v, int64_t n) {
  S t[kLanes<C>];
  store_as(t, load<C>(v));
  for (int64_t i = 0; i < n; ++i) p[i] = t[i];
}
template <class C, class S>
SK_INLINE V<C> load_n(const S* p, int64_t n) {
  if (n >= kLanes<C>) return load_as<C>(p);
  C t[kLanes<C>];
  load_end<C, S>(p, n, t);
  return load<C>(t);
}
template <class C, class S>
SK_INLINE void store_n(S* p, V<C> v, int64_t n) {
  if (n >= kLanes<C>) return store_as(p, v);
  C t[kLanes<C>];
  store<C>(t, v);
  store_end<C, S>(p, t, n);
}
// n values of an operand of a product. A narrow one is multiplied in whole tiles, where zero
// weights would make NaN of infinities beside it: there what stood stays, zeros.
template <class C, class A>
SK_INLINE void store_operand(A* p, V<C> v, int64_t n) {
  if constexpr (sizeof(A) < sizeof(C))
    store_n<C>(p, v, n);
  else
    store_as(p, v);
}
// Rounds to the storage type and back: what a reader of the stored value sees.
template <class S, class C>
SK_INLINE V<C> through(V<C> v) {
  if constexpr (sizeof(S) == sizeof(C)) return v;
  S t[kLanes<C>];
  store_as(t, v);
  return load_as<C>(t);
}
// dst[0..n) = src[0..n) converted, then zeros up to `padded` (a multiple of the lanes).
template <class C, class D, class S>
SK_INLINE void copy_row(D* dst, const S* src, int64_t n, int64_t padded) {
  for (int64_t i = 0; i < padded; i += kLanes<C>)
    store_as(dst + i, i < n ? load_n<C>(src + i, n - i) : V<C>{});
}

// ---- exp, sigmoid, tanh
// exp(x) = 2^n (1 + p), x = n ln2 + r, |r| <= ln2/2, p = expm1(r) by a polynomial fitted at
// Chebyshev nodes (relative error 2.5e-8 for float, 4.1e-17 for double, under half an ulp of each).

template <class C>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float log2e = 0x1.715476p+0f, ln2_hi = 0x1.62e4p-1f, ln2_lo = 0x1.7f7d1cp-20f;
  static constexpr float shift = 0x1.8p23f, low = -87.0f, high = 88.0f;
  static constexpr int mantissa = 23;
  static constexpr int32_t one = 0x3f800000;
  static constexpr float q[] = {0.5f, 0.166665769896987757f, 0.041666554617204692f,
                                0.00836317905272257736f, 0.0013926183587705652f};
};
template <>
struct ExpConstants<double> {
  static constexpr double log2e = 0x1.71547652b82fep+0, ln2_hi = 0x1.62e42feep-1,
                          ln2_lo = 0x1.a39ef35793c76p-33;
  static constexpr double shift = 0x1.8p52, low = -708.0, high = 709.0;
  static constexpr int mantissa = 52;
  static constexpr int64_t one = 0x3ff0000000000000;
  static constexpr double q[] = {0.500000000000000102,     0.166666666666666675,
                                 0.0416666666666241279,    0.00833333333333006183,
                                 0.00138888889172137169,   0.000198412698630536169,
                                 0.0000248015212959543751, 2.75572684599970648e-6,
                                 2.76200884454097481e-7,   2.51003854955103196e-8};
};

template <class C>
SK_INLINE V<C> clamp_keep_nan(V<C> x, C low, C high) {
#ifdef SK_AVX512
  if constexpr (sizeof(C) == 4) {  // the second operand is returned when one is NaN: x is kept
    const __m512 y = _mm512_max_ps(bit_cast<__m512>(splat(low)), bit_cast<__m512>(x));
    return bit_cast<V<C>>(_mm512_min_ps(bit_cast<__m512>(splat(high)), y));
  }
#endif
  x = (x < low) ? splat(low) : x;  // comparisons with NaN are false: x is kept
  return (x > high) ? splat(high) : x;
}

// scale = 2^n and p = expm1(r) of the clamped argument.
template <class C>
SK_INLINE void exp_parts(V<C> x, V<C>& scale, V<C>& p) {
  using K = ExpConstants<C>;
  using I = typename Simd<C>::I;
  const V<C> shifted = x * K::log2e + K::shift;
  const V<C> n = shifted - K::shift;
  const V<C> r = (x - n * K::ln2_hi) - n * K::ln2_lo;
  constexpr int terms = sizeof(K::q) / sizeof(C);
  V<C> q = splat(K::q[terms - 1]);
#pragma GCC unroll 12
  for (int i = terms - 2; i >= 0; --i) q = q * r + K::q[i];
  p = q * (r * r) + r;
  scale = bit_cast<V<C>>((bit_cast<I>(shifted) << K::mantissa) + K::one);
}

SK_INLINE V<double> divide(V<double> a, V<double> b) { return a / b; }
SK_INLINE V<float> divide(V<float> a, V<float> b) {
#ifdef SK_AVX512
  // An estimate of 14 bits and one Newton step: about an ulp, at a third of a division's time.
  const V<float> y = bit_cast<V<float>>(_mm512_maskz_rcp14_ps(0xffff, bit_cast<__m512>(b)));
  V<float> q = a * (y + y * (1.0f - b * y));
  // Keeps the compiler from fusing this product into the sums it is used in: it could only do so
  // where the quotient is not stored as well, and the two would round differently.
  asm("" : "+v"(q));
  return q;
#else
  return a / b;
#endif
}

// 1 / (1 + exp(-x)). Relative error under 3 ulp for x >= -87; below, the value at -87 (1.6e-38).
template <class C>
SK_INLINE V<C> sigmoid(V<C> x) {
  V<C> scale, p;
  exp_parts<C>(clamp_keep_nan<C>(-x, ExpConstants<C>::low, -ExpConstants<C>::low), scale, p);
  return divide(splat(C(1)), (scale + scale * p) + C(1));
}

// expm1(2x) / (expm1(2x) + 2): no cancellation near zero. Error under 4 ulp; +-1 from |x| = 20 on.
template <class C>
SK_INLINE V<C> tanh(V<C> x) {
  V<C> scale, p;
  const V<C> y = clamp_keep_nan<C>(x + x, C(-40), C(40));
  exp_parts<C>(y, scale, p);
  const V<C> m = scale * p + (scale - C(1));
  return divide(m, m + C(2));
}
