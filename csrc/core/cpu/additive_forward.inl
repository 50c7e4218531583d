// The forward of additive attention: blocks of queries, whose scores over all keys are kept, so
// that the softmax is exact. Keys and values come in blocks that stay in the L2 cache.

#include "additive_single.inl"

// Hands out aligned pieces of a thread's scratch; with a null base it only counts.
struct Space {
  char* base;
  int64_t used = 0;
  template <class X>
  X* take(int64_t n) {
    X* p = base ? reinterpret_cast<X*>(base + used) : nullptr;
    used += round_up(n * int64_t(sizeof(X)), 64);
    return p;
  }
  template <class C>
  AdditiveTokens<C> tokens(int64_t n, int64_t stride) {
    C* rows = take<C>(n * stride);
    C* exps = take<C>(n * stride);
    return {rows, exps, take<C>(n), stride};
  }
};

// Whole vectors, and an odd number of them: rows one above the other then lie in different sets of
// the caches.
template <class C>
SK_INLINE int64_t odd_row(int64_t n) {
  return (ceil_div(n, kLanes<C>) | 1) * kLanes<C>;
}

template <class S>
SK_INLINE const S* token_at(const TokenRows& t, int64_t b, int64_t i) {
  return static_cast<const S*>(t.p) + b * t.batch + i * t.row;
}

// Keys of row b of the batch.
SK_INLINE int64_t keys_of(const Additive& a, int64_t b) {
  return a.k_lens ? max_<int64_t>(0, min_<int64_t>(a.k_lens[b], a.Tk)) : a.Tk;
}

// Bias (b, i, j) in the compute type.
template <class C>
SK_INLINE C bias_at(const Additive& a, int64_t b, int64_t i, int64_t j) {
  const int64_t at = b * a.bias.batch + i * a.bias.query + j * a.bias.key;
  switch (a.bias_type) {
    case Type::f64:
      return C(static_cast<const double*>(a.bias.p)[at]);
    case Type::f32:
      return C(static_cast<const float*>(a.bias.p)[at]);
    case Type::bf16: {
      const uint32_t bits = uint32_t(static_cast<const bf16*>(a.bias.p)[at].bits) << 16;
      return C(bit_cast<float>(bits));
    }
    case Type::f16:
    case Type::tf32:  // no tensor's
      break;
  }
  return C(load_n<float>(static_cast<const f16*>(a.bias.p) + at, 1)[0]);
}

// s[0..keys) of query i, from what `scores` left there: scaled, biased, -inf where left out.
template <class C>
static void finish_scores(const Additive& a, int64_t b, int64_t i, int64_t keys, C* s) {
  const C scale = C(a.scale), none = -infinity<C>();
  for (int64_t j = 0; j < keys; ++j) s[j] *= scale;
  if (a.bias.p)
    for (int64_t j = 0; j < keys; ++j) {
      const C bias = bias_at<C>(a, b, i, j);
      s[j] = bias == none ? none : s[j] + bias;
    }
  if (!a.mask.p) return;
  const auto* mask = static_cast<const uint8_t*>(a.mask.p) + b * a.mask.batch + i * a.mask.query;
  for (int64_t j = 0; j < keys; ++j)
    if (!mask[j * a.mask.key]) s[j] = none;
}

// exp(x), 0 from exp_parts' lowest argument on: what is left out counts for nothing.
template <class C>
SK_INLINE V<C> exp_or_zero(V<C> x) {
  V<C> scale, p;
  exp_parts<C>(clamp_keep_nan<C>(x, ExpConstants<C>::low, ExpConstants<C>::high), scale, p);
  const V<C> e = scale + scale * p;
  return (x < ExpConstants<C>::low) ? V<C>{} : e;
}

// s becomes exp(s - max s); returns the log of the sum of exp(s) and leaves the sum in `total`. A
// row from which everything is left out becomes zeros, with a sum of 0.
template <class C>
static C softmax_row(C* s, int64_t keys, C& total) {
  constexpr int L = kLanes<C>;
  C top = -infinity<C>();
  bool poisoned = false;
  for (int64_t j = 0; j < keys; ++j) {
    top = max_(top, s[j]);
    poisoned = poisoned || s[j] != s[j];
  }
  if (poisoned) top = s[0] * C(__builtin_nan(""));
  if (top == -infinity<C>()) {
    for (int64_t j = 0; j < keys; ++j) s[j] = 0;
    total = 0;
    return top;
  }
  V<C> sum = {};
  for (int64_t j = 0; j < keys; j += L) {
    V<C> e = exp_or_zero<C>(load_n<C>(s + j, keys - j) - top);
    store_n<C>(s + j, e, keys - j);
    if (keys - j < L) e = load_n<C>(s + j, keys - j);  // without what stands beyond the end
    sum += e;
  }
  total = sum_lanes<C>(sum);
  return top + C(__builtin_log(double(total)));
}

// to (m, Dv) = sum over keys of w_ij value_j, without the pairs of weight 0: for values that are
// not all finite, where 0 * NaN would show a value that is left out.
template <class S, class C>
static void context_of_any(const C* w, int64_t ldw, int64_t m, int64_t keys, const S* value,
                           int64_t row, int64_t Dv, C* to, int64_t ld) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < keys; ++j) {
      const C weight = w[i * ldw + j];
      if (weight == C(0)) continue;
      for (int64_t d = 0; d < Dv; d += kLanes<C>)
        store<C>(to + i * ld + d,
                 load<C>(to + i * ld + d) + weight * load_n<C>(value + j * row + d, Dv - d));
    }
}

template <class S, class C>
static bool all_finite(const S* x, int64_t row, int64_t rows, int64_t n) {
  V<C> poison = {};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < n; d += kLanes<C>) {
      const V<C> a = load_n<C>(x + i * row + d, n - d);
      poison += a - a;
    }
  return sum_lanes<C>(poison) == C(0);
}

template <class S, class C>
struct AdditiveForwardPass {
  static constexpr int L = kLanes<C>, W = kPanel<C>;
  static constexpr int64_t kKeys = 64;  // of a block

  const AdditiveForward& f;
  const Additive& a;
  const int64_t block, keys_block, stride, ld_s, ld_o;
  AdditiveTokens<C> q, k;
  C *v, *s, *context, *panels;

  AdditiveForwardPass(const AdditiveForward& f_, Space space, int64_t* bytes)
      : f(f_),
        a(f_.in),
        block(min_(a.Tq, kAdditiveBlock)),
        keys_block(min_(a.Tk, kKeys)),
        stride(odd_row<C>(a.D)),
        ld_s(odd_row<C>(a.Tk)),
        ld_o(round_up(a.Dv, W)),
        q(space.tokens<C>(block, stride)),
        k(space.tokens<C>(keys_block, stride)),
        v(space.take<C>(stride)),
        s(space.take<C>(block * ld_s)),
        context(space.take<C>(block * ld_o)),
        panels(space.take<C>(keys_block * ld_o)) {
    if (bytes) *bytes = space.used;
  }

  static int64_t scratch_bytes(const AdditiveForward& f) {
    int64_t bytes;
    AdditiveForwardPass(f, {nullptr}, &bytes);
    return bytes;
  }

  static void run(const AdditiveForward& f, int64_t begin, int64_t end, char* scratch) {
    AdditiveForwardPass pass(f, {scratch}, nullptr);
    const Additive& a = f.in;
    const AdditiveVector<C> v = prepare_vector<S, C>(static_cast<const S*>(a.v), a.D, pass.v);
    const int64_t blocks = ceil_div(a.Tq, kAdditiveBlock);
    for (int64_t n = begin; n < end; ++n) pass.block_of(n / blocks, n % blocks, v);
  }

  void block_of(int64_t b, int64_t part, const AdditiveVector<C>& vector) {
    const int64_t first = part * kAdditiveBlock, m = min_(a.Tq - first, kAdditiveBlock);
    const int64_t keys = keys_of(a, b);
    prepare_tokens<S, C>(token_at<S>(a.query, b, first), a.query.row, m, a.D, q);
    if (one_query(vector)) {
      const NextRows<S> next[] = {{token_at<S>(a.value, b, 0), a.value.row}};
      score_single<S, C, false>(q.rows, token_at<S>(a.key, b, 0), a.key.row, keys, next, vector, s,
                                nullptr);
    } else {
      for (int64_t j = 0; j < keys; j += kKeys) {
        const int64_t n = min_(keys - j, kKeys);
        prepare_tokens<S, C>(token_at<S>(a.key, b, j), a.key.row, n, a.D, k);
        scores<C>(q, m, k, n, vector, s + j, ld_s);
      }
    }
    C totals[kAdditiveBlock];
    for (int64_t i = 0; i < m; ++i) {
      C* row = s + i * ld_s;
      finish_scores<C>(a, b, first + i, keys, row);
      static_cast<C*>(f.lse)[b * a.Tq + first + i] = softmax_row<C>(row, keys, totals[i]);
    }
    contexts(b, m, keys);
    for (int64_t i = 0; i < m; ++i)
      write(b, first + i, keys, s + i * ld_s, context + i * ld_o,
            totals[i] == C(0) ? C(1) : totals[i]);
  }

  bool one_query(const AdditiveVector<C>& vector) const { return a.Tq == 1 && vector.ordinary; }

  // context (m, Dv) = s value.
  void contexts(int64_t b, int64_t m, int64_t keys) {
    if (a.Tq == 1)
      return context_single<S, C>(s, keys, token_at<S>(a.value, b, 0), a.value.row, a.Dv, context);
    __builtin_memset(context, 0, size_t(m * ld_o) * sizeof(C));
    const S* value = token_at<S>(a.value, b, 0);
    if (!all_finite<S, C>(value, a.value.row, keys, a.Dv))
      return context_of_any<S, C>(s, ld_s, m, keys, value, a.value.row, a.Dv, context, ld_o);
    for (int64_t j = 0; j < keys; j += kKeys) {
      const int64_t n = min_(keys - j, kKeys);
      for (int64_t p = 0; p < ld_o / W; ++p)
        Product<C, C>::pack_columns(panels + p * W * n, value + j * a.value.row, a.value.row, n,
                                    a.Dv, p);
      const Matrix<C, C> matrix{panels, nullptr, 0, n};
      Product<C, C>::template gemm<C, Mode::rnn_tanh>(m, s + j, ld_s, matrix, 0, ld_o / W, context,
                                                      ld_o, {1, W, {0, 0, 0, 0}}, nullptr, false);
    }
  }

  void write(int64_t b, int64_t i, int64_t keys, const C* e, const C* sums, C total) {
    S* o = static_cast<S*>(f.o) + (b * a.Tq + i) * a.Dv;
    for (int64_t d = 0; d < a.Dv; d += L) store_n<C>(o + d, load<C>(sums + d) / total, a.Dv - d);
    if (!f.weights) return;
    S* w = static_cast<S*>(f.weights) + (b * a.Tq + i) * a.Tk;
    for (int64_t j = 0; j < keys; j += L)
      store_n<C>(w + j, load_n<C>(e + j, keys - j) / total, keys - j);
    for (int64_t j = keys; j < a.Tk; ++j) w[j] = S{};
  }
};
