// C += A B, the one product of the forward and the backward.
//
// B is read in panels of two vectors: (panels, K, 2 * lanes). A tile keeps up to SK_ACC accumulator
// vectors in registers and walks k in order, one fused multiply-add per element, so an element of C
// has the same bits whatever tile, thread or batch computes it.

template <class C>
constexpr int kPanel = 2 * kLanes<C>;

// Where the panels of a group of hidden units go in a row of C: panel p at
// (p / panels) * width + at[p % panels], in elements.
struct Columns {
  int panels, width;
  int at[4];
};
SK_INLINE int64_t column_of(const Columns& m, int64_t p) {
  return (p / m.panels) * m.width + m.at[p % m.panels];
}

// Which rows of a weight matrix make one vector of a panel: `count` rows from `first`, the rest
// zero.
struct VectorRows {
  int64_t first, count;
};
// Gates of one block of units stand together. LSTM: i f g o of each block; GRU: r z r z n n of two
// blocks, so that its panels of two vectors do not straddle; otherwise rows in their order.
template <Mode M>
SK_INLINE VectorRows gate_rows(int64_t v, int64_t H, int lanes) {
  int64_t block = v, gate = 0;
  if (M == Mode::lstm) block = v / 4, gate = v % 4;
  if (M == Mode::gru) {
    const int64_t w = v % 6;
    block = 2 * (v / 6) + (w < 4 ? w / 2 : w - 4);
    gate = w < 4 ? w % 2 : 2;
  }
  const int64_t left = H - block * lanes;
  return {gate * H + block * lanes, max_<int64_t>(0, min_<int64_t>(left, lanes))};
}

// ---- packing

// In place transposition of lanes x lanes elements by log2(lanes) exchanges.
template <class C, int D>
SK_INLINE void exchange(V<C>* r) {
  constexpr int L = kLanes<C>;
  typename Simd<C>::I lo, hi;
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) {
    lo[l] = (l & D) == 0 ? l : L + l - D;
    hi[l] = (l & D) == 0 ? l + D : L + l;
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    if ((i & D) == 0) {
      const V<C> a = r[i], b = r[i + D];
      r[i] = __builtin_shuffle(a, b, lo);
      r[i + D] = __builtin_shuffle(a, b, hi);
    }
}
template <class C>
SK_INLINE void transpose(V<C>* r) {
  if constexpr (kLanes<C> > 8) exchange<C, 8>(r);
  if constexpr (kLanes<C> > 4) exchange<C, 4>(r);
  if constexpr (kLanes<C> > 2) exchange<C, 2>(r);
  exchange<C, 1>(r);
}

// A weight matrix as the product reads it: packed panels, or the rows as they lie, to be packed
// panel by panel into scratch just before use (sequences too short to repay a packed copy).
template <class S, class A>
struct Matrix {
  const A* packed;
  const S* raw;
  int64_t rows;  // of `raw`: hidden units for gate rows, else all of them
  int64_t K;
  int64_t columns = 0;  // not 0: `raw` is (K, columns), its rows are k, not the columns of B
};

// A row length for buffers whose rows are read side by side: whole vectors and whole AMX tiles, and
// not a multiple of 512 bytes, which would put all rows in the same few cache sets.
template <class X>
SK_INLINE int64_t padded_row(int64_t n) {
  const int64_t padded = round_up(n, 32);
  return padded * int64_t(sizeof(X)) % 512 == 0 ? padded + 32 : padded;
}

// Product<A, C>: operands of type A, sums of type C. They differ only where the processor
// multiplies bf16 itself; that product is in bf16.inl.
template <class A, class C>
struct Product;

// ---- tiles

// What one step of k does to an accumulator.
template <class C>
struct MultiplyAdd {
  SK_INLINE V<C> apply(V<C> acc, V<C> a, V<C> b) { return acc + a * b; }
};

// C = F + A B for R rows of A and NP panels. F, at `from` with rows ldf apart, is C itself, one row
// for all (ldf 0), or nothing (null). A(r, k) is a[r * lda + k], or a[k * R + r] when Transposed.
// The three rows that share a base pointer reach each other by lda and 2 * lda: few enough address
// registers for twelve rows, which the empty asm keeps the compiler from undoing.
//
// Sums run over blocks of k, each from zero, so that rounding errors grow with the block and the
// number of blocks instead of with K. K is the width of a layer; of a transposed A, whose product
// sums over all rows of all steps, it is a part of them, and longer blocks make fewer.
constexpr int64_t kSumBlock = 64, kSumBlockTransposed = 192;

template <class C, int R, int NP, bool Transposed, class Step>
static void tile(int64_t K, const C* a, int64_t lda, const C* b, int64_t panel_stride, C* c,
                 int64_t ldc, const int64_t* at, const C* from, int64_t ldf) {
  constexpr int L = kLanes<C>, W = kPanel<C>, bases = (R + 2) / 3;
  V<C> acc[R][2 * NP];
  const C* row[bases];
#pragma GCC unroll 4
  for (int g = 0; g < bases; ++g) row[g] = a + 3 * g * lda;
  auto step = [&](int64_t k) __attribute__((always_inline)) {
    V<C> bv[2 * NP];
#pragma GCC unroll 8
    for (int v = 0; v < 2 * NP; ++v) {
      const C* from = b + (v / 2) * panel_stride + k * W + (v % 2) * L;
      bv[v] = load<C>(from);
      // One to three rows are bound by the loads themselves, of which a prefetch is one more.
      if (R > 3) __builtin_prefetch(from + 24 / NP * W);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const C s = Transposed ? a[k * R + r] : *(row[r / 3] + (r % 3) * lda + k);
#pragma GCC unroll 8
      for (int v = 0; v < 2 * NP; ++v) acc[r][v] = Step::apply(acc[r][v], splat(s), bv[v]);
    }
  };
  auto advance = [&](int64_t n) __attribute__((always_inline)) {
    if (Transposed) {
      a += n * R;
    } else {
#pragma GCC unroll 4
      for (int g = 0; g < bases; ++g) {
        row[g] += n;
        asm("" : "+r"(row[g]));
      }
    }
    b += n * W;
  };
  while (K > 0) {
    const int64_t block = min_(K, Transposed ? kSumBlockTransposed : kSumBlock);
    K -= block;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < 2 * NP; ++v) acc[r][v] = V<C>{};
    int64_t k = 0;
    for (; k + 4 <= block; k += 4) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) step(u);
      advance(4);
    }
    for (; k < block; ++k) {
      step(0);
      advance(1);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < 2 * NP; ++v) {
        const int64_t column = at[v / 2] + (v % 2) * L;
        if (from) acc[r][v] = load<C>(from + r * ldf + column) + acc[r][v];
        store<C>(c + r * ldc + column, acc[r][v]);
      }
    from = c;
    ldf = ldc;
  }
}

constexpr int kTileRows = SK_ACC / 2;  // rows of a one-panel tile

template <int R>
constexpr int panels_for() {  // panels that fill the accumulators, at most 4
  return SK_ACC / (2 * R) > 4 ? 4 : SK_ACC / (2 * R);
}

// The tile for `rows` and `panels`, found by a walk over the sizes that exist. A transposed A takes
// one panel at a time.
template <class C, bool Transposed, class Step = MultiplyAdd<C>, int R = 1>
static void tile_rows(int rows, int panels, int64_t K, const C* a, int64_t lda, const C* b,
                      int64_t panel_stride, C* c, int64_t ldc, const int64_t* at, const C* from,
                      int64_t ldf) {
  if constexpr (R <= kTileRows) {
    if (rows != R)
      return tile_rows<C, Transposed, Step, R + 1>(rows, panels, K, a, lda, b, panel_stride, c, ldc,
                                                   at, from, ldf);
    constexpr int most = Transposed ? 1 : panels_for<R>();
    if (panels == 1)
      return tile<C, R, 1, Transposed, Step>(K, a, lda, b, panel_stride, c, ldc, at, from, ldf);
    if constexpr (most >= 2)
      if (panels == 2)
        return tile<C, R, 2, Transposed, Step>(K, a, lda, b, panel_stride, c, ldc, at, from, ldf);
    if constexpr (most >= 3)
      if (panels == 3)
        return tile<C, R, 3, Transposed, Step>(K, a, lda, b, panel_stride, c, ldc, at, from, ldf);
    if constexpr (most >= 4)
      tile<C, R, 4, Transposed, Step>(K, a, lda, b, panel_stride, c, ldc, at, from, ldf);
  }
}

// How m rows are cut into tiles, and how much of k the tiles of a panel share before they go on: a
// whole number of sum blocks, so that the cut changes no bit.
struct Cut {
  int panels;     // at once
  int64_t tiles;  // of nearly equal height: 16 rows are 8 + 8, not 12 + 4
  int64_t k;
};
SK_INLINE Cut cut_of(int64_t m, int64_t K) {
  // Few rows leave accumulators free for more panels.
  if (m <= kTileRows / 2) return {max_(1, min_(4, int(SK_ACC / (2 * m)))), 1, K};
  // Many rows come from the L2 cache: half of them at a time, by twice the columns, read it half as
  // often. Two panels need four registers beside the sums.
  if (SK_ACC == 24 && m > 2 * kTileRows) return {2, ceil_div(m, kTileRows / 2), 3 * kSumBlock};
  // The second tile finds the panel in the L1 cache.
  return {1, ceil_div(m, kTileRows), m > kTileRows ? 4 * kSumBlock : K};
}

template <class C>
struct Product<C, C> {
  static constexpr int kTogether = 1;  // values of k that stand side by side in a panel

  // Elements of one panel.
  SK_INLINE int64_t panel_size(int64_t K) { return K * kPanel<C>; }

  // Panel of a matrix whose rows are already k, ld apart: columns [panel * width, ...) of (K, N).
  template <class S>
  static void pack_columns(C* dst, const S* w, int64_t ld, int64_t K, int64_t N, int64_t panel) {
    const int64_t at = panel * kPanel<C>, n = min_<int64_t>(kPanel<C>, N - at);
    for (int64_t k = 0; k < K; ++k) copy_row<C>(dst + k * kPanel<C>, w + k * ld + at, n, kPanel<C>);
  }

  // Row k of such a matrix, of n columns, into all panels of (K, width).
  template <class T>
  static void spread(C* panels, int64_t k, int64_t K, const T* const* row, int64_t n) {
    for (int64_t j = 0; j < n; j += kPanel<C>)
      copy_row<C>(panels + j * K + k * kPanel<C>, row[0] + j, min_<int64_t>(kPanel<C>, n - j),
                  kPanel<C>);
  }
  static void spread_end(C*, int64_t, int64_t) {}

  // ---- dW += dg^T x, some columns of dg at a time

  static constexpr int kGradientRows = kTileRows;
  SK_INLINE int64_t columns_size(int64_t K) { return K * kTileRows; }

  // The first n columns of `a` (K, lda) as (K, n), and their sums.
  static void take_columns(int n, int64_t K, const C* a, int64_t lda, C* out, C* sums) {
    if (n == kTileRows)
      take<kTileRows>(n, K, a, lda, out, sums);
    else
      take<0>(n, K, a, lda, out, sums);
  }

  template <int Fixed>
  static void take(int some, int64_t K, const C* a, int64_t lda, C* out, C* sums) {
    const int n = Fixed ? Fixed : some;
    C total[kTileRows] = {};
    for (int64_t k0 = 0; k0 < K; k0 += 32) {  // blocks, as in the products
      C sum[kTileRows] = {};
      for (int64_t k = k0; k < min_<int64_t>(k0 + 32, K); ++k)
        for (int r = 0; r < n; ++r) {
          const C v = a[k * lda + r];
          out[k * n + r] = v;
          sum[r] += v;
        }
      for (int r = 0; r < n; ++r) total[r] += sum[r];
    }
    for (int r = 0; sums && r < n; ++r) sums[r] += total[r];
  }

  // Their product with `count` panels, added to `out` or, `fresh`, in its place.
  static void gradient(int n, int64_t K, const C* taken, const C* panels, int64_t count, C* out,
                       int64_t ld, bool fresh) {
    const int64_t at[1] = {0};
    for (int64_t p = 0; p < count; ++p) {
      C* to = out + p * kPanel<C>;
      tile_rows<C, true>(n, 1, K, taken, n, panels + p * panel_size(K), 0, to, ld, at,
                         fresh ? nullptr : to, ld);
    }
  }

  template <class S, Mode M>
  static void pack_panel(C* dst, const S* w, int64_t rows, int64_t K, int64_t panel) {
    constexpr int L = kLanes<C>;
    const VectorRows vr[2] = {gate_rows<M>(2 * panel, rows, L),
                              gate_rows<M>(2 * panel + 1, rows, L)};
    for (int64_t k = 0; k < K; k += L) {
      const int64_t n = min_<int64_t>(L, K - k);
      for (int half = 0; half < 2; ++half) {
        const S* from = w + vr[half].first * K + k;
        C* out = dst + k * kPanel<C> + half * L;
        V<C> r[L];
        if (n == L && vr[half].count == L) {
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) {
            r[l] = load_as<C>(from + l * K);
            __builtin_prefetch(from + l * K + 2 * L);
          }
          transpose<C>(r);
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) store<C>(out + l * kPanel<C>, r[l]);
          continue;
        }
        for (int l = 0; l < L; ++l) r[l] = l < vr[half].count ? load_n<C>(from + l * K, n) : V<C>{};
        transpose<C>(r);
        for (int64_t l = 0; l < n; ++l) store<C>(out + l * kPanel<C>, r[l]);
      }
    }
  }

  static constexpr int kStreamRows = 4;

  // The product of R rows with `count` rows of weights, a vector of columns of C. Each block is
  // multiplied as soon as it is transposed: for so few rows, storing it costs more than the
  // product.
  template <class S, int R>
  static void stream_vector(const C* a, int64_t lda, const S* w, int64_t K, int64_t count, C* c,
                            int64_t ldc, const C* from, int64_t ldf) {
    constexpr int L = kLanes<C>;
    for (int64_t k0 = 0; k0 < K; k0 += kSumBlock) {
      const int64_t end = min_(k0 + kSumBlock, K);
      V<C> acc[R] = {};
      for (int64_t k = k0; k < end; k += L) {
        const int64_t n = min_<int64_t>(L, end - k);
        V<C> r[L];
        if (n == L && count == L) {
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) {
            r[l] = load_as<C>(w + l * K + k);
            __builtin_prefetch(w + l * K + k + 4 * L);
          }
          transpose<C>(r);
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l)
#pragma GCC unroll 4
            for (int q = 0; q < R; ++q)
              acc[q] = MultiplyAdd<C>::apply(acc[q], splat(a[q * lda + k + l]), r[l]);
          continue;
        }
        for (int l = 0; l < L; ++l) r[l] = l < count ? load_n<C>(w + l * K + k, n) : V<C>{};
        transpose<C>(r);
        for (int64_t l = 0; l < n; ++l)
          for (int q = 0; q < R; ++q)
            acc[q] = MultiplyAdd<C>::apply(acc[q], splat(a[q * lda + k + l]), r[l]);
      }
      for (int q = 0; q < R; ++q) store<C>(c + q * ldc, load<C>(from + q * ldf) + acc[q]);
      from = c;
      ldf = ldc;
    }
  }

  template <class S, Mode M, int R = 1>
  static void stream(int64_t m, const C* a, int64_t lda, const Matrix<S, C>& w, int64_t p0,
                     int64_t p1, C* c, int64_t ldc, const Columns& columns, const C* from,
                     int64_t ldf) {
    if constexpr (R < kStreamRows)
      if (m != R) return stream<S, M, R + 1>(m, a, lda, w, p0, p1, c, ldc, columns, from, ldf);
    for (int64_t p = p0; p < p1; ++p)
      for (int half = 0; half < 2; ++half) {
        const VectorRows rows = gate_rows<M>(2 * p + half, w.rows, kLanes<C>);
        const int64_t column = column_of(columns, p) + half * kLanes<C>;
        stream_vector<S, R>(a, lda, w.raw + rows.first * w.K, w.K, rows.count, c + column, ldc,
                            from + column, ldf);
      }
  }

  // The product of R rows with VS vectors of columns of a matrix (K, ld) as it lies, of which
  // `left` columns are there. For so few rows, copying it into panels costs more than the product.
  template <class S, int R, int VS>
  static void column_vectors(const C* a, int64_t lda, const S* w, int64_t ld, int64_t K,
                             int64_t left, C* c, int64_t ldc, const C* from, int64_t ldf) {
    constexpr int L = kLanes<C>;
    for (int64_t k0 = 0; k0 < K; k0 += kSumBlock) {
      const int64_t end = min_(k0 + kSumBlock, K);
      V<C> acc[R][VS] = {};
      for (int64_t k = k0; k < end; ++k) {
#pragma GCC unroll 16
        for (int v = 0; v < VS; ++v) {
          const S* row = w + k * ld + v * L;
          __builtin_prefetch(row + 4 * ld);
          const V<C> b = VS > 1 ? load_as<C>(row) : load_n<C>(row, left);
#pragma GCC unroll 4
          for (int q = 0; q < R; ++q)
            acc[q][v] = MultiplyAdd<C>::apply(acc[q][v], splat(a[q * lda + k]), b);
        }
      }
#pragma GCC unroll 4
      for (int q = 0; q < R; ++q)
#pragma GCC unroll 16
        for (int v = 0; v < VS; ++v)
          store<C>(c + q * ldc + v * L, load<C>(from + q * ldf + v * L) + acc[q][v]);
      from = c;
      ldf = ldc;
    }
  }

  // The same for the panels p0..p1, whose columns stand in C in their own order.
  template <class S, int R = 1>
  static void stream_columns(int64_t m, const C* a, int64_t lda, const Matrix<S, C>& w, int64_t p0,
                             int64_t p1, C* c, int64_t ldc, const C* from, int64_t ldf) {
    if constexpr (R < kStreamRows)
      if (m != R) return stream_columns<S, R + 1>(m, a, lda, w, p0, p1, c, ldc, from, ldf);
    constexpr int L = kLanes<C>, VS = SK_ACC / R < 16 ? SK_ACC / R : 16;
    int64_t j = p0 * kPanel<C>;
    const int64_t end = p1 * kPanel<C>, whole = min_(end, w.columns);
    for (; j + VS * L <= whole; j += VS * L)
      column_vectors<S, R, VS>(a, lda, w.raw + j, w.columns, w.K, VS * L, c + j, ldc, from + j,
                               ldf);
    for (; j < whole; j += L)
      column_vectors<S, R, 1>(a, lda, w.raw + j, w.columns, w.K, whole - j, c + j, ldc, from + j,
                              ldf);
  }

  // C[m rows][panels p0..p1 by `columns`] += A B, or = bias + A B, the bias a row in the order of
  // C. `scratch` holds four panels when the matrix is not packed. `backwards` walks the panels from
  // the last: every second step of a sequence does, so that what the cache still holds of the
  // weights is used first.
  template <class S, Mode M>
  static void gemm(int64_t m, const C* a, int64_t lda, const Matrix<S, C>& w, int64_t p0,
                   int64_t p1, C* c, int64_t ldc, const Columns& columns, C* scratch,
                   bool backwards, const C* bias = nullptr) {
    if (m <= 0 || p1 <= p0) return;
    const C* from = bias ? bias : c;
    const int64_t ldf = bias ? 0 : ldc;
    if (!w.packed && m <= kStreamRows)
      return w.columns ? stream_columns<S>(m, a, lda, w, p0, p1, c, ldc, from, ldf)
                       : stream<S, M>(m, a, lda, w, p0, p1, c, ldc, columns, from, ldf);
    const Cut cut = cut_of(m, w.K);
    const int64_t size = panel_size(w.K), turns = ceil_div(p1 - p0, cut.panels);
    for (int64_t turn = 0; turn < turns; ++turn) {
      const int64_t p = p0 + (backwards ? turns - 1 - turn : turn) * cut.panels;
      const int np = int(min_<int64_t>(cut.panels, p1 - p));
      int64_t at[4];
      for (int i = 0; i < np; ++i) at[i] = column_of(columns, p + i);
      const C* b = w.packed + p * size;
      if (!w.packed) {
        for (int i = 0; i < np; ++i)
          if (w.columns)
            pack_columns(scratch + i * size, w.raw, w.columns, w.K, w.columns, p + i);
          else
            pack_panel<S, M>(scratch + i * size, w.raw, w.rows, w.K, p + i);
        b = scratch;
      }
      for (int64_t k = 0; k < w.K; k += cut.k)
        for (int64_t t = 0; t < cut.tiles; ++t) {
          const int64_t r0 = t * m / cut.tiles, rows = (t + 1) * m / cut.tiles - r0;
          C* to = c + r0 * ldc;
          tile_rows<C, false>(int(rows), np, min_(cut.k, w.K - k), a + r0 * lda + k, lda,
                              b + k * kPanel<C>, size, to, ldc, at, k ? to : from + r0 * ldf,
                              k ? ldc : ldf);
        }
    }
  }
};
