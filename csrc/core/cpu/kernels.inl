// The table of one instruction set.

template <class S, class A, class C, Mode M>
struct Entry {
  static Workspace forward_workspace(const Forward& f, const Member& me) {
    return ForwardPass<S, A, C, M>::workspace(f, me);
  }
  static void forward(const Forward& f, const Member& me) { ForwardPass<S, A, C, M>(f, me).run(); }
  static Workspace backward_workspace(const Backward& b, const Member& me) {
    return BackwardPass<S, C, M>::workspace(b, me);
  }
  static void backward(const Backward& b, const Member& me) { BackwardPass<S, C, M>(b, me).run(); }

  static PackedSizes packed_sizes(const Shape& s) {
    using F = ForwardPass<S, A, C, M>;
    const int64_t groups = F::groups_of(s), panels = groups * Cell<M, C>::group_panels;
    return {panels * panel_size<A, C>(s.I) * int64_t(sizeof(A)),
            panels * panel_size<A, C>(s.P) * int64_t(sizeof(A)),
            F::outputs_of(s) * panel_size<A, C>(s.H) * int64_t(sizeof(A)),
            groups * Cell<M, C>::group_width * int64_t(sizeof(C))};
  }

  static void pack(const Shape& s, const Weights& w, void* ih, void* hh, void* hr, void* bias) {
    using F = ForwardPass<S, A, C, M>;
    const int64_t groups = F::groups_of(s), panels = groups * Cell<M, C>::group_panels;
    F::template pack_range<M>(static_cast<A*>(ih), w.w_ih, s.H, s.I, {0, panels});
    F::template pack_range<M>(static_cast<A*>(hh), w.w_hh, s.H, s.P, {0, panels});
    F::template pack_range<F::kPlain>(static_cast<A*>(hr), w.w_hr, s.P, s.H, {0, F::outputs_of(s)});
    F::pack_bias(static_cast<C*>(bias), w, s, {0, groups});
  }

  static void add(void* sum, const void* other, int64_t n) {
    S* a = static_cast<S*>(sum);
    const S* b = static_cast<const S*>(other);
    for (int64_t i = 0; i < n; i += kLanes<C>)
      store_n<C>(a + i, load_n<C>(a + i, n - i) + load_n<C>(b + i, n - i), n - i);
  }

  static constexpr Kernels kernels{forward_workspace, forward,      backward_workspace, backward,
                                   packed_sizes,      pack,         add};
  static constexpr Kernels forward_only{forward_workspace, forward, nullptr, nullptr,
                                        packed_sizes,      pack,    nullptr};
};
