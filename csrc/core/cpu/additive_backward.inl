// The backward of additive attention for one row of the batch: blocks of queries, whose scores are
// computed again, then ds, then the sums over pairs.

// A row of scores becomes its weights exp(s - lse).
template <class C>
static void weights_from(C* s, int64_t keys, C lse) {
  const bool nothing_left = lse == -infinity<C>();
  for (int64_t j = 0; j < keys; j += kLanes<C>) {
    const V<C> w = exp_or_zero<C>(load_n<C>(s + j, keys - j) - lse);
    store_n<C>(s + j, nothing_left ? V<C>{} : w, keys - j);
  }
}

// Gradients of a row of scores from its weights: ds = w (dP - delta) with
// delta = sum_j w_j dP_j - dlse. On return dp holds ds, exactly nothing where the weight is 0,
// which may hide a NaN.
template <class C>
static void score_gradients(const C* w, C* dp, int64_t keys, C dlse) {
  constexpr int L = kLanes<C>;
  V<C> delta = {};
  for (int64_t j = 0; j < keys; j += L) {
    const V<C> weight = load_n<C>(w + j, keys - j), g = load_n<C>(dp + j, keys - j);
    delta += (weight == C(0)) ? V<C>{} : weight * g;
  }
  const C mean = sum_lanes<C>(delta) - dlse;
  for (int64_t j = 0; j < keys; j += L) {
    const V<C> weight = load_n<C>(w + j, keys - j), g = load_n<C>(dp + j, keys - j);
    store_n<C>(dp + j, (weight == C(0)) ? V<C>{} : weight * (g - mean), keys - j);
  }
}

template <class S, class C>
struct AdditiveBackwardPass {
  static constexpr int L = kLanes<C>, W = kPanel<C>;

  const AdditiveBackward& f;
  const Additive& a;
  const int64_t block, stride, ld_s, ld_k, ld_o;
  AdditiveTokens<C> q, k;
  C *v, *dq, *dk, *dv;  // sums of ds g and ds tanh
  C *s, *dp, *st;       // (queries, keys), and the weights transposed
  C *values, *value_panels, *d_o, *do_panels, *dvalue;
  C* dbias;

  AdditiveBackwardPass(const AdditiveBackward& f_, Space space, int64_t* bytes)
      : f(f_),
        a(f_.in),
        block(min_(a.Tq, kAdditiveBlock)),
        stride(odd_row<C>(a.D)),
        ld_s(round_up(a.Tk, W)),
        ld_k(odd_row<C>(kAdditiveBlock)),
        ld_o(round_up(a.Dv, W)),
        q(space.tokens<C>(block, stride)),
        k(space.tokens<C>(a.Tk, stride)),
        v(space.take<C>(stride)),
        dq(space.take<C>(block * stride)),
        dk(space.take<C>(a.Tk * stride)),
        dv(space.take<C>(stride)),
        s(space.take<C>(block * ld_s)),
        dp(space.take<C>(block * ld_s)),
        st(space.take<C>(f.dvalue ? a.Tk * ld_k : 0)),
        values(space.take<C>(a.Tk * a.Dv)),
        value_panels(space.take<C>(ld_s * a.Dv)),
        d_o(space.take<C>(block * ld_o)),
        do_panels(space.take<C>(f.dvalue ? block * ld_o : 0)),
        dvalue(space.take<C>(f.dvalue ? a.Tk * ld_o : 0)),
        dbias(space.take<C>(f.dbias && f.bias_sizes[0] != 1 ? f.bias_sizes[1] * f.bias_sizes[2]
                                                            : 0)) {
    if (bytes) *bytes = space.used;
  }

  static int64_t scratch_bytes(const AdditiveBackward& f) {
    int64_t bytes;
    AdditiveBackwardPass(f, {nullptr}, &bytes);
    return bytes;
  }

  static void add(void* total, const void* share, int64_t n) {
    C* to = static_cast<C*>(total);
    const C* from = static_cast<const C*>(share);
    for (int64_t i = 0; i < n; ++i) to[i] += from[i];
  }

  static void write(void* to, Type type, const void* from, int64_t n) {
    const C* x = static_cast<const C*>(from);
    if constexpr (sizeof(C) == 8) {
      if (type == Type::f32) {
        for (int64_t i = 0; i < n; ++i) static_cast<float*>(to)[i] = float(x[i]);
        return;
      }
    } else {
      if (type == Type::bf16) return store_row(static_cast<bf16*>(to), x, n);
      if (type == Type::f16) return store_row(static_cast<f16*>(to), x, n);
    }
    store_row(static_cast<C*>(to), x, n);
  }

  template <class T>
  static void store_row(T* to, const C* x, int64_t n) {
    for (int64_t i = 0; i < n; i += L) store_n<C>(to + i, load_n<C>(x + i, n - i), n - i);
  }

  static void clear(C* p, int64_t n) { __builtin_memset(p, 0, size_t(n) * sizeof(C)); }

  static void run(const AdditiveBackward& f, int64_t b, void* dv, void* dbias, char* scratch) {
    AdditiveBackwardPass(f, {scratch}, nullptr).row(b, static_cast<C*>(dv), static_cast<C*>(dbias));
  }

  void row(int64_t b, C* dv_share, C* dbias_share) {
    const AdditiveVector<C> vector = prepare_vector<S, C>(static_cast<const S*>(a.v), a.D, v);
    const int64_t keys = keys_of(a, b), bias_size = f.bias_sizes[1] * f.bias_sizes[2];
    if (f.dbias && f.bias_sizes[0] == 1) dbias = dbias_share;
    if (f.dbias) clear(dbias, bias_size);
    clear(dv, stride);
    if (!one_query(b, keys, vector)) all_queries(b, keys, vector);
    if (f.dv)
      for (int64_t d = 0; d < a.D; ++d) dv_share[d] = C(a.scale) * dv[d];
    if (f.dbias && f.bias_sizes[0] != 1) {
      const int64_t size = a.bias_type == Type::f64 ? 8 : a.bias_type == Type::f32 ? 4 : 2;
      write(static_cast<char*>(f.dbias) + b * bias_size * size, a.bias_type, dbias, bias_size);
    }
  }

  // As `all_queries`, for one query. Does nothing and returns false where the keys are NaN.
  bool one_query(int64_t b, int64_t keys, const AdditiveVector<C>& vector) {
    if (a.Tq != 1 || keys == 0 || !vector.ordinary) return false;
    C *w = s, *g = dp, *tanhs = k.exps;
    S* const to_key = f.dkey ? static_cast<S*>(f.dkey) + b * a.Tk * a.D : nullptr;
    S* const to_value = f.dvalue ? static_cast<S*>(f.dvalue) + b * a.Tk * a.Dv : nullptr;
    const NextRows<S> values{token_at<S>(a.value, b, 0), a.value.row};
    const NextRows<S> next[] = {values, to_key ? NextRows<S>{to_key, a.D} : values,
                                to_value ? NextRows<S>{to_value, a.Dv} : values};
    copy_row<C>(q.rows, token_at<S>(a.query, b, 0), a.D, stride);
    score_single<S, C, true>(q.rows, token_at<S>(a.key, b, 0), a.key.row, keys, next, vector, w,
                             tanhs);
    for (int64_t j = 0; j < keys; ++j)
      if (w[j] != w[j]) return false;
    finish_scores<C>(a, b, 0, keys, w);
    // Not by the forward's lse, whose scores had other roundings: large ones would not add up.
    C total;
    softmax_row<C>(w, keys, total);
    for (int64_t j = 0; j < keys; ++j) w[j] /= total == C(0) ? C(1) : total;
    read_gradient(b, 0);
    multiply_single<S, C>(d_o, values.at, values.row, keys, a.Dv, g);
    finish_gradients(b, 0, keys, w, g);
    // The slope of the keys' gradients; dq is multiplied by it at the end.
    C* const slope = k.rows;
    for (int64_t d = 0; d < vector.padded; ++d) slope[d] = 1;
    finish_row<C>(slope, vector, C(a.scale));
    clear(dq, stride);
    int64_t j = 0;
    for (; j + 4 <= keys; j += 4)
      gradients_single<S, C, 4>(tanhs + j * vector.padded, g + j, slope, a.D, vector.padded, dq, dv,
                                to_key ? to_key + j * a.D : nullptr);
    for (; j < keys; ++j)
      gradients_single<S, C, 1>(tanhs + j * vector.padded, g + j, slope, a.D, vector.padded, dq, dv,
                                to_key ? to_key + j * a.D : nullptr);
    if (to_key) clear_row(to_key + keys * a.D, (a.Tk - keys) * a.D);
    write_rows(f.dquery, b, 1, 1, dq, vector);
    if (!to_value) return true;
    dvalue_single<S, C>(w, d_o, keys, a.Dv, to_value);
    clear_row(to_value + keys * a.Dv, (a.Tk - keys) * a.Dv);
    return true;
  }

  static void clear_row(S* to, int64_t n) { __builtin_memset(to, 0, size_t(n) * sizeof(S)); }

  void all_queries(int64_t b, int64_t keys, const AdditiveVector<C>& vector) {
    clear(dk, a.Tk * stride);
    if (f.dvalue) clear(dvalue, a.Tk * ld_o);
    prepare_tokens<S, C>(token_at<S>(a.key, b, 0), a.key.row, keys, a.D, k);
    read_values(b, keys);
    for (int64_t i = 0; i < a.Tq; i += kAdditiveBlock)
      queries(b, i, min_(a.Tq - i, kAdditiveBlock), keys, vector);
    write_rows(f.dkey, b * a.Tk, a.Tk, keys, dk, vector);
    if (f.dvalue)
      for (int64_t j = 0; j < a.Tk; ++j)
        store_row(static_cast<S*>(f.dvalue) + (b * a.Tk + j) * a.Dv, dvalue + j * ld_o, a.Dv);
  }

  void read_values(int64_t b, int64_t keys) {
    for (int64_t j = 0; j < keys; ++j) {
      const S* from = token_at<S>(a.value, b, j);
      for (int64_t d = 0; d < a.Dv; d += L)
        store_n<C>(values + j * a.Dv + d, load_n<C>(from + d, a.Dv - d), a.Dv - d);
    }
    for (int64_t p = 0; p < ceil_div(keys, W); ++p)
      Product<C, C>::template pack_panel<C, Mode::rnn_tanh>(value_panels + p * W * a.Dv, values,
                                                            keys, a.Dv, p);
  }

  void queries(int64_t b, int64_t first, int64_t m, int64_t keys, const AdditiveVector<C>& vector) {
    prepare_tokens<S, C>(token_at<S>(a.query, b, first), a.query.row, m, a.D, q);
    scores<C>(q, m, k, keys, vector, s, ld_s);
    for (int64_t i = 0; i < m; ++i) {
      finish_scores<C>(a, b, first + i, keys, s + i * ld_s);
      read_gradient(b * a.Tq + first + i, i);
    }
    multiply(m, d_o, ld_o, value_panels, a.Dv, ceil_div(keys, W), dp, ld_s, true);
    for (int64_t i = 0; i < m; ++i) {
      weights_from<C>(s + i * ld_s, keys, static_cast<const C*>(f.lse)[b * a.Tq + first + i]);
      finish_gradients(b, first + i, keys, s + i * ld_s, dp + i * ld_s);
    }
    if (f.dvalue) add_values(m, keys);
    if (!f.dquery && !f.dkey && !f.dv) return;
    clear(dq, m * stride);
    for (int64_t i = 0; i < m; ++i)
      score_row_backward<C>(q.from(i), k, keys, vector, dp + i * ld_s, dq + i * stride, dk, dv);
    write_rows(f.dquery, b * a.Tq + first, m, m, dq, vector);
  }

  // do of query `at` of all into row i of d_o; zeros where nothing was left to the query, whose
  // gradient may be anything.
  void read_gradient(int64_t at, int64_t i) {
    if (static_cast<const C*>(f.lse)[at] == -infinity<C>())
      clear(d_o + i * ld_o, ld_o);
    else
      copy_row<C>(d_o + i * ld_o, static_cast<const S*>(f.d_o) + at * a.Dv, a.Dv, ld_o);
  }

  // From the weights and do . value of a query: its ds, in place of the latter.
  void finish_gradients(int64_t b, int64_t i, int64_t keys, const C* w, C* g) {
    const int64_t at = b * a.Tq + i;
    if (f.dweights) {
      const S* dw = static_cast<const S*>(f.dweights) + at * a.Tk;
      for (int64_t j = 0; j < keys; j += L)
        store_n<C>(g + j, load_n<C>(g + j, keys - j) + load_n<C>(dw + j, keys - j), keys - j);
    }
    const C dlse = f.dlse ? static_cast<const C*>(f.dlse)[at] : C(0);
    score_gradients<C>(w, g, keys, dlse);
    add_bias_gradient(i, g, keys);
  }

  static void multiply(int64_t m, const C* x, int64_t ldx, const C* packed, int64_t depth,
                       int64_t panels, C* to, int64_t ld, bool fresh) {
    if (fresh)
      for (int64_t i = 0; i < m; ++i) clear(to + i * ld, panels * W);
    const Matrix<C, C> matrix{packed, nullptr, 0, depth};
    Product<C, C>::template gemm<C, Mode::rnn_tanh>(m, x, ldx, matrix, 0, panels, to, ld,
                                                    {1, W, {0, 0, 0, 0}}, nullptr, false);
  }

  // dvalue += w^T do.
  void add_values(int64_t m, int64_t keys) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < keys; ++j) st[j * ld_k + i] = s[i * ld_s + j];
    for (int64_t p = 0; p < ld_o / W; ++p)
      Product<C, C>::pack_columns(do_panels + p * W * m, d_o, ld_o, m, a.Dv, p);
    multiply(keys, st, ld_k, do_panels, m, ld_o / W, dvalue, ld_o, false);
  }

  void add_bias_gradient(int64_t i, const C* ds, int64_t keys) {
    if (!f.dbias) return;
    C* to = dbias + (f.bias_sizes[1] == 1 ? 0 : i * f.bias_sizes[2]);
    const int64_t step = f.bias_sizes[2] == 1 ? 0 : 1;
    for (int64_t j = 0; j < keys; ++j) to[j * step] += ds[j];
  }

  // The gradients of `rows` tokens from `at` on, of which the first `live` exist.
  void write_rows(void* to, int64_t at, int64_t rows, int64_t live, C* sums,
                  const AdditiveVector<C>& vector) {
    if (!to) return;
    for (int64_t i = 0; i < rows; ++i) {
      if (i < live) finish_row<C>(sums + i * stride, vector, C(a.scale));
      store_row(static_cast<S*>(to) + (at + i) * a.D, sums + i * stride, a.D);
    }
  }
};
