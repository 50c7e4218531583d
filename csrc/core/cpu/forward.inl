// The forward of one direction: the input projection in chunks of steps that stay in the cache,
// then step by step the recurrent product on top of the projection, and the cell on top of that.

// Hands out aligned pieces of a workspace; with a null base it only counts.
struct Carver {
  char* base;
  int64_t used = 0;
  template <class X>
  X* take(int64_t n) {
    X* p = base ? reinterpret_cast<X*>(base + used) : nullptr;
    used += round_up(n * int64_t(sizeof(X)), 64);
    return p;
  }
};

SK_INLINE int64_t share(int64_t n, int64_t rank, int64_t members) { return n * rank / members; }

// Rows [first, first + count) of what a member owns in a split by rank.
struct Range {
  int64_t begin, end;
};
SK_INLINE Range share_of(int64_t n, const Member& me) {
  return {share(n, me.rank, me.members), share(n, me.rank + 1, me.members)};
}

template <class S, class A, class C, Mode M>
struct ForwardPass {
  using K = Cell<M, C>;
  using Dot = Product<A, C>;
  static constexpr Mode kPlain = Mode::rnn_tanh;  // rows of the matrix in their order
  static constexpr int L = kLanes<C>;
  static constexpr int kUnits = K::group_blocks * L;

  const Forward& f;
  const Shape& s;
  const Member& me;
  const int d;
  const int64_t groups, hr_panels, ldh, ldm, ldc, ldx, ldg, ldo;
  const int64_t chunk_rows;
  const Range mine, my_outputs;  // groups of units, panels of W_hr
  const RowShare share_rows;
  const bool pack;
  A *ih, *hh, *hr, *h_buffer[2], *m, *x, *panels;
  C *bias, *c, *g, *out;

  static int64_t groups_of(const Shape& s) { return ceil_div(s.H, kUnits); }
  static int64_t outputs_of(const Shape& s) { return s.proj ? ceil_div(s.P, kPanel<C>) : 0; }

  // Rows of a chunk: few enough that they stay in L2, but as large as W_ih where that does not (up
  // to 4 MB, beyond which it gains nothing), since each chunk reads all of it.
  static int64_t rows_per_chunk(const Shape& s) {
    const int64_t width = groups_of(s) * K::group_width, row = width * int64_t(sizeof(C));
    const int64_t weights = s.I * width * int64_t(sizeof(A));
    const int64_t bytes = max_<int64_t>(1 << 20, min_<int64_t>(weights, 4 << 20));
    const int64_t rows = max_<int64_t>(64, bytes / row);
    return max_(s.B, min_(rows, s.N));
  }

  ForwardPass(const Forward& f_, const Member& me_)
      : f(f_),
        s(f_.shape),
        me(me_),
        d(me_.direction),
        groups(groups_of(s)),
        hr_panels(outputs_of(s)),
        ldh(padded_row<A>(s.P)),
        ldm(padded_row<A>(s.H)),
        ldc(padded_row<C>(s.H)),
        ldx(padded_row<A>(s.I)),
        ldg(padded_row<C>(groups * K::group_width)),
        ldo(padded_row<C>(hr_panels * kPanel<C>)),
        chunk_rows(rows_per_chunk(s)),
        mine(me_.units ? share_of(groups, me_) : Range{0, groups}),
        my_outputs(me_.units ? share_of(hr_panels, me_) : Range{0, hr_panels}),
        share_rows(me_.units ? RowShare{0, 1} : RowShare{me_.rank, me_.members}),
        pack(!f_.packed[d].hh) {}

  // Also counts, with null bases. W_ih is packed ahead only when several chunks read it, W_hh when
  // several steps do; otherwise a panel is packed just before its only use.
  void carve(Carver shared, Carver own, Workspace* count) {
    const int64_t p = groups * K::group_panels;
    ih = shared.take<A>(pack && chunk_rows < s.N ? p * Dot::panel_size(s.I) : 0);
    hh = shared.take<A>(pack && s.T > 1 ? p * Dot::panel_size(s.P) : 0);
    hr = shared.take<A>(pack && s.T > 1 ? hr_panels * Dot::panel_size(s.H) : 0);
    bias = shared.take<C>(pack ? groups * K::group_width : 0);
    h_buffer[0] = shared.take<A>(s.B * ldh);
    h_buffer[1] = shared.take<A>(s.B * ldh);
    m = shared.take<A>(s.proj ? s.B * ldm : 0);
    c = shared.take<C>(M == Mode::lstm ? s.B * ldc : 0);
    x = own.take<A>(chunk_rows * ldx);
    g = own.take<C>(chunk_rows * ldg);
    out = own.take<C>(s.proj ? s.B * ldo : 0);
    const int64_t longest = max_(max_(s.I, s.P), s.proj ? s.H : 0);
    panels = own.take<A>(pack ? 4 * Dot::panel_size(longest) : 0);
    if (count) *count = {shared.used, own.used};
  }

  static Workspace workspace(const Forward& f, const Member& me) {
    Workspace w;
    ForwardPass(f, me).carve({nullptr}, {nullptr}, &w);
    return w;
  }

  template <Mode R>
  static void pack_range(A* dst, const void* w, int64_t rows, int64_t k, Range r) {
    for (int64_t p = r.begin; p < r.end; ++p)
      Dot::template pack_panel<S, R>(dst + p * Dot::panel_size(k), static_cast<const S*>(w), rows,
                                     k, p);
  }

  static void pack_bias(C* dst, const Weights& w, const Shape& s, Range r) {
    for (int64_t group = r.begin; group < r.end; ++group) {
      C* to = dst + group * K::group_width;
      for (int v = 0; v < K::group_width; v += L) store<C>(to + v, V<C>{});
      for (int v = 0; s.bias && v < 2 * K::group_panels; ++v) {
        const VectorRows rows = gate_rows<M>(group * 2 * K::group_panels + v, s.H, L);
        C* at_ih = to + K::ih.at[v / 2] + (v % 2) * L;
        C* at_hh = to + K::hh.at[v / 2] + (v % 2) * L;
        const S *b_ih = static_cast<const S*>(w.b_ih), *b_hh = static_cast<const S*>(w.b_hh);
        store<C>(at_ih, load<C>(at_ih) + load_n<C>(b_ih + rows.first, rows.count));
        store<C>(at_hh, load<C>(at_hh) + load_n<C>(b_hh + rows.first, rows.count));
      }
    }
  }

  void run() {
    carve({me.shared}, {me.scratch}, nullptr);
    prepare();
    for (int64_t i = 0; i < s.T;) {
      int64_t rows = 0, end = i;
      for (; end < s.T && (rows == 0 || rows + s.rows(time(end)) <= chunk_rows); ++end)
        rows += s.rows(time(end));
      project_input(i, end);
      const C* at = g;
      for (; i < end; ++i) {
        step(i, const_cast<C*>(at));
        at += share_rows.of(s.rows(time(i))) * ldg;
      }
    }
  }

  int64_t time(int64_t i) const { return d == 0 ? i : s.T - 1 - i; }

  // Packs (a part each, whatever the members split otherwise), and loads the initial state.
  void prepare() {
    const Weights& w = f.w[d];
    if (pack) {
      const Range r = share_of(groups, me);
      const Range p{r.begin * K::group_panels, r.end * K::group_panels};
      if (chunk_rows < s.N) pack_range<M>(ih, w.w_ih, s.H, s.I, p);
      if (s.T > 1) {
        pack_range<M>(hh, w.w_hh, s.H, s.P, p);
        pack_range<kPlain>(hr, w.w_hr, s.P, s.H, share_of(hr_panels, me));
      }
      pack_bias(bias, w, s, r);
    } else {
      ih = static_cast<A*>(const_cast<void*>(f.packed[d].ih));
      hh = static_cast<A*>(const_cast<void*>(f.packed[d].hh));
      hr = static_cast<A*>(const_cast<void*>(f.packed[d].hr));
      bias = static_cast<C*>(const_cast<void*>(f.packed[d].bias));
    }
    const S *h0 = static_cast<const S*>(f.h0), *c0 = static_cast<const S*>(f.c0);
    for (int64_t b = me.rank; b < s.B; b += me.members) {
      const int64_t at = d * s.B + b;
      // Both buffers: a row that joins late reads whichever is current then.
      for (A* buffer : h_buffer)
        copy_row<C>(buffer + b * ldh, h0 ? h0 + at * s.P : h0, h0 ? s.P : 0, ldh);
      if (s.proj) copy_row<C>(m + b * ldm, h0, 0, ldm);
      if (M == Mode::lstm) copy_row<C>(c + b * ldc, c0 ? c0 + at * s.H : c0, c0 ? s.H : 0, ldc);
    }
    me.wait();
  }

  const S* input_row(int64_t t, int64_t b) const {
    const S* base = static_cast<const S*>(f.x);
    return s.batch_sizes ? base + (s.offset(t) + b) * f.x_rows.row
                         : base + t * f.x_rows.step + b * f.x_rows.row;
  }

  // How far apart the own rows of x of steps [a, b) lie, where the product can read them as they
  // are: of its own type, and in the order of the rows of g; else 0.
  int64_t rows_in_place(int64_t a, int64_t b) const {
    const int64_t row = share_rows.stride * f.x_rows.row;
    if (sizeof(S) != sizeof(C) || s.I == 0) return 0;
    if (b - a == 1) return row;
    if (d == 1 || (s.batch_sizes && share_rows.stride > 1)) return 0;
    if (s.batch_sizes) return row;
    if (s.B == 1) return f.x_rows.step;
    return f.x_rows.step == s.B * f.x_rows.row && s.B % share_rows.stride == 0 ? row : 0;
  }

  // x W_ih^T + b for the own rows of steps [a, b) and the own units, into g.
  void project_input(int64_t a, int64_t b) {
    int64_t rows = 0;
    for (int64_t i = a; i < b; ++i) rows += share_rows.of(s.rows(time(i)));
    const int64_t p0 = mine.begin * K::group_panels, p1 = mine.end * K::group_panels;
    const bool ready = !pack || chunk_rows < s.N;
    const Matrix<S, A> w{ready ? ih : nullptr, static_cast<const S*>(f.w[d].w_ih), s.H, s.I};
    if constexpr (sizeof(S) == sizeof(C)) {
      if (const int64_t ld = rows_in_place(a, b)) {
        const S* from = input_row(time(a), share_rows.first);
        Dot::template gemm<S, M>(rows, from, ld, w, p0, p1, g, ldg, K::ih, panels, false, bias);
        if (M == Mode::gru) fill_hidden_bias(rows);
        return;
      }
    }
    const int64_t at = mine.begin * K::group_width, to = mine.end * K::group_width;
    A* row = x;
    C* out = g;
    for (int64_t i = a; i < b; ++i) {
      const int64_t t = time(i), n = share_rows.of(s.rows(t));
      for (int64_t r = 0; r < n; ++r, row += ldx, out += ldg) {
        copy_row<C>(row, input_row(t, share_rows[r]), s.I, ldx);
        for (int64_t j = at; j < to; j += L) store<C>(out + j, load<C>(bias + j));
      }
    }
    Dot::template gemm<S, M>(rows, x, ldx, w, p0, p1, g, ldg, K::ih, panels, false);
  }

  // b_hn, onto which no product with x is added.
  void fill_hidden_bias(int64_t rows) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t group = mine.begin; group < mine.end; ++group) {
        const int64_t at = group * K::group_width + K::hh.at[2];
        store<C>(g + r * ldg + at, load<C>(bias + at));
        store<C>(g + r * ldg + at + L, load<C>(bias + at + L));
      }
  }

  void step(int64_t i, C* gate_rows) {
    const int64_t t = time(i), n = share_rows.of(s.rows(t));
    const A* h_prev = h_buffer[i & 1] + share_rows.first * ldh;
    A* h = h_buffer[(i + 1) & 1] + share_rows.first * ldh;
    const bool ready = !pack || s.T > 1;
    Dot::template gemm<S, M>(n, h_prev, share_rows.stride * ldh,
                             {ready ? hh : nullptr, static_cast<const S*>(f.w[d].w_hh), s.H, s.P},
                             mine.begin * K::group_panels, mine.end * K::group_panels, gate_rows,
                             ldg, K::hh, panels, i & 1);
    if (saved_of(M) && f.gates)
      cell_rows<true>(t, n, gate_rows, h_prev, h);
    else
      cell_rows<false>(t, n, gate_rows, h_prev, h);
    if (s.proj) project_output(t, n, h, ready);
    write_final(i, t, h);
    if (me.units) me.wait();
  }

  template <bool Save>
  void cell_rows(int64_t t, int64_t n, const C* gate_rows, const A* h_prev, A* h) {
    for (int64_t r = 0; r < n; ++r) {
      const int64_t b = share_rows[r], row = s.offset(t) + b, at = d * s.N + row;
      ForwardRow<S, A, C> p{};
      p.g = gate_rows + r * ldg;
      p.h_prev = h_prev + r * share_rows.stride * ldh;
      p.h = s.proj ? m + b * ldm : h + r * share_rows.stride * ldh;
      p.y = static_cast<S*>(f.y) + (row * s.D + d) * s.P;
      if (M == Mode::lstm) p.c = c + b * ldc;
      if (Save) {
        p.gates = static_cast<S*>(f.gates) + at * saved_of(M) * s.H;
        p.cells = static_cast<S*>(f.cells) + at * s.H;
      }
      const int64_t end = min_(mine.end * kUnits, s.H);
      for (int64_t j = mine.begin * kUnits; j < end; j += L)
        K::template forward<S, A, Save>(p, j, s.H, s.proj);
    }
  }

  // h = W_hr m for the own rows and the own panels of outputs.
  void project_output(int64_t t, int64_t n, A* h, bool ready) {
    if (me.units) me.wait();  // m of all units
    const int64_t from = my_outputs.begin * kPanel<C>, to = my_outputs.end * kPanel<C>;
    for (int64_t r = 0; r < n; ++r)
      for (int64_t j = from; j < to; j += L) store<C>(out + r * ldo + j, V<C>{});
    Dot::template gemm<S, kPlain>(
        n, m + share_rows.first * ldm, share_rows.stride * ldm,
        {ready ? hr : nullptr, static_cast<const S*>(f.w[d].w_hr), s.P, s.H}, my_outputs.begin,
        my_outputs.end, out, ldo, Cell<kPlain, C>::ih, panels, false);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = s.offset(t) + share_rows[r];
      S* y = static_cast<S*>(f.y) + (row * s.D + d) * s.P;
      for (int64_t j = from; j < min_(to, s.P); j += L) {
        const V<C> v = load<C>(out + r * ldo + j);
        store_n<C>(y + j, v, s.P - j);
        store_operand<C>(h + r * share_rows.stride * ldh + j, through<S, C>(v), s.P - j);
      }
    }
  }

  // The rows that end with this step leave their state: in the forward direction those that the
  // next step lacks, in the other all of them at t = 0.
  void write_final(int64_t i, int64_t t, const A* h) {
    const int64_t next = i + 1 < s.T ? (d == 0 ? s.rows(t + 1) : s.rows(t)) : 0;
    const int64_t lanes_h = s.proj ? kPanel<C> : kUnits;
    const Range own = s.proj ? my_outputs : mine;
    for (int64_t r = share_rows.of(next); r < share_rows.of(s.rows(t)); ++r) {
      const int64_t b = share_rows[r], at = d * s.B + b;
      S* h_n = static_cast<S*>(f.h_n) + at * s.P;
      for (int64_t j = own.begin * lanes_h; j < min_(own.end * lanes_h, s.P); j += L)
        store_n<C>(h_n + j, load_as<C>(h + r * share_rows.stride * ldh + j), s.P - j);
      if (M != Mode::lstm) continue;
      S* c_n = static_cast<S*>(f.c_n) + at * s.H;
      for (int64_t j = mine.begin * kUnits; j < min_(mine.end * kUnits, s.H); j += L)
        store_n<C>(c_n + j, load<C>(c + b * ldc + j), s.H - j);
    }
  }
};
