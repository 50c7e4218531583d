// The cells, one hidden unit of one row at a time, in fp32: the same formulas as core/cpu/cells.inl
// computes on vectors and seqkern/reference/cells.py defines.
//
// kGates products with h make up a step. Pre-activations, and their gradients dg, have kColumns
// columns a unit: LSTM i f g o; GRU r z nx nh, where nx = W_in x + b_in and nh = W_hn h + b_hn stay
// apart because r multiplies only the second; RNN one.
#pragma once
#include "core/cuda/device.cuh"
#include "core/recurrent.h"

namespace seqkern::cuda {

// Saturates to 0 and 1 without a NaN: exp overflows to infinity, whose reciprocal is 0.
SK_DEVICE float sigmoid(float x) { return device::reciprocal(1.0f + device::exp(-x)); }

// What a step of the backward reads of one unit of one row. dh is the whole gradient of the step's
// output and leaves with the part of h_prev's that bypasses the recurrent product.
struct CellGradient {
  float saved[4];  // as `forward` gave them
  float c, c_prev, h_prev, y;
  float dh, dc;
};

template <Mode M>
struct Cell;

template <>
struct Cell<Mode::lstm> {
  static constexpr int kGates = 4, kColumns = 4, kSaved = 4;
  static constexpr bool kHasC = true, kReadsH = false, kReadsY = false;

  // The column of dg that belongs to the product with row block `gate` of W_hh.
  static SK_DEVICE constexpr int column(int gate) { return gate; }

  static SK_DEVICE void join(const float* gx, const float* gh, const float* bias, float* a) {
    SK_UNROLL
    for (int q = 0; q < 4; ++q) a[q] = gx[q] + gh[q] + bias[q];
  }
  static SK_DEVICE void join_bias(const float* b_ih, const float* b_hh, float* bias) {
    SK_UNROLL
    for (int q = 0; q < 4; ++q) bias[q] = b_ih[q] + b_hh[q];
  }

  static SK_DEVICE void forward(const float* a, float& h, float& c, float* saved, bool) {
    const float i = sigmoid(a[0]), f = sigmoid(a[1]), g = device::tanh(a[2]), o = sigmoid(a[3]);
    c = f * c + i * g;
    h = o * device::tanh(c);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }

  static SK_DEVICE void backward(CellGradient& k, float* dg, bool) {
    const float i = k.saved[0], f = k.saved[1], g = k.saved[2], o = k.saved[3];
    const float tc = device::tanh(k.c);
    const float dc = k.dc + k.dh * o * (1.0f - tc * tc);
    dg[0] = dc * g * i * (1.0f - i);
    dg[1] = dc * k.c_prev * f * (1.0f - f);
    dg[2] = dc * i * (1.0f - g * g);
    dg[3] = k.dh * tc * o * (1.0f - o);
    k.dc = dc * f;
    k.dh = 0.0f;
  }
};

template <>
struct Cell<Mode::gru> {
  static constexpr int kGates = 3, kColumns = 4, kSaved = 4;
  static constexpr bool kHasC = false, kReadsH = true, kReadsY = false;

  static SK_DEVICE constexpr int column(int gate) { return gate == 2 ? 3 : gate; }

  static SK_DEVICE void join(const float* gx, const float* gh, const float* bias, float* a) {
    a[0] = gx[0] + gh[0] + bias[0];
    a[1] = gx[1] + gh[1] + bias[1];
    a[2] = gx[2] + bias[2];
    a[3] = gh[2] + bias[3];
  }
  static SK_DEVICE void join_bias(const float* b_ih, const float* b_hh, float* bias) {
    bias[0] = b_ih[0] + b_hh[0];
    bias[1] = b_ih[1] + b_hh[1];
    bias[2] = b_ih[2];
    bias[3] = b_hh[2];
  }

  static SK_DEVICE void forward(const float* a, float& h, float&, float* saved, bool) {
    const float r = sigmoid(a[0]), z = sigmoid(a[1]);
    const float n = device::tanh(a[2] + r * a[3]);
    h = n + z * (h - n);
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = a[3];
  }

  static SK_DEVICE void backward(CellGradient& k, float* dg, bool) {
    const float r = k.saved[0], z = k.saved[1], n = k.saved[2], nh = k.saved[3];
    const float dn = k.dh * (1.0f - z) * (1.0f - n * n);
    dg[0] = dn * nh * r * (1.0f - r);
    dg[1] = k.dh * (k.h_prev - n) * z * (1.0f - z);
    dg[2] = dn;
    dg[3] = dn * r;
    k.dh *= z;
  }
};

// Both Elman cells: which of them is an argument, so that they share their kernels.
template <>
struct Cell<Mode::rnn_tanh> {
  static constexpr int kGates = 1, kColumns = 1, kSaved = 0;
  static constexpr bool kHasC = false, kReadsH = false, kReadsY = true;

  static SK_DEVICE constexpr int column(int) { return 0; }

  static SK_DEVICE void join(const float* gx, const float* gh, const float* bias, float* a) {
    a[0] = gx[0] + gh[0] + bias[0];
  }
  static SK_DEVICE void join_bias(const float* b_ih, const float* b_hh, float* bias) {
    bias[0] = b_ih[0] + b_hh[0];
  }

  static SK_DEVICE void forward(const float* a, float& h, float&, float*, bool relu) {
    // As torch: the larger of a and 0, and NaN stays NaN.
    h = relu ? (a[0] < 0.0f ? 0.0f : a[0]) : device::tanh(a[0]);
  }

  static SK_DEVICE void backward(CellGradient& k, float* dg, bool relu) {
    dg[0] = relu ? (k.y <= 0.0f ? 0.0f : k.dh) : k.dh * (1.0f - k.y * k.y);
    k.dh = 0.0f;
  }
};

}  // namespace seqkern::cuda
