// The backward of one direction: the steps in the opposite order, in chunks. Within a chunk the
// gradients of the pre-activations dg are found step by step; then the chunk's share of dx, dW and
// db comes from products over all its rows. The order of every sum is fixed by the row numbers, so
// the results do not depend on the number of threads.

// A run of columns of dg and where they belong in the gradients of the weights (-1: nowhere).
struct GradColumns {
  int64_t begin, end, ih_row, hh_row;
};

template <Mode M>
SK_INLINE int grad_columns(int64_t H, GradColumns* out) {
  if constexpr (M == Mode::gru) {  // r z | nx: only the input's | nh: only the recurrent
    out[0] = {0, 2 * H, 0, 0};
    out[1] = {2 * H, 3 * H, 2 * H, -1};
    out[2] = {3 * H, 4 * H, -1, 2 * H};
    return 3;
  }
  out[0] = {0, (M == Mode::lstm ? 4 : 1) * H, 0, 0};
  return 1;
}

template <class S, class A, class C, Mode M>
struct BackwardPass {
  using K = Cell<M, C>;
  using Plain = Cell<Mode::rnn_tanh, C>;
  using Gemm = Product<A, C>;
  static constexpr int L = kLanes<C>, W = kPanel<C>;
  static constexpr bool kGru = M == Mode::gru, kNarrow = sizeof(A) < sizeof(C);
  static constexpr int64_t kDxRows = kNarrow ? 256 : 96;  // rows of dx computed at once

  const Backward& f;
  const Shape& s;
  const Member& me;
  const int d;
  const int64_t GH, grads, Ip, Pp, Hp;  // Ip, Pp, Hp: panels of inputs, outputs, units
  const int64_t ldi, ldp, ldh, ldg, chunk_rows;
  const Range my_outputs, my_units;  // panels
  const RowShare share_rows;
  const bool need_w;
  // W_hh is packed when several steps read it, W_ih when many rows do; else panels just before use.
  const bool pack_hh, pack_ih;
  // Where dW is summed: in the result itself when whole panels fit its rows, else in a workspace.
  const bool direct_i, direct_p;
  const int64_t ldw_i, ldw_p;
  A *hh, *hh_n, *ih, *hr;  // packed, as (k, n) matrices
  C *dh, *dc, *dm;
  A *dg[2], *dhp;                     // dhp: total gradient of h, with proj only
  A *x_panels, *h_panels, *m_panels;  // the chunk's inputs, to multiply dg with
  C *dw_ih, *dw_hh, *dw_hr, *db;      // sums over the chunks
  A *columns, *panels;
  C *dx_rows, *m_rows;

  // Long enough that reading and writing the sums of dW is repaid by the products.
  static int64_t rows_per_chunk(const Shape& s) {
    const int64_t row = K::grads * s.H * int64_t(sizeof(A)), least = kNarrow ? 512 : 192;
    return max_(s.B, min_(max_(least, (1 << 20) / row), s.N));
  }

  BackwardPass(const Backward& f_, const Member& me_)
      : f(f_),
        s(f_.shape),
        me(me_),
        d(me_.direction),
        GH(gates_of(M) * s.H),
        grads(K::grads * s.H),
        Ip(ceil_div(s.I, W)),
        Pp(ceil_div(s.P, W)),
        Hp(ceil_div(s.H, W)),
        ldi(padded_row<C>(s.I)),
        ldp(padded_row<C>(s.P)),
        ldh(padded_row<C>(s.H)),
        // The last gate of a GRU is read on its own, in whole tiles.
        ldg(padded_row<A>(grads + (kNarrow && kGru ? 31 : 0))),
        chunk_rows(rows_per_chunk(s)),
        my_outputs(me_.units ? share_of(Pp, me_) : Range{0, Pp}),
        my_units(me_.units ? share_of(Hp, me_) : Range{0, Hp}),
        share_rows(me_.units ? RowShare{0, 1} : RowShare{me_.rank, me_.members}),
        need_w(f_.need_dw),
        pack_hh(s.T > 1 || kNarrow),
        pack_ih(s.N > kDxRows || kNarrow),
        direct_i(sizeof(S) == sizeof(C) && s.I % W == 0 && s.I > 0),
        direct_p(sizeof(S) == sizeof(C) && s.P % W == 0),
        ldw_i(direct_i ? s.I : ldi),
        ldw_p(direct_p ? s.P : ldp) {}

  void carve(Carver shared, Carver own, Workspace* count) {
    hh = shared.take<A>(pack_hh ? Pp * Gemm::panel_size(kGru ? 2 * s.H : GH) : 0);
    hh_n = shared.take<A>(pack_hh && kGru ? Pp * Gemm::panel_size(s.H) : 0);
    ih = shared.take<A>(f.dx && pack_ih ? Ip * Gemm::panel_size(GH) : 0);
    hr = shared.take<A>(s.proj ? Hp * Gemm::panel_size(s.P) : 0);
    dh = shared.take<C>(s.B * ldp);
    dc = shared.take<C>(M == Mode::lstm ? s.B * ldh : 0);
    dm = shared.take<C>(s.proj ? s.B * ldh : 0);
    for (A*& buffer : dg) buffer = shared.take<A>(chunk_rows * ldg);
    dhp = shared.take<A>(s.proj ? chunk_rows * ldp : 0);
    const int64_t panel = need_w ? Gemm::panel_size(chunk_rows) : 0;
    x_panels = shared.take<A>(Ip * panel);
    h_panels = shared.take<A>(Pp * panel);
    m_panels = shared.take<A>(s.proj ? Hp * panel : 0);
    dw_ih = shared.take<C>(need_w && !direct_i ? GH * ldi : 0);
    dw_hh = shared.take<C>(need_w && !direct_p ? GH * ldp : 0);
    if (direct_i) dw_ih = static_cast<C*>(f.dw[d][0]);
    if (direct_p) dw_hh = static_cast<C*>(f.dw[d][1]);
    dw_hr = shared.take<C>(need_w && s.proj ? s.P * ldh : 0);
    db = shared.take<C>(need_w ? ldg : 0);
    columns = own.take<A>(need_w ? Gemm::columns_size(chunk_rows) : 0);
    panels = own.take<A>(kNarrow ? 0 : 4 * W * GH);
    dx_rows = own.take<C>(f.dx ? kDxRows * ldi : 0);
    m_rows = own.take<C>(need_w && s.proj ? Gemm::kTogether * ldh : 0);
    if (count) *count = {shared.used, own.used};
  }

  static Workspace workspace(const Backward& f, const Member& me) {
    Workspace w;
    BackwardPass(f, me).carve({nullptr}, {nullptr}, &w);
    return w;
  }

  void run() {
    carve({me.shared}, {me.scratch}, nullptr);
    prepare();
    const A* dg_prev = nullptr;
    int64_t n_prev = 0;
    for (int64_t i = 0, chunk = 0; i < s.T; ++chunk) {
      int64_t end = i, rows = 0;
      for (; end < s.T && (rows == 0 || rows + s.rows(time(end)) <= chunk_rows); ++end)
        rows += s.rows(time(end));
      const int64_t t0 = min_(time(i), time(end - 1)), t1 = max_(time(i), time(end - 1)) + 1;
      const int64_t first = s.offset(t0);
      A* gradients = dg[chunk & 1];
      for (; i < end; ++i) {
        const int64_t t = time(i);
        A* now = gradients + (s.offset(t) - first) * ldg;
        recur(dg_prev, n_prev);
        step(t, now, s.proj ? dhp + (s.offset(t) - first) * ldp : nullptr);
        if (me.units) me.wait();
        dg_prev = now, n_prev = s.rows(t);
      }
      me.wait();
      finish_chunk(t0, t1, first, rows, gradients, chunk == 0);
    }
    recur(dg_prev, n_prev);
    me.wait();
    write_results();
  }

  int64_t time(int64_t i) const { return d == 0 ? s.T - 1 - i : i; }

  static void pack_natural(A* dst, const void* w, int64_t k0, int64_t k, int64_t n, Range r) {
    for (int64_t p = r.begin; p < r.end; ++p)
      Gemm::pack_columns(dst + p * Gemm::panel_size(k), static_cast<const S*>(w) + k0 * n, n, k, n,
                         p);
  }

  void prepare() {
    const Weights& w = f.w[d];
    if (pack_hh) pack_natural(hh, w.w_hh, 0, kGru ? 2 * s.H : GH, s.P, share_of(Pp, me));
    if (pack_hh && kGru) pack_natural(hh_n, w.w_hh, 2 * s.H, s.H, s.P, share_of(Pp, me));
    if (f.dx && pack_ih) pack_natural(ih, w.w_ih, 0, GH, s.I, share_of(Ip, me));
    if (s.proj) pack_natural(hr, w.w_hr, 0, s.P, s.H, share_of(Hp, me));
    const S *dh_n = static_cast<const S*>(f.dh_n), *dc_n = static_cast<const S*>(f.dc_n);
    for (int64_t b = me.rank; b < s.B; b += me.members) {
      const int64_t at = d * s.B + b;
      copy_row<C>(dh + b * ldp, dh_n + at * s.P, dh_n ? s.P : 0, ldp);
      if (M == Mode::lstm) copy_row<C>(dc + b * ldh, dc_n + at * s.H, dc_n ? s.H : 0, ldh);
    }
    if (need_w) zero(db, ldg);
    if (kNarrow) {  // whole tiles read what stands beside the gradients
      const Range mine = share_of(chunk_rows, me);
      for (int64_t r = mine.begin; r < mine.end; ++r) {
        for (A* buffer : dg) clear(buffer + r * ldg + grads, ldg - grads);
        if (s.proj) clear(dhp + r * ldp + s.P, ldp - s.P);
      }
    }
    me.wait();
  }

  void zero(C* p, int64_t n) {
    const Range r = share_of(n, me);
    clear(p + r.begin, r.end - r.begin);
  }
  template <class T>
  static void clear(T* p, int64_t n) {
    __builtin_memset(p, 0, size_t(n) * sizeof(T));
  }

  // dh += dg W_hh for the rows of the step before (in this order), whose dg is complete.
  void recur(const A* dg_prev, int64_t n_prev) {
    if (!dg_prev) return;
    const int64_t n = share_rows.of(n_prev), lda = share_rows.stride * ldg;
    const A* a = dg_prev + share_rows.first * ldg;
    const S* w = static_cast<const S*>(f.w[d].w_hh);
    const int64_t k = kGru ? 2 * s.H : GH;
    add_product(n, a, lda, {pack_hh ? hh : nullptr, w, 0, k, s.P}, my_outputs, dh, ldp);
    if (kGru)
      add_product(n, a + 3 * s.H, lda, {pack_hh ? hh_n : nullptr, w + k * s.P, 0, s.H, s.P},
                  my_outputs, dh, ldp);
  }

  void add_product(int64_t n, const A* a, int64_t lda, const Matrix<S, A>& w, Range range, C* out,
                   int64_t ld) {
    Gemm::template gemm<S, Mode::rnn_tanh>(n, a, lda, w, range.begin, range.end,
                                           out + share_rows.first * ld, share_rows.stride * ld,
                                           Plain::ih, panels, false);
  }

  void step(int64_t t, A* now, A* total) {
    const int64_t n = share_rows.of(s.rows(t));
    if (s.proj) through_projection(t, n, total);
    const S *y = static_cast<const S*>(f.y), *cells = static_cast<const S*>(f.cells);
    const int64_t before = d == 0 ? t - 1 : t + 1;
    const int64_t carried = d == 0 ? (t > 0 ? s.B : 0) : (before < s.T ? s.rows(before) : 0);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t b = share_rows[r], row = s.offset(t) + b, at = d * s.B + b;
      BackwardRow<S, A, C> p{};
      p.y = y + (row * s.D + d) * s.P;
      if (f.dy && !s.proj) p.dy = static_cast<const S*>(f.dy) + (row * s.D + d) * s.P;
      if (saved_of(M))
        p.gates = static_cast<const S*>(f.gates) + (d * s.N + row) * saved_of(M) * s.H;
      p.h_prev = b < carried ? y + ((s.offset(before) + b) * s.D + d) * s.P
                             : static_cast<const S*>(f.h0) + at * s.P;
      if (M == Mode::lstm) {
        p.cells = cells + (d * s.N + row) * s.H;
        p.c_prev = b < carried ? cells + (d * s.N + s.offset(before) + b) * s.H
                               : static_cast<const S*>(f.c0) + at * s.H;
        p.dc = dc + b * ldh;
      }
      p.dh = s.proj ? dm + b * ldh : dh + b * ldp;
      p.dg = now + b * ldg;
      for (int64_t j = my_units.begin * W; j < min_(my_units.end * W, s.H); j += L)
        K::backward(p, j, s.H);
    }
  }

  // total = dh + dy, dm = total W_hr, dh = 0.
  void through_projection(int64_t t, int64_t n, A* total) {
    for (int64_t r = 0; r < n; ++r) {
      const int64_t b = share_rows[r], row = s.offset(t) + b;
      for (int64_t j = my_outputs.begin * W; j < min_(my_outputs.end * W, s.P); j += L) {
        V<C> v = load<C>(dh + b * ldp + j);
        if (f.dy) v += load_n<C>(static_cast<const S*>(f.dy) + (row * s.D + d) * s.P + j, s.P - j);
        store_operand<C>(total + b * ldp + j, v, s.P - j);
        store<C>(dh + b * ldp + j, V<C>{});
      }
      for (int64_t j = my_units.begin * W; j < my_units.end * W; j += L)
        store<C>(dm + b * ldh + j, V<C>{});
    }
    if (me.units) me.wait();
    add_product(n, total + share_rows.first * ldp, share_rows.stride * ldp, {hr, nullptr, 0, s.P},
                my_units, dm, ldh);
  }

  // ---- the products over all rows of a chunk, steps [t0, t1)

  // `fresh`: the first chunk, whose products begin the sums of dW.
  void finish_chunk(int64_t t0, int64_t t1, int64_t first, int64_t rows, const A* gradients,
                    bool fresh) {
    if (f.dx) input_gradient(t0, t1, first, gradients);
    if (!need_w) return;
    fill_panels(t0, t1, first, rows);
    me.wait();
    GradColumns run[3];
    for (int i = 0, runs = grad_columns<M>(s.H, run); i < runs; ++i)
      weight_gradient(gradients, ldg, run[i].begin, run[i].end, rows,
                      run[i].ih_row < 0 ? nullptr : dw_ih + run[i].ih_row * ldw_i,
                      run[i].hh_row < 0 ? nullptr : dw_hh + run[i].hh_row * ldw_p,
                      db + run[i].begin, fresh);
    if (s.proj) weight_gradient(dhp, ldp, 0, s.P, rows, nullptr, nullptr, nullptr, fresh);
    if (s.proj) me.wait();  // dhp has one buffer only
  }

  // dx = dg W_ih, a tile of rows at a time.
  void input_gradient(int64_t t0, int64_t t1, int64_t first, const A* gradients) {
    S* dx = static_cast<S*>(d == 0 ? f.dx : f.dx_reverse);
    const int64_t total = s.offset(t1 - 1) + s.rows(t1 - 1) - s.offset(t0);
    const Range mine = share_of(total, me);
    const Matrix<S, A> w{pack_ih ? ih : nullptr, static_cast<const S*>(f.w[d].w_ih), 0, GH, s.I};
    for (int64_t r = mine.begin; r < mine.end; r += kDxRows) {
      const int64_t n = min_(kDxRows, mine.end - r);
      for (int64_t j = 0; j < n * ldi; j += L) store<C>(dx_rows + j, V<C>{});
      Gemm::template gemm<S, Mode::rnn_tanh>(n, gradients + r * ldg, ldg, w, 0, Ip, dx_rows, ldi,
                                             Plain::ih, panels, false);
      for (int64_t q = 0; q < n; ++q)
        for (int64_t j = 0; j < s.I; j += L)
          store_n<C>(dx + (first + r + q) * s.I + j, load<C>(dx_rows + q * ldi + j), s.I - j);
    }
  }

  // The chunk's x, h of the step before, and m (with a projection) as panels of (rows, W). Members
  // take turns at the rows that stand together.
  void fill_panels(int64_t t0, int64_t t1, int64_t first, int64_t rows) {
    constexpr int some = Gemm::kTogether;
    const S *y = static_cast<const S*>(f.y), *x = static_cast<const S*>(f.x);
    const S *x_row[some], *h_row[some];
    int64_t k = 0;
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t before = d == 0 ? t - 1 : t + 1;
      const int64_t carried = d == 0 ? (t > 0 ? s.B : 0) : (before < s.T ? s.rows(before) : 0);
      for (int64_t b = 0; b < s.rows(t); ++b, ++k) {
        const int at = int(k % some);
        if (at == 0)
          for (int i = 1; i < some; ++i) x_row[i] = h_row[i] = nullptr;
        x_row[at] = s.batch_sizes ? x + (first + k) * f.x_rows.row
                                  : x + t * f.x_rows.step + b * f.x_rows.row;
        h_row[at] = b < carried ? y + ((s.offset(before) + b) * s.D + d) * s.P
                                : static_cast<const S*>(f.h0) + (d * s.B + b) * s.P;
        if ((at + 1 < some && k + 1 < rows) || k / some % me.members != me.rank) continue;
        Gemm::spread(x_panels, k - at, rows, x_row, s.I);
        Gemm::spread(h_panels, k - at, rows, h_row, s.P);
        if (s.proj) spread_m(first + k - at, k - at, at + 1, rows);
      }
    }
    if (me.rank != 0) return;
    Gemm::spread_end(x_panels, rows, s.I);
    Gemm::spread_end(h_panels, rows, s.P);
    if (s.proj) Gemm::spread_end(m_panels, rows, s.H);
  }

  // m = o tanh(c) of `some` rows from `row`, which is row k of the chunk.
  void spread_m(int64_t row, int64_t k, int some, int64_t rows) {
    const C* m_row[Gemm::kTogether] = {};
    for (int i = 0; i < some; ++i) {
      const int64_t at = d * s.N + row + i;
      const S* o = static_cast<const S*>(f.gates) + (at * 4 + 3) * s.H;
      const S* c = static_cast<const S*>(f.cells) + at * s.H;
      for (int64_t j = 0; j < s.H; j += L)
        store<C>(m_rows + i * ldh + j,
                 load_n<C>(o + j, s.H - j) * tanh<C>(load_n<C>(c + j, s.H - j)));
      m_row[i] = m_rows + i * ldh;
    }
    Gemm::spread(m_panels, k, rows, m_row, s.H);
  }

  // Columns [begin, end) of `a` (rows, lda), transposed, times x and h of the chunk, added to the
  // sums, and the column sums, for the biases; without those, times m into dw_hr.
  void weight_gradient(const A* a, int64_t lda, int64_t begin, int64_t end, int64_t rows, C* to_ih,
                       C* to_hh, C* sums, bool fresh) {
    constexpr int64_t width = Gemm::kGradientRows;
    const Range tiles = share_of(ceil_div(end - begin, width), me);
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
      const int64_t j = tile * width;
      const int n = int(min_(width, end - begin - j));
      Gemm::take_columns(n, rows, a + begin + j, lda, columns, sums ? sums + j : nullptr);
      if (to_ih) Gemm::gradient(n, rows, columns, x_panels, Ip, to_ih + j * ldw_i, ldw_i, fresh);
      if (to_hh) Gemm::gradient(n, rows, columns, h_panels, Pp, to_hh + j * ldw_p, ldw_p, fresh);
      if (!sums) Gemm::gradient(n, rows, columns, m_panels, Hp, dw_hr + j * ldh, ldh, fresh);
    }
  }

  // ---- results

  void write_results() {
    for (int64_t b = me.rank; b < s.B; b += me.members) {
      const int64_t at = d * s.B + b;
      write_row(static_cast<S*>(f.dh0) + at * s.P, dh + b * ldp, s.P);
      if (M == Mode::lstm) write_row(static_cast<S*>(f.dc0) + at * s.H, dc + b * ldh, s.H);
    }
    if (!need_w) return;
    if (!direct_i) write_matrix(f.dw[d][0], dw_ih, GH, s.I, ldi);
    if (!direct_p) write_matrix(f.dw[d][1], dw_hh, GH, s.P, ldp);
    if (s.proj) write_matrix(f.dw[d][4], dw_hr, s.P, s.H, ldh);
    if (!s.bias || me.rank != 0) return;
    GradColumns run[3];
    for (int i = 0, runs = grad_columns<M>(s.H, run); i < runs; ++i) {
      const int64_t n = run[i].end - run[i].begin;
      const C* from = db + run[i].begin;
      if (run[i].ih_row >= 0) write_row(static_cast<S*>(f.dw[d][2]) + run[i].ih_row, from, n);
      if (run[i].hh_row >= 0) write_row(static_cast<S*>(f.dw[d][3]) + run[i].hh_row, from, n);
    }
  }

  static void write_row(S* to, const C* from, int64_t n) {
    for (int64_t j = 0; j < n; j += L) store_n<C>(to + j, load_n<C>(from + j, n - j), n - j);
  }

  void write_matrix(void* to, const C* from, int64_t rows, int64_t columns, int64_t ld) {
    const Range r = share_of(rows, me);
    for (int64_t i = r.begin; i < r.end; ++i)
      write_row(static_cast<S*>(to) + i * columns, from + i * ld, columns);
  }
};

template <class S, class A, class C, Mode M>
struct Entry : ForwardEntry<S, A, C, M> {
  using Forwards = ForwardEntry<S, A, C, M>;
  using Pass = BackwardPass<S, A, C, M>;

  static Workspace workspace(const Backward& b, const Member& me) { return Pass::workspace(b, me); }
  static void run(const Backward& b, const Member& me) { Pass(b, me).run(); }
  static void add(void* sum, const void* other, int64_t n) {
    S* a = static_cast<S*>(sum);
    const S* b = static_cast<const S*>(other);
    for (int64_t i = 0; i < n; i += kLanes<C>)
      store_n<C>(a + i, load_n<C>(a + i, n - i) + load_n<C>(b + i, n - i), n - i);
  }

  static constexpr Kernels kernels{Forwards::workspace,
                                   Forwards::run,
                                   Forwards::packed_sizes,
                                   Forwards::pack,
                                   workspace,
                                   run,
                                   add};
};
