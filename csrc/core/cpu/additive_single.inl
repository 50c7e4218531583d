// One query over keys that nothing else reads, the step of a decoder. The exponentials of the keys
// would serve once, so e^2(q+k) is taken of the sum.

// 1 + e^2x for |x| <= 10, beyond which tanh is 1 to the last bit of float: x is clamped to that,
// and the product of four is finite.
template <class C>
SK_INLINE V<C> exp_twice(V<C> x) {
  constexpr C limit = sizeof(C) == 4 ? C(9.1) : C(20);
  V<C> scale, p;
  const V<C> y = clamp_keep_nan<C>(x, -limit, limit);
  exp_parts<C>(y + y, scale, p);
  return scale + scale * p;
}
// tanh for the backward, which needs each one for itself.
template <class C>
SK_INLINE V<C> tanh_single(V<C> x) {
  return tanh<C>(x);
}
#ifdef SK_AVX512
// 2^(i/32), less what adding i/32 to the exponent in `power_of` adds to its bits.
alignas(64) static const uint32_t kPowers[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
// e^2x is the power of two returned, from a table of two registers, times 1 + p r, a polynomial of
// degree two: three instructions fewer than the degree that exp_parts needs. Its error is 5.3e-8
// before rounding, of which tanh sees half.
SK_INLINE V<float> power_of(V<float> x, V<float>& r, V<float>& p) {
  using I = Simd<float>::I;
  constexpr float steps_per_unit = 0x1.715476p+1f, shift = 0x1.8p18f;  // 2 log2(e); ulp 1/32
  const V<float> y = clamp_keep_nan<float>(x, -9.1f, 9.1f);
  const V<float> shifted = y * steps_per_unit + shift;
  r = y * steps_per_unit - (shifted - shift);
  p = r * 0.240226507f + 0.693157342f;
  const I bits = bit_cast<I>(shifted);
  const __m512i low = _mm512_load_si512(kPowers), high = _mm512_load_si512(kPowers + 16);
  const I power = bit_cast<I>(_mm512_permutex2var_epi32(low, bit_cast<__m512i>(bits), high));
  return bit_cast<V<float>>(power + (bits << 18));
}
template <>
inline __attribute__((always_inline)) V<float> exp_twice<float>(V<float> x) {
  V<float> r, p;
  const V<float> power = power_of(x, r, p);
  return power * (p * r + 1.0f);
}
// (E - 1) / (E + 1) with E = e^2x. The quotient is an estimate corrected by what it leaves over,
// which makes it exactly 1 where E + 1 is E.
template <>
inline __attribute__((always_inline)) V<float> tanh_single<float>(V<float> x) {
  V<float> r, p;
  const V<float> power = power_of(x, r, p);
  const V<float> num = power * rounded<float>(p * r) + (power - 1.0f), den = num + 2.0f;
  const V<float> y = bit_cast<V<float>>(_mm512_maskz_rcp14_ps(0xffff, bit_cast<__m512>(den)));
  const V<float> t = rounded<float>(num * y);
  return (num - t * den) * y + t;
}
#endif

// Whether the tiny form serves all of q + k. Ordinary rows say no in their first vector.
template <class S, class C>
SK_INLINE bool all_tiny(const C* q, const S* k, int64_t n) {
  for (int64_t d = 0; d < n; d += kLanes<C>)
    if (!all_within<C>(load<C>(q + d) + load_n<C>(k + d, n - d), FormBounds<C>::tiny)) return false;
  return true;
}

// Elements and rows ahead that are fetched early: a sixth of the time where keys and values come
// from the L3 cache or from memory.
constexpr int64_t kKeyAhead = 512, kValueAhead = 4;
// Rows ahead that gradients ask for what they will write.
constexpr int64_t kKeysAhead = 4;

// What is read or written after the scores, a row for each key. It comes to the L2 cache meanwhile,
// since the scores are bound by arithmetic and that by memory (a fifth of both).
template <class S>
struct NextRows {
  const S* at;
  int64_t row;
};
template <class S, int N>
SK_INLINE void fetch_next(const NextRows<S> (&next)[N], int64_t key, int64_t d) {
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) __builtin_prefetch(next[i].at + key * next[i].row + d, 0, 2);
}

// sum_d v_d tanh(q_d + k_d) of one key, in its lanes.
template <class S, class C, int N>
SK_INLINE V<C> grouped_sum(const C* q, const S* k, const NextRows<S> (&next)[N], int64_t key,
                           const AdditiveVector<C>& v) {
  constexpr int L = kLanes<C>;
  V<C> acc = {};
  int64_t d = 0;
  for (; d + 4 * L <= v.size; d += 4 * L) {
    V<C> den[4];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      const int64_t at = d + g * L;
      __builtin_prefetch(k + at + kKeyAhead);
      fetch_next(next, key, at);
      den[g] = exp_twice<C>(load<C>(q + at) + load_as<C>(k + at)) + C(1);
    }
    acc = add_quotients<C>(acc, v.v + d, den);
  }
  for (; d < v.size; d += L) {
    const V<C> den = exp_twice<C>(load<C>(q + d) + load_n<C>(k + d, v.size - d)) + C(1);
    acc = add_quotient<C>(acc, numerator<C>(load<C>(v.v + d), den), den);
  }
  return acc;
}

// The same by a tanh for each element, of the tiny or the plain form. Save keeps them, padded.
template <class S, class C, Form F, bool Save, int N>
SK_INLINE V<C> tanh_sum(const C* q, const S* k, const NextRows<S> (&next)[N], int64_t key,
                        const AdditiveVector<C>& v, C* saved) {
  constexpr int L = kLanes<C>;
  V<C> acc = {};
  auto add = [&](int64_t d, V<C> x) __attribute__((always_inline)) {
    const V<C> t = F == Form::tiny ? tanh_tiny(x) : tanh_single<C>(x);
    if (Save) store<C>(saved + d, t);
    acc += load<C>(v.v + d) * t;
  };
  int64_t d = 0;
  for (; d + L <= v.size; d += L) {
    __builtin_prefetch(k + d + kKeyAhead);
    fetch_next(next, key, d);
    add(d, load<C>(q + d) + load_as<C>(k + d));
  }
  if (d < v.size) add(d, load<C>(q + d) + load_n<C>(k + d, v.size - d));
  return acc;
}

// to[j] = sum_d v_d tanh(q_d + k_jd) for keys `row` apart; q is padded. Save keeps the tanhs, in
// rows of v.padded elements.
template <class S, class C, bool Save, int N>
static void score_single(const C* q, const S* k, int64_t row, int64_t keys,
                         const NextRows<S> (&next)[N], const AdditiveVector<C>& v, C* to,
                         C* saved) {
  constexpr int L = kLanes<C>;
  for (int64_t j = 0; j < keys; j += L) {
    const int64_t n = min_<int64_t>(L, keys - j);
    V<C> acc[L] = {};
    for (int64_t c = j; c < j + n; ++c) {
      const S* key = k + c * row;
      C* t = Save ? saved + c * v.padded : nullptr;
      if (all_tiny<S, C>(q, key, v.size))
        acc[c - j] = tanh_sum<S, C, Form::tiny, Save>(q, key, next, c, v, t);
      else if (Save)
        acc[c - j] = tanh_sum<S, C, Form::plain, Save>(q, key, next, c, v, t);
      else
        acc[c - j] = grouped_sum<S, C>(q, key, next, c, v);
    }
    store_n<C>(to + j, sum_each<C>(acc), n);
  }
}

// to[j] = sum_d x_d value_jd; x is padded.
template <class S, class C>
static void multiply_single(const C* x, const S* value, int64_t row, int64_t keys, int64_t n,
                            C* to) {
  constexpr int L = kLanes<C>;
  for (int64_t j = 0; j < keys; j += L) {
    const int64_t some = min_<int64_t>(L, keys - j);
    V<C> acc[L] = {};
    for (int64_t c = 0; c < some; ++c) {
      const S* from = value + (j + c) * row;
      V<C> sum[4] = {};
      int64_t d = 0;
      for (; d + 4 * L <= n; d += 4 * L)
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
          __builtin_prefetch(from + d + g * L + kKeyAhead);
          sum[g] += load<C>(x + d + g * L) * load_as<C>(from + d + g * L);
        }
      for (; d < n; d += L) sum[0] += load<C>(x + d) * load_n<C>(from + d, n - d);
      acc[c] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
    store_n<C>(to + j, sum_each<C>(acc), some);
  }
}

// From the tanhs t of K keys: their dk = ds (1 - t^2) slope, and adds ds (1 - t^2) to dq, ds t to
// dv.
template <class S, class C, int K>
static void gradients_single(const C* saved, const C* ds, const C* slope, int64_t D, int64_t padded,
                             C* dq, C* dv, S* dk) {
  constexpr int L = kLanes<C>;
  for (int64_t d = 0; d < D; d += L) {
    V<C> to_q = load<C>(dq + d), to_v = load<C>(dv + d);
#pragma GCC unroll 4
    for (int c = 0; c < K; ++c) {
      const V<C> t = load<C>(saved + c * padded + d);
      const V<C> share = rounded<C>(ds[c] * (C(1) - t * t));  // the same with and without dk
      to_q += share;
      to_v += ds[c] * t;
      if (!dk) continue;
      __builtin_prefetch(dk + (c + kKeysAhead) * D + d, 1);
      store_n<C>(dk + c * D + d, share * load<C>(slope + d), D - d);
    }
    store<C>(dq + d, to_q);
    store<C>(dv + d, to_v);
  }
}

// dvalue_j = w_j do for keys [0, keys); do is padded.
template <class S, class C>
static void dvalue_single(const C* w, const C* d_o, int64_t keys, int64_t Dv, S* to) {
  for (int64_t j = 0; j < keys; ++j, to += Dv)
    for (int64_t d = 0; d < Dv; d += kLanes<C>) {
      __builtin_prefetch(to + kKeysAhead * Dv + d, 1);
      store_n<C>(to + d, w[j] * load<C>(d_o + d), Dv - d);
    }
}

// to (Dv, padded) = sum over keys of w_j value_j, without those of weight 0, which may be NaN: four
// values at a time.
template <class S, class C>
static void context_single(const C* w, int64_t keys, const S* value, int64_t row, int64_t Dv,
                           C* to) {
  constexpr int L = kLanes<C>;
  for (int64_t d = 0; d < Dv; d += L) store<C>(to + d, V<C>{});
  const S* rows[4];
  C weights[4];
  int64_t count = 0;
  for (int64_t j = 0; j < keys; ++j) {
    if (w[j] != C(0)) weights[count] = w[j], rows[count++] = value + j * row;
    if (count < 4 && (j + 1 < keys || count == 0)) continue;
    for (; count < 4; ++count) weights[count] = 0, rows[count] = rows[0];
    int64_t d = 0;
    for (; d + L <= Dv; d += L) {
      V<C> sum = load<C>(to + d);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        __builtin_prefetch(rows[c] + d + kValueAhead * row);
        sum += weights[c] * load_as<C>(rows[c] + d);
      }
      store<C>(to + d, sum);
    }
    if (d < Dv) {
      V<C> sum = load<C>(to + d);
      for (int c = 0; c < 4; ++c) sum += weights[c] * load_n<C>(rows[c] + d, Dv - d);
      store<C>(to + d, sum);
    }
    count = 0;
  }
}
