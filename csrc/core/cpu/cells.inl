// The four cells: where their gates stand in a row of pre-activations, and what one block of hidden
// units does with them, forward and backward. Everything around them is shared.
//
// Rows of pre-activations hold the gates of a block of `lanes` units side by side: LSTM i f g o;
// GRU, of two blocks, r z r z nx nx nh nh, where nx = W_in x + b_in and nh = W_hn h + b_hn stay
// apart because r multiplies only the second; RNN one vector.

// One row of one step, at its unit 0. S is the storage type, A the operand of the product, C the
// compute type. Pointers that a cell does not use, or that nobody asked for, are null.
template <class S, class A, class C>
struct ForwardRow {
  const C* g;       // pre-activations
  C* c;             // cell state, in and out
  const A* h_prev;  // read by GRU
  A* h;             // output of the step
  S* y;             // the same, stored
  S* gates;         // (4H): kept for the backward
  S* cells;         // (H)
};

// gates, cells, c_prev and h_prev are what the forward kept. dh holds the gradient of the step's
// output and leaves with the part of it that bypasses the recurrent product; dc likewise.
template <class S, class A, class C>
struct BackwardRow {
  const S *dy, *gates, *cells, *c_prev, *h_prev, *y;
  C *dh, *dc;
  A* dg;  // gradient of the pre-activations: LSTM i f g o, GRU r z nx nh, RNN one; (k*H)
};

template <Mode M, class C>
struct Cell;

template <class C>
struct Cell<Mode::lstm, C> {
  static constexpr int L = kLanes<C>;
  static constexpr int group_blocks = 1, group_panels = 2, group_width = 4 * L;
  static constexpr Columns ih{2, group_width, {0, 2 * L, 0, 0}}, hh = ih;
  static constexpr int grads = 4;  // columns per unit of dg

  template <class S, class A, bool Save>
  SK_INLINE void forward(const ForwardRow<S, A, C>& r, int64_t j, int64_t H, bool project) {
    const C* g = r.g + j * 4;
    const int64_t n = H - j;
    const V<C> i = sigmoid<C>(load<C>(g)), f = sigmoid<C>(load<C>(g + L));
    const V<C> u = tanh<C>(load<C>(g + 2 * L)), o = sigmoid<C>(load<C>(g + 3 * L));
    const V<C> c = f * load<C>(r.c + j) + i * u;
    store<C>(r.c + j, c);
    V<C> h = o * tanh<C>(c);
    if (!project) {
      store_n<C>(r.y + j, h, n);
      h = through<S, C>(h);
    }
    store_operand<C>(r.h + j, h, n);
    if constexpr (Save) {
      store_n<C>(r.gates + j, i, n);
      store_n<C>(r.gates + H + j, f, n);
      store_n<C>(r.gates + 2 * H + j, u, n);
      store_n<C>(r.gates + 3 * H + j, o, n);
      store_n<C>(r.cells + j, c, n);
    }
  }

  template <class S, class A>
  SK_INLINE void backward(const BackwardRow<S, A, C>& r, int64_t j, int64_t H) {
    const int64_t n = H - j;
    const V<C> i = load_n<C>(r.gates + j, n), f = load_n<C>(r.gates + H + j, n);
    const V<C> u = load_n<C>(r.gates + 2 * H + j, n), o = load_n<C>(r.gates + 3 * H + j, n);
    const V<C> tc = tanh<C>(load_n<C>(r.cells + j, n)), c_prev = load_n<C>(r.c_prev + j, n);
    V<C> dh = load<C>(r.dh + j);
    if (r.dy) dh += load_n<C>(r.dy + j, n);
    const V<C> dc = load<C>(r.dc + j) + dh * o * (C(1) - tc * tc);
    store_n<C>(r.dg + j, dc * u * i * (C(1) - i), n);
    store_n<C>(r.dg + H + j, dc * c_prev * f * (C(1) - f), n);
    store_n<C>(r.dg + 2 * H + j, dc * i * (C(1) - u * u), n);
    store_n<C>(r.dg + 3 * H + j, dh * tc * o * (C(1) - o), n);
    store<C>(r.dc + j, dc * f);
    store<C>(r.dh + j, V<C>{});
  }
};

template <class C>
struct Cell<Mode::gru, C> {
  static constexpr int L = kLanes<C>;
  static constexpr int group_blocks = 2, group_panels = 3, group_width = 8 * L;
  static constexpr Columns ih{3, group_width, {0, 2 * L, 4 * L, 0}};
  static constexpr Columns hh{3, group_width, {0, 2 * L, 6 * L, 0}};
  static constexpr int grads = 4;

  template <class S, class A, bool Save>
  SK_INLINE void forward(const ForwardRow<S, A, C>& row, int64_t j, int64_t H, bool) {
    const int64_t block = j / L, n = H - j;
    const C* g = row.g + (block / 2) * group_width;
    const C* rz = g + (block % 2) * 2 * L;
    const V<C> r = sigmoid<C>(load<C>(rz)), z = sigmoid<C>(load<C>(rz + L));
    const V<C> nx = load<C>(g + (4 + block % 2) * L), nh = load<C>(g + (6 + block % 2) * L);
    const V<C> u = tanh<C>(nx + r * nh), h_prev = load_as<C>(row.h_prev + j);
    const V<C> h = u + z * (h_prev - u);
    store_n<C>(row.y + j, h, n);
    store_operand<C>(row.h + j, through<S, C>(h), n);
    if constexpr (Save) {
      store_n<C>(row.gates + j, r, n);
      store_n<C>(row.gates + H + j, z, n);
      store_n<C>(row.gates + 2 * H + j, u, n);
      store_n<C>(row.gates + 3 * H + j, nh, n);
    }
  }

  template <class S, class A>
  SK_INLINE void backward(const BackwardRow<S, A, C>& row, int64_t j, int64_t H) {
    const int64_t n = H - j;
    const V<C> r = load_n<C>(row.gates + j, n), z = load_n<C>(row.gates + H + j, n);
    const V<C> u = load_n<C>(row.gates + 2 * H + j, n), nh = load_n<C>(row.gates + 3 * H + j, n);
    const V<C> h_prev = load_n<C>(row.h_prev + j, n);
    V<C> dh = load<C>(row.dh + j);
    if (row.dy) dh += load_n<C>(row.dy + j, n);
    const V<C> da = dh * (C(1) - z) * (C(1) - u * u);
    store_n<C>(row.dg + j, da * nh * r * (C(1) - r), n);
    store_n<C>(row.dg + H + j, dh * (h_prev - u) * z * (C(1) - z), n);
    store_n<C>(row.dg + 2 * H + j, da, n);
    store_n<C>(row.dg + 3 * H + j, da * r, n);
    store<C>(row.dh + j, dh * z);
  }
};

template <Mode M, class C>
struct ElmanCell {
  static constexpr int L = kLanes<C>;
  static constexpr int group_blocks = 2, group_panels = 1, group_width = 2 * L;
  static constexpr Columns ih{1, group_width, {0, 0, 0, 0}}, hh = ih;
  static constexpr int grads = 1;

  template <class S, class A, bool Save>
  SK_INLINE void forward(const ForwardRow<S, A, C>& r, int64_t j, int64_t H, bool) {
    const V<C> a = load<C>(r.g + j);
    // As torch: the larger of a and 0, and NaN stays NaN.
    const V<C> h = M == Mode::rnn_tanh ? tanh<C>(a) : (a < C(0)) ? V<C>{} : a;
    store_n<C>(r.y + j, h, H - j);
    store_operand<C>(r.h + j, through<S, C>(h), H - j);
  }

  template <class S, class A>
  SK_INLINE void backward(const BackwardRow<S, A, C>& r, int64_t j, int64_t H) {
    const int64_t n = H - j;
    const V<C> y = load_n<C>(r.y + j, n);
    V<C> dh = load<C>(r.dh + j);
    if (r.dy) dh += load_n<C>(r.dy + j, n);
    if constexpr (M == Mode::rnn_tanh)
      dh *= C(1) - y * y;
    else
      dh = (y <= C(0)) ? V<C>{} : dh;  // as torch: a gradient passes through NaN
    store_n<C>(r.dg + j, dh, n);
    store<C>(r.dh + j, V<C>{});
  }
};
template <class C>
struct Cell<Mode::rnn_tanh, C> : ElmanCell<Mode::rnn_tanh, C> {};
template <class C>
struct Cell<Mode::rnn_relu, C> : ElmanCell<Mode::rnn_relu, C> {};
