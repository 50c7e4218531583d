// The scores of additive attention, sum_d v_d tanh(q_d + k_d), and their derivatives: what the
// attention ops and the attending decoder share.
//
// tanh(q + k) = (E - 1) / (E + 1) with E = e^2q e^2k, and the exponentials are taken once for each
// token instead of once for each pair. Four elements of a pair share one reciprocal: with
// denominators a b c d = E + 1 and numerators n = v (E - 1) = v a - 2 v,
//
//   n1/a + n2/b + n3/c + n4/d = ((n1 b + n2 a) cd + (n3 d + n4 c) ab) / (abcd),
//
// so an element costs six instructions where its tanh alone would cost twenty. sum v - 2 sum v / a
// would save one of them, but its roundings are relative to 1 instead of to tanh: twice the error.
// Rows are padded with zeros to whole vectors; so is v, which keeps the padding out of every sum.
//
// A tanh that enters a score is off by up to 3.2e-7 (measured; with this arithmetic simulated on
// normal arguments of deviation 0.3 to 3 its root mean square is 0.4e-7 to 0.7e-7), and by 2 ulp
// where the tiny form serves. Moving the arguments by an ulp each changes tanh(q + k) by as much.

// Which arithmetic serves a pair of tokens, by how large |q + k| can get: the sum of the bounds of
// both, the largest |x| of each.
enum class Form {
  tiny,     // E - 1 would cancel: tanh's own series
  grouped,  // the product of four E + 1 is finite, times v as well
  single,   // one is
  plain,    // large, infinite or NaN: tanh of the sum
};

template <class C>
struct FormBounds;
template <>
struct FormBounds<float> {
  static constexpr float tiny = 0.5f, grouped = 9.0f, single = 30.0f, v = 1e6f;
};
template <>
struct FormBounds<double> {
  static constexpr double tiny = 0.8, grouped = 80.0, single = 300.0, v = 1e25;
};

template <class C>
SK_INLINE C infinity() {
  return C(__builtin_inf());
}

// Vectors in registers, one for each lane of a vector of sums.
template <class C>
constexpr int kPairKeys = kLanes<C> < 4 ? kLanes<C> : 4;
template <class C>
constexpr int kPairQueries = kLanes<C> / kPairKeys<C>;

// Tokens ready for scores: rows of `stride` elements, padded with zeros, their exponentials e^2x,
// and the largest |x| of each row (infinity where one is NaN).
template <class C>
struct AdditiveTokens {
  C* rows;
  C* exps;
  C* bounds;
  int64_t stride;

  AdditiveTokens from(int64_t token) const {
    return {rows + token * stride, exps + token * stride, bounds + token, stride};
  }
};

// v as the scores need it: padded with zeros, and whether it is of ordinary size.
template <class C>
struct AdditiveVector {
  const C* v;
  int64_t size;  // D
  bool ordinary;
  int64_t padded;  // D rounded up to a multiple of the lanes
};

// Keeps the compiler from fusing this product into a sum: the two operands of that sum would then
// not be rounded alike, in one tile this one and in another that.
template <class C>
SK_INLINE V<C> rounded(V<C> x) {
#if defined(__x86_64__) && defined(SK_AVX512)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

template <class C>
SK_INLINE V<C> absolute(V<C> x) {
  return (x < C(0)) ? -x : x;
}

// Whether |x| is at most the limit in all lanes; false where there is a NaN.
template <class C>
SK_INLINE bool all_within(V<C> x, C limit) {
  const V<C> size = absolute<C>(x);
#ifdef SK_AVX512
  if constexpr (sizeof(C) == 4)
    return _mm512_cmp_ps_mask(bit_cast<__m512>(size), bit_cast<__m512>(splat(limit)), _CMP_LE_OQ) ==
           0xffff;
#endif
  const auto within = size <= limit;
  uint64_t parts[SK_VBYTES / 8], all = ~uint64_t(0);
  __builtin_memcpy(parts, &within, sizeof(parts));
  for (uint64_t part : parts) all &= part;
  return all == ~uint64_t(0);
}

// 1 / b for b in [1, 2^125].
template <class C>
SK_INLINE V<C> reciprocal(V<C> b) {
  return divide(splat(C(1)), b);
}
// acc + a / b.
template <class C>
SK_INLINE V<C> add_quotient(V<C> acc, V<C> a, V<C> b) {
#ifdef SK_AVX512
  if constexpr (sizeof(C) == 4) return acc + a * reciprocal<C>(b);
#endif
  return acc + divide(a, b);
}

// v (den - 2), the numerator of v tanh.
template <class C>
SK_INLINE V<C> numerator(V<C> v, V<C> den) {
  return v * den - (v + v);
}

// acc + the sum of v (den - 2) / den over four vectors, by one reciprocal.
template <class C>
SK_INLINE V<C> add_quotients(V<C> acc, const C* v, const V<C>* den) {
  constexpr int L = kLanes<C>;
  V<C> num[2], all[2];
#pragma GCC unroll 2
  for (int g = 0; g < 2; ++g) {
    const V<C> a = den[2 * g], b = den[2 * g + 1];
    const V<C> first = numerator<C>(load<C>(v + 2 * g * L), a);
    const V<C> second = numerator<C>(load<C>(v + (2 * g + 1) * L), b);
    num[g] = first * b + rounded<C>(second * a);
    all[g] = a * b;
  }
  return add_quotient<C>(acc, num[0] * all[1] + rounded<C>(num[1] * all[0]), all[0] * all[1]);
}

// The sum of a vector's lanes, by halves.
template <class C>
SK_INLINE C sum_lanes(V<C> x) {
  C t[kLanes<C>];
  store<C>(t, x);
#pragma GCC unroll 4
  for (int d = kLanes<C> / 2; d > 0; d /= 2)
#pragma GCC unroll 8
    for (int l = 0; l < d; ++l) t[l] += t[l + d];
  return t[0];
}
// Lane l of the result is the sum of the lanes of r[l], by halves as above.
template <class C, int D = kLanes<C> / 2>
SK_INLINE V<C> sum_each(V<C>* r) {
  constexpr int L = kLanes<C>;
  typename Simd<C>::I lo, hi;
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) {
    lo[l] = (l & D) == 0 ? l : L + l - D;
    hi[l] = (l & D) == 0 ? l + D : L + l;
  }
#pragma GCC unroll 8
  for (int i = 0; i < D; ++i)
    r[i] = __builtin_shuffle(r[i], r[i + D], lo) + __builtin_shuffle(r[i], r[i + D], hi);
  if constexpr (D > 1) return sum_each<C, D / 2>(r);
  return r[0];
}

// Reads one token of n elements: its row and its exponentials, both padded to whole vectors.
// Returns the largest |x|.
template <class S, class C>
static C exponentials(const S* x, int64_t n, C* row, C* exps) {
  constexpr C limit = 2 * FormBounds<C>::single;
  V<C> top = {}, poison = {};
  for (int64_t i = 0; i < n; i += kLanes<C>) {
    const V<C> a = load_n<C>(x + i, n - i), size = absolute<C>(a);
    top = (size > top) ? size : top;
    poison += a - a;  // 0, and NaN for what is not finite
    V<C> scale, p;
    exp_parts<C>(clamp_keep_nan<C>(a + a, -limit, limit), scale, p);
    store<C>(row + i, a);
    store<C>(exps + i, scale + scale * p);
  }
  C largest = 0;
  for (int l = 0; l < kLanes<C>; ++l) largest = max_(largest, C(top[l]));
  return sum_lanes<C>(poison) == C(0) ? largest : infinity<C>();
}

// Tokens [0, n) at x, `row` elements apart, D elements each.
template <class S, class C>
static void prepare_tokens(const S* x, int64_t row, int64_t n, int64_t D,
                           const AdditiveTokens<C>& to) {
  for (int64_t i = 0; i < n; ++i)
    to.bounds[i] =
        exponentials<S, C>(x + i * row, D, to.rows + i * to.stride, to.exps + i * to.stride);
}

// v (D,) into `to`, which holds D rounded up to whole vectors.
template <class S, class C>
static AdditiveVector<C> prepare_vector(const S* v, int64_t D, C* to) {
  const int64_t padded = round_up(D, kLanes<C>);
  copy_row<C>(to, v, D, padded);
  bool ordinary = true;
  for (int64_t i = 0; i < padded; i += kLanes<C>)
    ordinary = ordinary && all_within<C>(load<C>(to + i), FormBounds<C>::v);
  return {to, D, ordinary, padded};
}

template <class C>
SK_INLINE Form form_of(C q_bound, C k_bound, const AdditiveVector<C>& v) {
  const C size = q_bound + k_bound;
  if (!v.ordinary || !(size <= FormBounds<C>::single)) return Form::plain;
  if (size <= FormBounds<C>::tiny) return Form::tiny;
  return size <= FormBounds<C>::grouped ? Form::grouped : Form::single;
}

// tanh for |x| <= 0.5, error under 2 ulp. (tanh(x) / x - 1) / x^2 as a polynomial of x^2, fitted at
// Chebyshev nodes (relative error 1.4e-9 of tanh).
SK_INLINE V<float> tanh_tiny(V<float> x) {
  const V<float> u = x * x;
  V<float> p = splat(-0.00694294175041f);
  p = p * u + 0.0214706830253f;
  p = p * u - 0.053933469146f;
  p = p * u + 0.133332257755f;
  p = p * u - 0.333333327966f;
  return rounded<float>(p * u) * x + x;
}
SK_INLINE V<double> tanh_tiny(V<double> x) { return tanh<double>(x); }

// ---- scores

// sum_d v_d tanh(q_d + k_d) of R queries and K keys, in `sums` query by query; R * K is at most the
// number of lanes. A pair's sum has the same bits in every tile.
template <class C, Form F, int R, int K>
static V<C> score_tile(const C* const* q, const C* const* k, const AdditiveVector<C>& v) {
  constexpr int L = kLanes<C>, G = F == Form::grouped ? 4 : 1;
  V<C> acc[L] = {};
  int64_t d = 0;
  if constexpr (F == Form::grouped) {
    for (; d + G * L <= v.padded; d += G * L) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < K; ++c) {
          V<C> den[G];
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g)
            den[g] = load<C>(q[r] + d + g * L) * load<C>(k[c] + d + g * L) + C(1);
          acc[r * K + c] = add_quotients<C>(acc[r * K + c], v.v + d, den);
        }
    }
  }
  for (; d < v.padded; d += L) {
    const V<C> w = load<C>(v.v + d);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < K; ++c) {
        const V<C> a = load<C>(q[r] + d), b = load<C>(k[c] + d);
        V<C>& sum = acc[r * K + c];
        if constexpr (F == Form::plain) sum += w * tanh<C>(a + b);
        if constexpr (F == Form::tiny) sum += w * tanh_tiny(a + b);
        if constexpr (F == Form::grouped || F == Form::single) {
          const V<C> den = a * b + C(1);
          sum = add_quotient<C>(sum, numerator<C>(w, den), den);
        }
      }
  }
  return sum_each<C>(acc);
}

template <class C, int R, int K>
static V<C> score_tile_of(Form form, const C* const* q_rows, const C* const* q_exps,
                          const C* const* k_rows, const C* const* k_exps,
                          const AdditiveVector<C>& v) {
  switch (form) {
    case Form::tiny:
      return score_tile<C, Form::tiny, R, K>(q_rows, k_rows, v);
    case Form::grouped:
      return score_tile<C, Form::grouped, R, K>(q_exps, k_exps, v);
    case Form::single:
      return score_tile<C, Form::single, R, K>(q_exps, k_exps, v);
    case Form::plain:
      break;
  }
  return score_tile<C, Form::plain, R, K>(q_rows, k_rows, v);
}

// The scores of up to R queries and K keys: to[r * ld + c]. Tokens past the ends are the last one
// again; pairs of different forms are computed one by one.
template <class C, int R, int K>
static void score_block(const AdditiveTokens<C>& q, int64_t queries, const AdditiveTokens<C>& k,
                        int64_t keys, const AdditiveVector<C>& v, C* to, int64_t ld) {
  const C *q_rows[R], *q_exps[R], *k_rows[K], *k_exps[K];
  for (int r = 0; r < R; ++r) {
    const AdditiveTokens<C> t = q.from(min_<int64_t>(r, queries - 1));
    q_rows[r] = t.rows, q_exps[r] = t.exps;
  }
  for (int c = 0; c < K; ++c) {
    const AdditiveTokens<C> t = k.from(min_<int64_t>(c, keys - 1));
    k_rows[c] = t.rows, k_exps[c] = t.exps;
  }
  const Form form = form_of(q.bounds[0], k.bounds[0], v);
  bool same = true;
  for (int64_t r = 0; r < queries; ++r)
    for (int64_t c = 0; c < keys; ++c) same = same && form_of(q.bounds[r], k.bounds[c], v) == form;
  C sums[kLanes<C>];
  if (same) {
    store<C>(sums, score_tile_of<C, R, K>(form, q_rows, q_exps, k_rows, k_exps, v));
  } else {
    for (int64_t r = 0; r < queries; ++r)
      for (int64_t c = 0; c < keys; ++c)
        sums[r * K + c] = score_tile_of<C, 1, 1>(form_of(q.bounds[r], k.bounds[c], v), q_rows + r,
                                                 q_exps + r, k_rows + c, k_exps + c, v)[0];
  }
  for (int64_t r = 0; r < queries; ++r)
    for (int64_t c = 0; c < keys; ++c) to[r * ld + c] = sums[r * K + c];
}

// to[i * ld + j] = sum_d v_d tanh(q_i + k_j) for queries [0, queries) and keys [0, keys).
template <class C, int R = kPairQueries<C>>
static void scores(const AdditiveTokens<C>& q, int64_t queries, const AdditiveTokens<C>& k,
                   int64_t keys, const AdditiveVector<C>& v, C* to, int64_t ld) {
  constexpr int K = kPairKeys<C>;
  int64_t i = 0;
  for (; i + R <= queries; i += R)
    for (int64_t j = 0; j < keys; j += K)
      score_block<C, R, K>(q.from(i), R, k.from(j), min_<int64_t>(K, keys - j), v, to + i * ld + j,
                           ld);
  if constexpr (R > 1)
    if (i < queries) scores<C, R / 2>(q.from(i), queries - i, k, keys, v, to + i * ld, ld);
}

// The same for one query: what a decoder's step needs.
template <class C>
static void score_row(const AdditiveTokens<C>& q, const AdditiveTokens<C>& k, int64_t keys,
                      const AdditiveVector<C>& v, C* to) {
  scores<C, 1>(q, 1, k, keys, v, to, 0);
}
