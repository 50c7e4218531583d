// The forward entries of one instruction set's table.

template <class S, class A, class C, Mode M>
struct ForwardEntry {
  using Pass = ForwardPass<S, A, C, M>;

  static Workspace workspace(const Forward& f, const Member& me) { return Pass::workspace(f, me); }
  static void run(const Forward& f, const Member& me) { Pass(f, me).run(); }

  static PackedSizes packed_sizes(const Shape& s) {
    const int64_t groups = Pass::groups_of(s), panels = groups * Cell<M, C>::group_panels;
    return {panels * Product<A, C>::panel_size(s.I) * int64_t(sizeof(A)),
            panels * Product<A, C>::panel_size(s.P) * int64_t(sizeof(A)),
            Pass::outputs_of(s) * Product<A, C>::panel_size(s.H) * int64_t(sizeof(A)),
            groups * Cell<M, C>::group_width * int64_t(sizeof(C))};
  }

  static void pack(const Shape& s, const Weights& w, void* ih, void* hh, void* hr, void* bias) {
    const int64_t groups = Pass::groups_of(s), panels = groups * Cell<M, C>::group_panels;
    Pass::template pack_range<M>(static_cast<A*>(ih), w.w_ih, s.H, s.I, {0, panels});
    Pass::template pack_range<M>(static_cast<A*>(hh), w.w_hh, s.H, s.P, {0, panels});
    Pass::template pack_range<Pass::kPlain>(static_cast<A*>(hr), w.w_hr, s.P, s.H,
                                            {0, Pass::outputs_of(s)});
    Pass::pack_bias(static_cast<C*>(bias), w, s, {0, groups});
  }

  static constexpr Kernels kernels{workspace, run, packed_sizes, pack, nullptr, nullptr, nullptr};
};
