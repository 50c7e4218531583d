// Products of bf16 operands with sums in float, for processors that have them: AMX tiles, or
// AVX-512-BF16 dot products of pairs. Both read the same panels: pairs of k side by side,
// (pairs, 32 columns, 2), the pairs padded to whole tiles with zeros.

template <>
struct Product<bf16, float> {
  static constexpr int L = kLanes<float>;
  static constexpr int kTogether = 2;

  SK_INLINE int64_t pairs(int64_t K) { return round_up(K, 32) / 2; }
  SK_INLINE int64_t panel_size(int64_t K) { return pairs(K) * 2 * kPanel<float>; }

  // A pair of bf16 is moved as one float; no arithmetic touches it.
  template <class S, Mode M>
  static void pack_panel(bf16* dst, const S* w, int64_t rows, int64_t K, int64_t panel) {
    static_assert(sizeof(S) == 2, "bf16 weights");
    float* out = reinterpret_cast<float*>(dst);
    for (int64_t p = 0; p < pairs(K); p += L)
      for (int half = 0; half < 2; ++half) {
        const VectorRows vr = gate_rows<M>(2 * panel + half, rows, L);
        V<float> r[L];
        for (int l = 0; l < L; ++l) r[l] = V<float>{};
        const int64_t n = min_<int64_t>(2 * L, K - 2 * p);
        for (int64_t l = 0; l < vr.count; ++l)
          __builtin_memcpy(&r[l], w + (vr.first + l) * K + 2 * p, size_t(n) * sizeof(S));
        transpose<float>(r);
        for (int l = 0; l < L; ++l) store<float>(out + (p + l) * 2 * L + half * L, r[l]);
      }
  }

  // Two rows of k, the second perhaps absent, of n columns, side by side in one panel.
  template <class T>
  SK_INLINE void pair_rows(bf16* dst, const T* first, const T* second, int64_t n) {
    using U = Simd<float>::U;
    for (int64_t j = 0; j < kPanel<float>; j += L) {
      V<float> low{}, high{};
      if (j < n) low = through<bf16, float>(load_n<float>(first + j, n - j));
      if (j < n && second) high = through<bf16, float>(load_n<float>(second + j, n - j));
      const U pair = (bit_cast<U>(low) >> 16) | bit_cast<U>(high);
      __builtin_memcpy(dst + 2 * j, &pair, sizeof(pair));
    }
  }

  template <class S>
  static void pack_columns(bf16* dst, const S* w, int64_t ld, int64_t K, int64_t N, int64_t panel) {
    const int64_t at = panel * kPanel<float>, n = min_<int64_t>(kPanel<float>, N - at);
    for (int64_t k = 0; k < 2 * pairs(K); k += 2)
      pair_rows(dst + k * kPanel<float>, w + k * ld + at,
                k + 1 < K ? w + (k + 1) * ld + at : nullptr, k < K ? n : 0);
  }

  template <class T>
  static void spread(bf16* panels, int64_t k, int64_t K, const T* const* rows, int64_t n) {
    for (int64_t j = 0; j < n; j += kPanel<float>)
      pair_rows(panels + j / kPanel<float> * panel_size(K) + k * kPanel<float>, rows[0] + j,
                rows[1] ? rows[1] + j : nullptr, n - j);
  }
  // The pairs beyond the last row.
  static void spread_end(bf16* panels, int64_t K, int64_t n) {
    const int64_t from = round_up(K, 2) * kPanel<float>, size = panel_size(K);
    for (int64_t j = 0; j < n; j += kPanel<float>)
      __builtin_memset(panels + j / kPanel<float> * size + from, 0,
                       size_t(size - from) * sizeof(bf16));
  }

  // Columns of dg become rows of A here, k side by side, padded to whole tiles with zeros.
  static constexpr int kGradientRows = 32;
  SK_INLINE int64_t columns_row(int64_t K) { return padded_row<bf16>(K); }
  SK_INLINE int64_t columns_size(int64_t K) { return columns_row(K) * kGradientRows; }

  static void take_columns(int n, int64_t K, const bf16* a, int64_t lda, bf16* out, float* sums) {
    using U = Simd<float>::U;
    float* to = reinterpret_cast<float*>(out);  // pairs are moved as floats
    const int64_t ld = columns_row(K) / 2;
    for (int j = 0; j < n; j += L) {
      const int some = min_(L, n - j);
      V<float> total{};
      for (int64_t k = 0; k < K; k += 2 * L) {
        V<float> r[L], sum{};
        for (int l = 0; l < L; ++l) {
          V<float> low{}, high{};
          const bf16* row = a + (k + 2 * l) * lda + j;
          if (k + 2 * l < K) low = load_n<float>(row, some);
          if (k + 2 * l + 1 < K) high = load_n<float>(row + lda, some);
          sum += low + high;
          r[l] = bit_cast<V<float>>((bit_cast<U>(low) >> 16) | bit_cast<U>(high));
        }
        transpose<float>(r);
        for (int c = 0; c < some; ++c) store<float>(to + (j + c) * ld + k / 2, r[c]);
        total += sum;
      }
      if (sums) store_n<float>(sums + j, load_n<float>(sums + j, some) + total, some);
    }
  }

  static void gradient(int n, int64_t K, const bf16* taken, const bf16* panels, int64_t count,
                       float* out, int64_t ld, bool fresh) {
    for (int r = 0; fresh && r < n; ++r)
      __builtin_memset(out + r * ld, 0, size_t(count * kPanel<float>) * sizeof(float));
    gemm<bf16, Mode::rnn_tanh>(n, taken, columns_row(K), {panels, nullptr, 0, K}, 0, count, out, ld,
                               Columns{1, kPanel<float>, {0, 0, 0, 0}}, nullptr, false);
  }

#ifdef SK_AMX
  // Tiles 0 to 3 are sums, 4 and 5 rows of A, 6 and 7 columns of B. `above` rows in the upper two
  // sums, `below` in the lower two.
  struct alignas(64) TileShape {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    TileShape(int above, int below) {
      for (int i = 0; i < 8; ++i) bytes[i] = 64;
      rows[0] = rows[1] = rows[4] = uint8_t(above);
      rows[2] = rows[3] = rows[5] = uint8_t(below);
      rows[6] = rows[7] = 16;
    }
  };

  // Up to 32 rows by one panel.
  template <bool Below>
  SK_INLINE void block(int64_t steps, const bf16* a, int64_t lda, const bf16* b, float* c,
                       int64_t ldc) {
    const int64_t sa = lda * 2, sc = ldc * 4;
    _tile_loadd(0, c, sc);
    _tile_loadd(1, c + L, sc);
    if (Below) {
      _tile_loadd(2, c + 16 * ldc, sc);
      _tile_loadd(3, c + 16 * ldc + L, sc);
    }
    for (int64_t k = 0; k < steps; ++k, a += 32, b += 32 * kPanel<float>) {
      _tile_loadd(6, b, 128);
      _tile_loadd(7, b + 32, 128);
      _tile_loadd(4, a, sa);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (Below) {
        _tile_loadd(5, a + 16 * lda, sa);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, sc);
    _tile_stored(1, c + L, sc);
    if (Below) {
      _tile_stored(2, c + 16 * ldc, sc);
      _tile_stored(3, c + 16 * ldc + L, sc);
    }
  }

  // Up to 16 rows by two panels, whose columns go to c0 and c1.
  SK_INLINE void wide(int64_t steps, const bf16* a, int64_t lda, const bf16* b, int64_t size,
                      float* c0, float* c1, int64_t ldc) {
    const int64_t sa = lda * 2, sc = ldc * 4;
    _tile_loadd(0, c0, sc);
    _tile_loadd(1, c0 + L, sc);
    _tile_loadd(2, c1, sc);
    _tile_loadd(3, c1 + L, sc);
    for (int64_t k = 0; k < steps; ++k, a += 32, b += 32 * kPanel<float>) {
      _tile_loadd(4, a, sa);
      _tile_loadd(6, b, 128);
      _tile_loadd(7, b + 32, 128);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(6, b + size, 128);
      _tile_loadd(7, b + size + 32, 128);
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 4, 7);
    }
    _tile_stored(0, c0, sc);
    _tile_stored(1, c0 + L, sc);
    _tile_stored(2, c1, sc);
    _tile_stored(3, c1 + L, sc);
  }
#else
  struct PairDot {
    SK_INLINE V<float> apply(V<float> acc, V<float> a, V<float> b) {
      return bit_cast<V<float>>(
          _mm512_dpbf16_ps(bit_cast<__m512>(acc), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
    }
  };
#endif

  template <class S, Mode M>
  static void gemm(int64_t m, const bf16* a, int64_t lda, const Matrix<S, bf16>& w, int64_t p0,
                   int64_t p1, float* c, int64_t ldc, const Columns& columns, bf16* scratch,
                   bool backwards) {
    if (m <= 0 || p1 <= p0) return;
    const int64_t size = panel_size(w.K);
    const int64_t at_once = m <= 16 ? 2 : 1, turns = ceil_div(p1 - p0, at_once);
#ifdef SK_AMX
    const int tail = int(m % 32);
    const TileShape full(16, 16), rest(min_(tail, 16), max_(tail - 16, 1));
    const TileShape few{int(m), int(m)};
    _tile_loadconfig(m <= 16 ? &few : &full);
#endif
    for (int64_t turn = 0; turn < turns; ++turn) {
      const int64_t p = p0 + (backwards ? turns - 1 - turn : turn) * at_once;
      const int np = int(min_(at_once, p1 - p));
      const bf16* b = w.packed + p * size;
      if (!w.packed) {
        for (int i = 0; i < np; ++i)
          pack_panel<S, M>(scratch + i * size, w.raw, w.rows, w.K, p + i);
        b = scratch;
      }
      const int64_t at[2] = {column_of(columns, p), column_of(columns, p + np - 1)};
#ifdef SK_AMX
      const int64_t steps = pairs(w.K) / 16;
      if (m <= 16) {
        if (np == 2)
          wide(steps, a, lda, b, size, c + at[0], c + at[1], ldc);
        else
          block<false>(steps, a, lda, b, c + at[0], ldc);
        continue;
      }
      int64_t r = 0;
      for (; r + 32 <= m; r += 32)
        block<true>(steps, a + r * lda, lda, b, c + r * ldc + at[0], ldc);
      if (tail == 0) continue;
      _tile_loadconfig(&rest);
      if (tail > 16)
        block<true>(steps, a + r * lda, lda, b, c + r * ldc + at[0], ldc);
      else
        block<false>(steps, a + r * lda, lda, b, c + r * ldc + at[0], ldc);
      _tile_loadconfig(&full);
#else
      // Pairs are loaded as floats, so a row of A is lda / 2 of them.
      const int64_t tiles = ceil_div(m, kTileRows);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t r0 = t * m / tiles, rows = (t + 1) * m / tiles - r0;
        for (int i = 0; i < np; ++i)
          tile_rows<float, false, PairDot>(int(rows), 1, pairs(w.K),
                                           reinterpret_cast<const float*>(a + r0 * lda), lda / 2,
                                           reinterpret_cast<const float*>(b + i * size), 0,
                                           c + r0 * ldc, ldc, at + i, c + r0 * ldc, ldc);
      }
#endif
    }
#ifdef SK_AMX
    _tile_release();
#endif
  }
};
