// The backward of the attending decoder: a block of whole sources through all steps, against their
// order. The gradients of keys and values gather in place over the steps; those of the weights are
// products over all rows of all steps, which the caller makes of dgates_x and dproducts.

// dp[j] = sum_d x_d value_jd for keys [0, keys), x padded with zeros.
template <class S, class C>
static void dot_values(const C* x, const S* value, int64_t row, int64_t keys, int64_t n, C* dp) {
  constexpr int L = kLanes<C>, U = L < 4 ? L : 4;
  for (int64_t j = 0; j < keys; j += U) {
    V<C> acc[L] = {};
    const S* from[U];
    for (int u = 0; u < U; ++u) from[u] = value + min_(j + u, keys - 1) * row;
    for (int64_t d = 0; d < n; d += L) {
      const V<C> xd = load<C>(x + d);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) acc[u] += xd * load_n<C>(from[u] + d, n - d);
    }
    const V<C> sums = sum_each<C>(acc);
    for (int u = 0; u < U && j + u < keys; ++u) dp[j + u] = sums[u];
  }
}

template <class S, class C, Mode M>
struct DecoderBackwardPass {
  using K = Cell<M, C>;
  using Dot = Product<C, C>;
  static constexpr int L = kLanes<C>, W = kPanel<C>;
  static constexpr bool kGru = M == Mode::gru;

  const DecoderBackward& f;
  const Decoder& a;
  const int64_t GH, products;  // columns of dgates_x and of dproducts
  const int64_t units, features, sources, rows;
  const int64_t ldh, lda, ldc, ldk, lds;
  // Shared by all threads: panels of [W_q; W_hh] and W_c, whose rows are k; each source's dv.
  C *w_h, *w_c, *dv;
  // Of one thread.
  AdditiveVector<C> vector;
  AdditiveTokens<C> q, k;
  C *dh, *dcell, *dg, *dcontext, *dq, *dkey, *dvalue, *w, *ds;

  DecoderBackwardPass(const DecoderBackward& f_, Space shared, Space own, Workspace* bytes)
      : f(f_),
        a(f_.in),
        GH(a.gates()),
        products(a.A + GH),
        units(ceil_div(a.H, W)),
        features(ceil_div(a.C, W)),
        sources(sources_of_block(a)),
        rows(sources * a.K),
        ldh(panel_row<C>(a.H)),
        lda(odd_row<C>(a.A)),
        ldc(panel_row<C>(a.C)),
        ldk(odd_row<C>(a.C)),
        lds(round_up(a.Tk, L)),
        w_h(shared.take<C>(units * W * products)),
        w_c(shared.take<C>(features * W * GH)),
        dv(shared.take<C>(a.B * lda)),
        vector{own.take<C>(round_up(a.A, L)), 0, false, 0},
        q(own.tokens<C>(1, lda)),
        k(own.tokens<C>(sources * a.Tk, lda)),
        dh(own.take<C>(rows * ldh)),
        dcell(own.take<C>(M == Mode::lstm ? rows * ldh : 0)),
        dg(own.take<C>(K::grads * a.H)),
        dcontext(own.take<C>(rows * ldc)),
        dq(own.take<C>(lda)),
        dkey(own.take<C>(sources * a.Tk * lda)),
        dvalue(own.take<C>(sources * a.Tk * ldk)),
        w(own.take<C>(lds)),
        ds(own.take<C>(lds)) {
    if (bytes) *bytes = {shared.used, own.used};
  }

  static Workspace workspace(const DecoderBackward& f) {
    Workspace bytes;
    DecoderBackwardPass(f, {nullptr}, {nullptr}, &bytes);
    return bytes;
  }
  static void prepare(const DecoderBackward& f, int64_t part, int64_t parts, char* shared) {
    DecoderBackwardPass(f, {shared}, {nullptr}, nullptr).pack(part, parts);
  }
  static void run(const DecoderBackward& f, int64_t begin, int64_t end, char* shared,
                  char* scratch) {
    DecoderBackwardPass pass(f, {shared}, {scratch}, nullptr);
    pass.vector =
        prepare_vector<S, C>(static_cast<const S*>(f.in.v), f.in.A, const_cast<C*>(pass.vector.v));
    for (int64_t b = begin; b < end; b += pass.sources) pass.block(b, min_(pass.sources, end - b));
  }
  static constexpr DecoderPass<DecoderBackward> pass{workspace, prepare, run};

  // Adds up dv in the order of the sources.
  static void finish(const DecoderBackward& f, char* shared) {
    const DecoderBackwardPass pass(f, {shared}, {nullptr}, nullptr);
    for (int64_t j = 0; j < pass.a.A; j += L) {
      V<C> sum = {};
      for (int64_t b = 0; b < pass.a.B; ++b) sum += load<C>(pass.dv + b * pass.lda + j);
      store_n<C>(static_cast<S*>(f.dv) + j, sum, pass.a.A - j);
    }
  }

  void pack(int64_t part, int64_t parts) {
    const S *q_rows = static_cast<const S*>(a.w_q), *h_rows = static_cast<const S*>(a.w_hh);
    const S* c_rows = static_cast<const S*>(a.w_c);
    const Part u = part_of(units, part, parts), c = part_of(features, part, parts);
    for (int64_t p = u.begin; p < u.end; ++p) {
      Product<C, C>::pack_columns(w_h + p * W * products, q_rows, a.H, a.A, a.H, p);
      Product<C, C>::pack_columns(w_h + p * W * products + a.A * W, h_rows, a.H, GH, a.H, p);
    }
    for (int64_t p = c.begin; p < c.end; ++p)
      Product<C, C>::pack_columns(w_c + p * W * GH, c_rows, a.C, GH, a.C, p);
  }

  static void clear(C* p, int64_t n) { __builtin_memset(p, 0, size_t(n) * sizeof(C)); }

  template <class X>
  static void read_row(C* to, const void* from, int64_t at, int64_t n, int64_t padded) {
    const X* row = static_cast<const X*>(from);
    copy_row<C>(to, row ? row + at : row, row ? n : 0, padded);
  }
  static void write_row(void* to, int64_t at, const C* from, int64_t n) {
    S* p = static_cast<S*>(to) + at;
    for (int64_t j = 0; j < n; j += L) store_n<C>(p + j, load_n<C>(from + j, n - j), n - j);
  }

  // ---- one block: `n` sources from `first` on, all steps

  void block(int64_t first, int64_t n) {
    const int64_t m = n * a.K, row0 = first * a.K;
    prepare_keys<S, C>(a, first, n, k);
    clear(dkey, n * a.Tk * lda);
    clear(dvalue, n * a.Tk * ldk);
    clear(dv + first * lda, n * lda);
    clear(dh, m * ldh);
    for (int64_t r = 0; M == Mode::lstm && r < m; ++r)
      read_row<S>(dcell + r * ldh, f.dc_n, (row0 + r) * a.H, a.H, ldh);
    C* const products_of_block = static_cast<C*>(f.dproducts) + row0 * a.T * products;
    C* const gates_of_block = static_cast<C*>(f.dgates_x) + row0 * a.T * GH;
    for (int64_t i = a.T - 1; i >= 0; --i) {
      for (int64_t r = 0; r < m; ++r) {
        if (r + kRowsAhead < m) fetch_row((row0 + r + kRowsAhead) * a.T + i);
        cell_row(r, (row0 + r) * a.T + i, i);
      }
      multiply(m, gates_of_block + i * GH, a.T * GH, w_c, GH, features, dcontext, ldc);
      for (int64_t r = 0; r < m; ++r) attention_row(r, r / a.K, first, (row0 + r) * a.T + i);
      multiply(m, products_of_block + i * products, a.T * products, w_h, products, units, dh, ldh);
    }
    for (int64_t r = 0; r < m; ++r) {
      write_row(f.dh0, (row0 + r) * a.H, dh + r * ldh, a.H);
      if (M == Mode::lstm) write_row(f.dc0, (row0 + r) * a.H, dcell + r * ldh, a.H);
    }
    for (int64_t t = 0; t < n * a.Tk; ++t) {
      finish_row<C>(dkey + t * lda, vector, C(1));
      write_row(f.dkey, (first * a.Tk + t) * a.A, dkey + t * lda, a.A);
      write_row(f.dvalue, (first * a.Tk + t) * a.C, dvalue + t * ldk, a.C);
    }
  }

  static void multiply(int64_t m, const C* x, int64_t ldx, const C* packed, int64_t depth,
                       int64_t panels, C* to, int64_t ld) {
    const Matrix<C, C> matrix{packed, nullptr, 0, depth};
    Dot::template gemm<C, Mode::rnn_tanh>(m, x, ldx, matrix, 0, panels, to, ld, kPlainColumns<C>,
                                          nullptr, false);
  }

  // What `cell_row` will read.
  void fetch_row(int64_t at) const {
    if (saved_of(M)) fetch(static_cast<const S*>(f.gates) + at * saved_of(M) * a.H, 4 * a.H);
    if (M == Mode::lstm) fetch(static_cast<const S*>(f.cells) + at * a.H, a.H);
    fetch(static_cast<const S*>(f.s) + (at - 1) * a.H, 2 * a.H);
    if (f.ds) fetch(static_cast<const S*>(f.ds) + at * a.H, a.H);
    if (f.dcontexts) fetch(static_cast<const S*>(f.dcontexts) + at * a.C, a.C);
  }

  // The cell of one row: its gates' gradients, the given part of dcontext, and in dh what bypasses
  // the products. `at` is the row's step i among all N*T.
  void cell_row(int64_t r, int64_t at, int64_t i) {
    const S *s = static_cast<const S*>(f.s), *cells = static_cast<const S*>(f.cells);
    const int64_t n = at / a.T;
    BackwardRow<S, C, C> p{};
    p.y = s + at * a.H;
    if (f.ds) p.dy = static_cast<const S*>(f.ds) + at * a.H;
    if (saved_of(M)) p.gates = static_cast<const S*>(f.gates) + at * saved_of(M) * a.H;
    p.h_prev = i > 0 ? p.y - a.H : static_cast<const S*>(a.h0) + n * a.H;
    if (M == Mode::lstm) {
      p.cells = cells + at * a.H;
      p.c_prev = i > 0 ? p.cells - a.H : static_cast<const S*>(a.c0) + n * a.H;
      p.dc = dcell + r * ldh;
    }
    p.dh = dh + r * ldh;
    p.dg = dg;
    for (int64_t j = 0; j < a.H; j += L) K::backward(p, j, a.H);
    C* to_x = static_cast<C*>(f.dgates_x) + at * GH;
    C* to_h = static_cast<C*>(f.dproducts) + at * products + a.A;
    const size_t row = size_t(a.H) * sizeof(C);
    __builtin_memcpy(to_x, dg, size_t(GH) * sizeof(C));
    if (kGru) {  // r z | nx: only the input's | nh: only the recurrent
      __builtin_memcpy(to_h, dg, 2 * row);
      __builtin_memcpy(to_h + 2 * a.H, dg + 3 * a.H, row);
    } else {
      __builtin_memcpy(to_h, dg, size_t(GH) * sizeof(C));
    }
    read_row<S>(dcontext + r * ldc, f.dcontexts, at * a.C, a.C, ldc);
  }

  // The attention of one row: dq, and what it adds to the gradients of its source.
  void attention_row(int64_t r, int64_t source, int64_t first, int64_t at) {
    const int64_t b = first + source, keys = keys_of(a, b);
    const C* dc = dcontext + r * ldc;
    C* to = static_cast<C*>(f.dproducts) + at * products;
    clear(dq, lda);
    if (keys > 0) {
      read_row<S>(w, f.weights, at * a.Tk, keys, lds);
      dot_values<S, C>(dc, token_at<S>(a.value, b, 0), a.value.row, keys, a.C, ds);
      score_gradient(keys, at);
      gather_values(dc, keys, dvalue + source * a.Tk * ldk);
      const C* query = static_cast<const C*>(f.queries) + at * a.A;
      q.bounds[0] = exponentials<C, C>(query, a.A, q.rows, q.exps);
      score_row_backward<C>(q, k.from(source * a.Tk), keys, vector, ds, dq,
                            dkey + source * a.Tk * lda, dv + b * lda);
      finish_row<C>(dq, vector, C(1));
    }
    for (int64_t j = 0; j < a.A; j += L) store_n<C>(to + j, load<C>(dq + j), a.A - j);
  }

  // ds_j = w_j (dp_j - sum_l w_l dp_l), with dp in ds.
  void score_gradient(int64_t keys, int64_t at) {
    if (f.dweights) {
      const S* given = static_cast<const S*>(f.dweights) + at * a.Tk;
      for (int64_t j = 0; j < keys; j += L)
        store<C>(ds + j, load<C>(ds + j) + load_n<C>(given + j, keys - j));
    }
    C mean = 0;
    for (int64_t j = 0; j < keys; ++j) mean += w[j] * ds[j];
    for (int64_t j = 0; j < keys; ++j) ds[j] = w[j] * (ds[j] - mean);
  }

  // dvalue_j += w_j dc.
  void gather_values(const C* dc, int64_t keys, C* to) {
    for (int64_t j = 0; j < keys; ++j, to += ldk)
      for (int64_t d = 0; d < a.C; d += L)
        store<C>(to + d, load<C>(to + d) + w[j] * load<C>(dc + d));
  }
};
