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
#ifdef SK_AVX512
// 2^(i/32), less what adding i/32 to the exponent in `exp_twice` adds to its bits.
alignas(64) static const uint32_t kPowers[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
// 2^(i/32) from a table of two registers, and a polynomial of degree two for what is left: three
// instructions fewer than the degree that exp_parts needs. Its error is 5.3e-8 before rounding, of
// which tanh sees half.
template <>
inline __attribute__((always_inline)) V<float> exp_twice<float>(V<float> x) {
  using I = Simd<float>::I;
  constexpr float steps_per_unit = 0x1.715476p+1f, shift = 0x1.8p18f;  // 2 log2(e); ulp 1/32
  const V<float> y = clamp_keep_nan<float>(x, -9.1f, 9.1f);
  const V<float> shifted = y * steps_per_unit + shift;
  const V<float> r = y * steps_per_unit - (shifted - shift);
  const V<float> p = (r * 0.240226507f + 0.693157342f) * r + 1.0f;
  const I bits = bit_cast<I>(shifted);
  const __m512i low = _mm512_load_si512(kPowers), high = _mm512_load_si512(kPowers + 16);
  const I power = bit_cast<I>(_mm512_permutex2var_epi32(low, bit_cast<__m512i>(bits), high));
  return bit_cast<V<float>>(power + (bits << 18)) * p;
}
#endif

// Elements and rows ahead that are fetched early: a sixth of the time where keys and values come
// from the L3 cache or from memory.
constexpr int64_t kKeyAhead = 512, kValueAhead = 4;

// sum_d v_d tanh(q_d + k_d), in its lanes. `next`, what will be read after the scores, comes to the
// L2 cache meanwhile, since this is bound by arithmetic and that by memory (a fifth of both). Save
// keeps e^2(q + k), padded, and the largest |q + k| of each lane.
template <class S, class C, bool Save>
SK_INLINE V<C> single_sum(const C* q, const S* k, const S* next, const AdditiveVector<C>& v,
                          C* saved, V<C>& top) {
  constexpr int L = kLanes<C>;
  V<C> acc = {};
  auto of = [&](int64_t d, V<C> x) __attribute__((always_inline)) {
    const V<C> e = exp_twice<C>(x);
    if constexpr (Save) {
      const V<C> size = absolute<C>(x);
      top = (size > top) ? size : top;
      store<C>(saved + d, e);
    }
    return e + C(1);
  };
  int64_t d = 0;
  for (; d + 4 * L <= v.size; d += 4 * L) {
    V<C> den[4];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      const int64_t at = d + g * L;
      __builtin_prefetch(k + at + kKeyAhead);
      __builtin_prefetch(next + at, 0, 2);
      den[g] = of(at, load<C>(q + at) + load_as<C>(k + at));
    }
    acc = add_quotients<C>(acc, v.v + d, den);
  }
  for (; d < v.size; d += L) {
    const V<C> den = of(d, load<C>(q + d) + load_n<C>(k + d, v.size - d));
    acc = add_quotient<C>(acc, numerator<C>(load<C>(v.v + d), den), den);
  }
  return acc;
}

// to[j] = sum_d v_d tanh(q_d + k_jd) for keys `row` apart; q is padded. `next` is the first value.
// Save keeps what single_sum does, in rows of v.padded elements, and returns the largest |q + k|.
template <class S, class C, bool Save>
static C score_single(const C* q, const S* k, int64_t row, int64_t keys, const S* next,
                      int64_t next_row, const AdditiveVector<C>& v, C* to, C* saved) {
  constexpr int L = kLanes<C>;
  V<C> top = {};
  for (int64_t j = 0; j < keys; j += L) {
    const int64_t n = min_<int64_t>(L, keys - j);
    V<C> acc[L] = {};
    for (int64_t c = j; c < j + n; ++c)
      acc[c - j] =
          single_sum<S, C, Save>(q, k + c * row, next + c * next_row, v, saved + c * v.padded, top);
    store_n<C>(to + j, sum_each<C>(acc), n);
  }
  C largest = 0;
  for (int l = 0; l < L; ++l) largest = max_(largest, C(top[l]));
  return largest;
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

// From what score_single kept of K keys: their dk = ds g slope, and adds ds g to dq, ds tanh to dv.
template <class S, class C, int K>
static void gradients_single(const C* saved, const C* ds, const C* slope, int64_t D, int64_t padded,
                             C* dq, C* dv, S* dk) {
  constexpr int L = kLanes<C>;
  constexpr C far = sizeof(C) == 4 ? C(8.0196e7) : C(2.35385e17);  // a little under e^18.2, e^40
  for (int64_t d = 0; d < D; d += L) {
    V<C> to_q = load<C>(dq + d), to_v = load<C>(dv + d);
#pragma GCC unroll 4
    for (int c = 0; c < K; ++c) {
      // 1 - tanh^2 without the cancellation, and 0 where `exp_twice` has clamped.
      const V<C> e = load<C>(saved + c * padded + d), r = reciprocal<C>(e + C(1));
      const V<C> t = (e - C(1)) * r, slope_of = rounded<C>(e * r) * rounded<C>(C(4) * r);
      const V<C> low = (e > 1 / far) ? slope_of : V<C>{}, g = (e < far) ? low : V<C>{};
      const V<C> share = rounded<C>(ds[c] * g);  // the same with and without dk
      to_q += share;
      to_v += ds[c] * t;
      if (dk) store_n<C>(dk + c * D + d, share * load<C>(slope + d), D - d);
    }
    store<C>(dq + d, to_q);
    store<C>(dv + d, to_v);
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
