// The forward of the attending decoder. Rows never wait for each other: a block of whole sources
// goes through all steps, its states, queries and gates in a thread's scratch, the weights packed
// once for all blocks.

// Rows of a block: enough that a pass over the weights is repaid, few enough to stay in L2.
constexpr int64_t kDecoderRows = 64;

// A row that a product writes: whole panels, and not a multiple of 512 bytes, which would put all
// rows in the same few cache sets.
template <class C>
SK_INLINE int64_t panel_row(int64_t n) {
  const int64_t padded = round_up(n, kPanel<C>);
  return padded * int64_t(sizeof(C)) % 512 == 0 ? padded + kPanel<C> : padded;
}

SK_INLINE int64_t sources_of_block(const Decoder& a) {
  return max_<int64_t>(1, min_(a.B, kDecoderRows / max_<int64_t>(a.K, 1)));
}

SK_INLINE int64_t keys_of(const Decoder& a, int64_t b) {
  return a.k_lens ? max_<int64_t>(0, min_<int64_t>(a.k_lens[b], a.Tk)) : a.Tk;
}

// Whether the weights are read once only, by one block at one step: then a panel is packed just
// before its use, or multiplied as it lies where there are very few rows.
SK_INLINE bool read_once(const Decoder& a) { return a.T == 1 && a.B <= sources_of_block(a); }

template <class C>
constexpr Columns kPlainColumns{1, kPanel<C>, {0, 0, 0, 0}};

// Rows of one step lie T rows apart in memory, where no prefetcher of the processor follows: they
// are asked for this many rows ahead.
constexpr int64_t kRowsAhead = 2;
template <class X>
SK_INLINE void fetch(const X* p, int64_t n) {
  const char* bytes = reinterpret_cast<const char*>(p);
  for (int64_t i = 0; i < n * int64_t(sizeof(X)); i += 64) __builtin_prefetch(bytes + i);
}

// [first, last) of `part` out of `parts`.
struct Part {
  int64_t begin, end;
};
SK_INLINE Part part_of(int64_t n, int64_t part, int64_t parts) {
  return {n * part / parts, n * (part + 1) / parts};
}

// The keys of a block of sources, ready for scores: source s has its Tk tokens from s * Tk on.
template <class S, class C>
static void prepare_keys(const Decoder& a, int64_t first, int64_t sources,
                         const AdditiveTokens<C>& to) {
  for (int64_t s = 0; s < sources; ++s)
    prepare_tokens<S, C>(token_at<S>(a.key, first + s, 0), a.key.row, keys_of(a, first + s), a.A,
                         to.from(s * a.Tk));
}

// The scores of K queries over the keys of their source, in tiles no larger than what is left. A
// pair's score has the same bits in every tile.
template <class C>
static void scores_of_source(const AdditiveTokens<C>& q, int64_t queries,
                             const AdditiveTokens<C>& k, int64_t keys, const AdditiveVector<C>& v,
                             C* to, int64_t ld) {
  if (queries >= kPairQueries<C>) return scores<C>(q, queries, k, keys, v, to, ld);
  constexpr int L = kLanes<C>, half = L / 2, quarter = L < 4 ? 1 : L / 4;
  for (int64_t i = 0; i < queries; ++i)
    for (int64_t j = 0; j < keys; j += L) {
      const int64_t n = min_<int64_t>(L, keys - j);
      C* at = to + i * ld + j;
      if (n > half)
        score_block<C, 1, L>(q.from(i), 1, k.from(j), n, v, at, ld);
      else if (n > quarter)
        score_block<C, 1, half>(q.from(i), 1, k.from(j), n, v, at, ld);
      else
        score_block<C, 1, quarter>(q.from(i), 1, k.from(j), n, v, at, ld);
    }
}

// to (C elements, padded) = sum_j w_j value_j, a few vectors at a time.
template <class S, class C>
static void context_row(const C* w, int64_t keys, const S* value, int64_t row, int64_t n, C* to) {
  constexpr int L = kLanes<C>, U = 4;
  int64_t d = 0;
  for (; d + U * L <= n; d += U * L) {
    V<C> acc[U] = {};
    for (int64_t j = 0; j < keys; ++j)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) acc[u] += w[j] * load_as<C>(value + j * row + d + u * L);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) store<C>(to + d + u * L, acc[u]);
  }
  for (; d < n; d += L) {
    V<C> acc = {};
    for (int64_t j = 0; j < keys; ++j) acc += w[j] * load_n<C>(value + j * row + d, n - d);
    store<C>(to + d, acc);
  }
}

template <class S, class C, Mode M>
struct DecoderForwardPass {
  using K = Cell<M, C>;
  using Dot = Product<C, C>;
  static constexpr int L = kLanes<C>, W = kPanel<C>;
  static constexpr Mode kPlain = Mode::rnn_tanh;  // rows of the matrix in their order
  static constexpr int64_t kUnits = K::group_blocks * L;

  const DecoderForward& f;
  const Decoder& a;
  const bool ready;  // the weights are packed
  const int64_t groups, gate_panels, query_panels, sources, rows;
  const int64_t ldh, ldq, ldg, ldc, lds;
  // Shared by all threads.
  C *w_q, *w_hh, *w_c, *b_q, *bias;
  // Of one thread.
  AdditiveVector<C> vector;
  AdditiveTokens<C> q, k;
  C *h, *cell, *g, *context, *weights, *panels;

  DecoderForwardPass(const DecoderForward& f_, Space shared, Space own, Workspace* bytes)
      : f(f_),
        a(f_.in),
        ready(!read_once(a)),
        groups(ceil_div(a.H, kUnits)),
        gate_panels(groups * K::group_panels),
        query_panels(ceil_div(a.A, W)),
        sources(sources_of_block(a)),
        rows(sources * a.K),
        ldh(panel_row<C>(a.H)),
        ldq(panel_row<C>(a.A)),
        ldg(panel_row<C>(groups * K::group_width)),
        ldc(panel_row<C>(a.C)),
        lds(round_up(a.Tk, L)),
        w_q(shared.take<C>(ready ? query_panels * Dot::panel_size(a.H) : 0)),
        w_hh(shared.take<C>(ready ? gate_panels * Dot::panel_size(a.H) : 0)),
        w_c(shared.take<C>(ready ? gate_panels * Dot::panel_size(a.C) : 0)),
        b_q(shared.take<C>(ldq)),
        bias(shared.take<C>(ldg)),
        vector{own.take<C>(round_up(a.A, L)), 0, false, 0},
        q(own.tokens<C>(rows, ldq)),
        k(own.tokens<C>(sources * a.Tk, odd_row<C>(a.A))),
        h(own.take<C>(rows * ldh)),
        cell(own.take<C>(M == Mode::lstm ? rows * ldh : 0)),
        g(own.take<C>(rows * ldg)),
        context(own.take<C>(rows * ldc)),
        weights(own.take<C>(rows * lds)),
        panels(own.take<C>(ready ? 0 : 4 * Dot::panel_size(max_(a.H, a.C)))) {
    if (bytes) *bytes = {shared.used, own.used};
  }

  static Workspace workspace(const DecoderForward& f) {
    Workspace bytes;
    DecoderForwardPass(f, {nullptr}, {nullptr}, &bytes);
    return bytes;
  }
  static void prepare(const DecoderForward& f, int64_t part, int64_t parts, char* shared) {
    DecoderForwardPass(f, {shared}, {nullptr}, nullptr).pack(part, parts);
  }
  static void run(const DecoderForward& f, int64_t begin, int64_t end, char* shared,
                  char* scratch) {
    DecoderForwardPass pass(f, {shared}, {scratch}, nullptr);
    pass.vector =
        prepare_vector<S, C>(static_cast<const S*>(f.in.v), f.in.A, const_cast<C*>(pass.vector.v));
    for (int64_t b = begin; b < end; b += pass.sources) pass.block(b, min_(pass.sources, end - b));
  }
  static constexpr DecoderPass<DecoderForward> pass{workspace, prepare, run};

  // ---- shared

  template <Mode R>
  static void pack_matrix(C* to, const void* w, int64_t n, int64_t depth, Part p) {
    for (int64_t i = p.begin; i < p.end; ++i)
      Dot::template pack_panel<S, R>(to + i * Dot::panel_size(depth), static_cast<const S*>(w), n,
                                     depth, i);
  }

  void pack(int64_t part, int64_t parts) {
    if (ready) {
      pack_matrix<kPlain>(w_q, a.w_q, a.A, a.H, part_of(query_panels, part, parts));
      pack_matrix<M>(w_hh, a.w_hh, a.H, a.H, part_of(gate_panels, part, parts));
      pack_matrix<M>(w_c, a.w_c, a.H, a.C, part_of(gate_panels, part, parts));
    }
    if (part != 0) return;
    const S* b = static_cast<const S*>(a.b_q);
    for (int64_t j = 0; j < ldq; j += L)
      store<C>(b_q + j, b && j < a.A ? load_n<C>(b + j, a.A - j) : V<C>{});
    for (int64_t j = 0; j < ldg; j += L) store<C>(bias + j, V<C>{});
    if (a.b_hh) each_vector(K::hh, bias, static_cast<const S*>(a.b_hh));
  }

  // Adds a row of gates in PyTorch's order to a row in that of the cells.
  template <class X>
  SK_INLINE void each_vector(const Columns& columns, C* row, const X* from, int64_t H,
                             int64_t groups) {
    for (int64_t group = 0; group < groups; ++group)
#pragma GCC unroll 6
      for (int i = 0; i < 2 * K::group_panels; ++i) {
        const VectorRows r = gate_rows<M>(group * 2 * K::group_panels + i, H, L);
        C* at = row + group * K::group_width + columns.at[i / 2] + (i % 2) * L;
        if (r.count > 0) store<C>(at, load<C>(at) + load_n<C>(from + r.first, r.count));
      }
  }
  template <class X>
  void each_vector(const Columns& columns, C* row, const X* from) const {
    each_vector(columns, row, from, a.H, groups);
  }

  // ---- one block: `n` sources from `first` on, all steps

  void block(int64_t first, int64_t n) {
    const int64_t m = n * a.K, row0 = first * a.K;
    prepare_keys<S, C>(a, first, n, k);
    const S *h0 = static_cast<const S*>(a.h0), *c0 = static_cast<const S*>(a.c0);
    for (int64_t r = 0; r < m; ++r) {
      copy_row<C>(h + r * ldh, h0 + (row0 + r) * a.H, a.H, ldh);
      if (M == Mode::lstm) copy_row<C>(cell + r * ldh, c0 + (row0 + r) * a.H, a.H, ldh);
    }
    for (int64_t i = 0; i < a.T; ++i) {
      ask(m, row0, i);
      for (int64_t s = 0; s < n; ++s) attend(s, first + s, i);
      gates(m, row0, i);
      if (f.queries)
        cells<true>(m, row0, i);
      else
        cells<false>(m, row0, i);
    }
    if (M != Mode::lstm) return;
    S* c_n = static_cast<S*>(f.c_n) + row0 * a.H;
    for (int64_t r = 0; r < m; ++r)
      for (int64_t j = 0; j < a.H; j += L)
        store_n<C>(c_n + r * a.H + j, load<C>(cell + r * ldh + j), a.H - j);
  }

  // q = W_q h + b_q, with its exponentials.
  void ask(int64_t m, int64_t row0, int64_t i) {
    for (int64_t r = 0; r < m; ++r)
      for (int64_t j = 0; j < ldq; j += L) store<C>(q.rows + r * ldq + j, load<C>(b_q + j));
    const Matrix<S, C> w{ready ? w_q : nullptr, static_cast<const S*>(a.w_q), a.A, a.H};
    Dot::template gemm<S, kPlain>(m, h, ldh, w, 0, query_panels, q.rows, ldq, kPlainColumns<C>,
                                  panels, false);
    prepare_tokens<C, C>(q.rows, ldq, m, a.A, q);
    if (!f.queries) return;
    C* to = static_cast<C*>(f.queries) + (row0 * a.T + i) * a.A;
    for (int64_t r = 0; r < m; ++r, to += a.T * a.A)
      for (int64_t j = 0; j < a.A; j += L)
        store_n<C>(to + j, load<C>(q.rows + r * ldq + j), a.A - j);
  }

  // Weights and contexts of the rows of source b, the s-th of the block.
  void attend(int64_t s, int64_t b, int64_t i) {
    const int64_t keys = keys_of(a, b), r0 = s * a.K;
    scores_of_source<C>(q.from(r0), a.K, k.from(s * a.Tk), keys, vector, weights + r0 * lds, lds);
    for (int64_t r = r0; r < r0 + a.K; ++r) {
      C* w = weights + r * lds;
      C total;
      softmax_row<C>(w, keys, total);
      const C one = total == C(0) ? C(0) : C(1) / total;
      const int64_t at = (b * a.K + r - r0) * a.T + i;
      S* out = static_cast<S*>(f.weights) + at * a.Tk;
      for (int64_t j = 0; j < keys; j += L) {
        const V<C> x = load<C>(w + j) * one;
        store<C>(w + j, x);
        store_n<C>(out + j, x, keys - j);
      }
      for (int64_t j = keys; j < a.Tk; ++j) out[j] = S{};
      C* c = context + r * ldc;
      context_row<S, C>(w, keys, token_at<S>(a.value, b, 0), a.value.row, a.C, c);
      S* to = static_cast<S*>(f.contexts) + at * a.C;
      for (int64_t j = 0; j < a.C; j += L) {
        const V<C> x = load<C>(c + j);
        store_n<C>(to + j, x, a.C - j);
        store<C>(c + j, through<S, C>(x));
      }
    }
  }

  // g = gates_x + b_hh + W_hh h + W_c c, in the order of the cells.
  void gates(int64_t m, int64_t row0, int64_t i) {
    const C* x = static_cast<const C*>(a.gates_x) + (row0 * a.T + i) * a.gates();
    for (int64_t r = 0; r < m; ++r, x += a.T * a.gates()) {
      C* row = g + r * ldg;
      if (r + kRowsAhead < m) fetch(x + kRowsAhead * a.T * a.gates(), a.gates());
      for (int64_t j = 0; j < groups * K::group_width; j += L) store<C>(row + j, load<C>(bias + j));
      each_vector(K::ih, row, x);
    }
    const Matrix<S, C> hh{ready ? w_hh : nullptr, static_cast<const S*>(a.w_hh), a.H, a.H};
    Dot::template gemm<S, M>(m, h, ldh, hh, 0, gate_panels, g, ldg, K::hh, panels, i & 1);
    const Matrix<S, C> ih{ready ? w_c : nullptr, static_cast<const S*>(a.w_c), a.H, a.C};
    Dot::template gemm<S, M>(m, context, ldc, ih, 0, gate_panels, g, ldg, K::ih, panels, i & 1);
  }

  template <bool Save>
  void cells(int64_t m, int64_t row0, int64_t i) {
    for (int64_t r = 0; r < m; ++r) {
      const int64_t at = (row0 + r) * a.T + i;
      ForwardRow<S, C, C> p{};
      p.g = g + r * ldg;
      p.h_prev = p.h = h + r * ldh;  // unit by unit, read before it is written
      p.y = static_cast<S*>(f.s) + at * a.H;
      if (M == Mode::lstm) p.c = cell + r * ldh;
      if (Save) {
        p.gates = static_cast<S*>(f.gates) + at * saved_of(M) * a.H;
        p.cells = static_cast<S*>(f.cells) + at * a.H;
      }
      for (int64_t j = 0; j < a.H; j += L) K::template forward<S, C, Save>(p, j, a.H, false);
    }
  }
};
