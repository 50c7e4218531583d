// The derivatives of the scores of additive attention. With ds the gradient of the scores,
//
//   dq_d = 4 scale v_d sum_j ds_ij g_ij,  dk_d = 4 scale v_d sum_i ds_ij g_ij,  g = (1 - tanh^2) /
//   4 dv_d =   scale     sum_ij ds_ij tanh_ij
//
// and v enters once for each token: what is summed here are ds g and ds tanh, and `finish_row`
// multiplies at the end. tanh = (E - 1) / (E + 1), where four keys share one reciprocal; of what
// that leaves, g is off by 1.3e-7 (root mean square, simulated) at most. r (1 - r) with r = 1 / (E
// + 1) is g / 4 too, and two instructions shorter, with twice the error.

// r becomes 1 / r; four of them by one reciprocal where their product is finite.
template <class C, int K, bool Grouped>
SK_INLINE void invert(V<C>* r) {
  if constexpr (Grouped && K == 4) {
    const V<C> ab = r[0] * r[1], cd = r[2] * r[3], all = reciprocal<C>(ab * cd);
    const V<C> b = r[1], d = r[3], ab_inverse = all * cd, cd_inverse = all * ab;
    r[1] = ab_inverse * r[0], r[0] = ab_inverse * b;
    r[3] = cd_inverse * r[2], r[2] = cd_inverse * d;
  } else {
#pragma GCC unroll 4
    for (int c = 0; c < K; ++c) r[c] = reciprocal<C>(r[c]);
  }
}

// One vector of one query and K keys: adds to dq, dk and dv.
template <class C, Form F, int K>
SK_INLINE void gradient_step(V<C> q, const V<C>* k, const C* ds, V<C>& dq, V<C>* dk, V<C>& dv) {
  V<C> t[K];
  if constexpr (F == Form::plain || F == Form::tiny) {
#pragma GCC unroll 4
    for (int c = 0; c < K; ++c) t[c] = F == Form::plain ? tanh<C>(q + k[c]) : tanh_tiny(q + k[c]);
  } else {
#pragma GCC unroll 4
    for (int c = 0; c < K; ++c) t[c] = q * k[c] + C(1);
    invert<C, K, F == Form::grouped>(t);
#pragma GCC unroll 4
    for (int c = 0; c < K; ++c) t[c] *= q * k[c] - C(1);
  }
#pragma GCC unroll 4
  for (int c = 0; c < K; ++c) {
    // A pair that is left out has ds = 0, and its tanh may be NaN.
    if (F == Form::plain && ds[c] == C(0)) continue;
    const V<C> g = C(1) - rounded<C>(t[c]) * t[c];
    dq += ds[c] * g;
    dk[c] += ds[c] * g;
    dv += ds[c] * t[c];
  }
}

// One query and K keys: adds to its dq, to the keys' dk (rows like the keys') and to dv.
template <class C, Form F, int K>
static void gradient_row(const C* q, const C* k, int64_t ld, const C* ds, int64_t padded, C* dq,
                         C* dk, C* dv) {
  constexpr int L = kLanes<C>;
  for (int64_t d = 0; d < padded; d += L) {
    V<C> keys[K], sums[K], to_q = load<C>(dq + d), to_v = load<C>(dv + d);
#pragma GCC unroll 4
    for (int c = 0; c < K; ++c)
      keys[c] = load<C>(k + c * ld + d), sums[c] = load<C>(dk + c * ld + d);
    gradient_step<C, F, K>(load<C>(q + d), keys, ds, to_q, sums, to_v);
    store<C>(dq + d, to_q);
    store<C>(dv + d, to_v);
#pragma GCC unroll 4
    for (int c = 0; c < K; ++c) store<C>(dk + c * ld + d, sums[c]);
  }
}

template <class C, int K>
static void gradient_row_of(Form form, const AdditiveTokens<C>& q, const AdditiveTokens<C>& k,
                            const C* ds, int64_t padded, C* dq, C* dk, C* dv) {
  switch (form) {
    case Form::tiny:
      return gradient_row<C, Form::tiny, K>(q.rows, k.rows, k.stride, ds, padded, dq, dk, dv);
    case Form::grouped:
      return gradient_row<C, Form::grouped, K>(q.exps, k.exps, k.stride, ds, padded, dq, dk, dv);
    case Form::single:
      return gradient_row<C, Form::single, K>(q.exps, k.exps, k.stride, ds, padded, dq, dk, dv);
    case Form::plain:
      return gradient_row<C, Form::plain, K>(q.rows, k.rows, k.stride, ds, padded, dq, dk, dv);
  }
}

// The form that serves a query and keys [0, keys), or false where they differ.
template <class C>
SK_INLINE bool common_form(C q_bound, const C* k_bounds, int64_t keys, const AdditiveVector<C>& v,
                           Form& form) {
  form = form_of(q_bound, k_bounds[0], v);
  for (int64_t c = 1; c < keys; ++c)
    if (form_of(q_bound, k_bounds[c], v) != form) return false;
  return true;
}

// The backward of `score_row`: from ds (keys,) adds sum_j ds_j g_j to dq, ds_j g_j to row j of dk
// (whose rows are as far apart as the keys') and sum_j ds_j tanh_j to dv; all padded.
template <class C>
static void score_row_backward(const AdditiveTokens<C>& q, const AdditiveTokens<C>& k, int64_t keys,
                               const AdditiveVector<C>& v, const C* ds, C* dq, C* dk, C* dv) {
  for (int64_t j = 0; j < keys; j += 4) {
    const int64_t n = min_<int64_t>(4, keys - j);
    Form form;
    if (n == 4 && common_form(q.bounds[0], k.bounds + j, n, v, form)) {
      gradient_row_of<C, 4>(form, q, k.from(j), ds + j, v.padded, dq, dk + j * k.stride, dv);
      continue;
    }
    for (int64_t c = j; c < j + n; ++c)
      gradient_row_of<C, 1>(form_of(q.bounds[0], k.bounds[c], v), q, k.from(c), ds + c, v.padded,
                            dq, dk + c * k.stride, dv);
  }
}

// sum[d] *= scale v_d: makes the gradient of a token from its sum of ds g.
template <class C>
static void finish_row(C* sum, const AdditiveVector<C>& v, C scale) {
  for (int64_t d = 0; d < v.padded; d += kLanes<C>)
    store<C>(sum + d, load<C>(sum + d) * rounded<C>(load<C>(v.v + d) * scale));
}
