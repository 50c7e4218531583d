// The exchanges of the recurrent kernels by themselves: nanoseconds of a step that does nothing but
// pass on, as one JSON line for each exchange, number of blocks and bytes.
//
//   nvcc -O3 -std=c++17 -arch=sm_90a -Icsrc benchmarks/exchange.cu -o exchange && ./exchange
//
// "bytes" is what every block has after a step: eight rows of h, or of the gradients of four gates;
// in the backward of a cluster it is what it gets, the parts of its units' dh from all members. An
// exchange whose blocks the device cannot run together is not launched, and its line says so.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "core/cuda/exchange.cuh"
#include "core/cuda/scatter.cuh"

using namespace seqkern;
using namespace seqkern::cuda;

namespace {

constexpr int kWarmUp = 100, kSteps = 5000, kRepeats = 5;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "exchange: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Every warp sends its parts for all members `steps` times, and every block adds up what it gets.
SK_KERNEL(Cluster::kWarps * 32)
scatter_steps(const Sequence s, int64_t steps, int* wrong) {
  if constexpr (Cluster::kExists) {
    const Plan& plan = s.plan;
    const Part& part = plan.parts[device::thread_index() / 32];
    const float mine = float(1 + device::block_x());
    const Cluster exchange(s, device::shared_memory());
    exchange.prepare();
    float total = 0.0f;
    for (int step = 1; step <= steps; ++step) {
      device::sync_threads();
      Outputs outputs(plan, part);
      for (int i = 0; i < kPair * part.count; ++i) {
        float sums[4] = {mine, mine, mine, mine};
        outputs.send(exchange, step, sums);
      }
      exchange.await(step);
      total = 0.0f;
      for (int member = 0; member < plan.members; ++member)
        total += exchange.part(step, member, part.group, part.split % 4);
    }
    if (total != float(plan.members * (plan.members + 1) / 2)) atomicAdd(wrong, 1);
  }
}

// Every block fills the columns of its own units with its number, passes them on `steps` times, and
// counts the values that it does not have in the end.
template <class X, int R>
SK_KERNEL(X::kWarps * 32)
exchange_steps(const Sequence s, int64_t steps, int* wrong) {
  if constexpr (X::kExists) {
    const Plan& plan = s.plan;
    const int thread = device::thread_index(), threads = device::thread_count();
    bf16* const copies = reinterpret_cast<bf16*>(device::shared_memory());
    const int copy = kSliceRows * plan.row, all = kSliceRows * R * plan.depth;
    auto at = [&](int i) { return i / (R * plan.depth) * plan.row + i % (R * plan.depth); };
    auto owner = [&](int i) { return i % plan.depth / plan.units; };
    const int me = plan.members > 1 ? device::block_x() : 0;
    for (int i = thread; i < all; i += threads)
      for (int c = 0; c < X::kCopies; ++c)
        device::store(copies + c * copy + at(i), bf16{uint16_t(owner(i) == me ? 1 + me : 0)});
    const X exchange(s, device::shared_memory());
    device::sync_threads();
    exchange.prepare();
    for (int step = 1; step <= steps; ++step) {
      device::sync_threads();
      if constexpr (X::kParts) {
        exchange.template send<bf16, R>(copies + step % X::kCopies * copy, step);
        exchange.template receive<bf16, R>(copies + step % X::kCopies * copy, step);
      }
    }
    device::sync_threads();
    const bf16* const last = copies + steps % X::kCopies * copy;
    for (int i = thread; i < all; i += threads)
      if (device::load(last + at(i)).bits != 1 + owner(i)) atomicAdd(wrong, 1);
  }
}

// One slice of a layer of LSTM cells in bf16, without what else stands in shared memory.
Sequence sequence(Skeleton skeleton, int members, int groups, bool backward) {
  Sequence s{};
  const int64_t H = int64_t(members) * groups * kWarpUnits;
  s.plan = plan_of(skeleton, Mode::lstm, Type::bf16, H, backward, groups);
  s.plan.weights = 0;
  s.plan.shared = s.plan.states + (skeleton == Skeleton::cluster ? 2 * sizeof(uint64_t) : 0);
  if (skeleton == Skeleton::cluster && backward) s.plan.shared += s.plan.partials;
  s.B = kSliceRows, s.H = H, s.D = 1, s.slices = 1;
  return s;
}

struct Bench {
  const char* name;
  const void* kernel;
  Sequence s;
  int* wrong;
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  // Why the blocks cannot run together, or null.
  const char* set_up() {
    const Plan& plan = s.plan;
    config.gridDim = dim3(unsigned(plan.members));
    config.blockDim = dim3(unsigned(plan.warps * 32));
    config.dynamicSmemBytes = size_t(plan.shared);
    config.attrs = &attribute;
    cudaDeviceProp device;
    check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared));
    int room = 1;
    if (plan.skeleton == Skeleton::cluster) {
      cudaFuncAttributes compiled{};
      check(cudaFuncGetAttributes(&compiled, kernel), "cudaFuncGetAttributes");
      // Compiled for older cards alone, the kernel has no body.
      if (device.major < 9 || compiled.ptxVersion < 90) return "no clusters";
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {unsigned(plan.members), 1, 1};
      config.numAttrs = 1;
      if (error == cudaSuccess && plan.members > 8)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&room, kernel, &config);
    } else if (plan.skeleton == Skeleton::grid) {
      if (!device.cooperativeLaunch) return "no cooperative launches";
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
      config.numAttrs = 1;
      if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&room, kernel, plan.warps * 32,
                                                              size_t(plan.shared));
      room = room * device.multiProcessorCount / plan.members;
    }
    if (error == cudaSuccess) return room > 0 ? nullptr : "not all blocks run at the same time";
    cudaGetLastError();  // the refusal is the answer
    return cudaGetErrorString(error);
  }

  float milliseconds(int64_t steps) {
    cudaEvent_t start, end;
    check(cudaEventCreate(&start), "cudaEventCreate");
    check(cudaEventCreate(&end), "cudaEventCreate");
    if (s.words) check(cudaMemset(s.words, 0, size_t(s.plan.words) * 8), "cudaMemset");
    check(cudaMemset(wrong, 0, sizeof(int)), "cudaMemset");
    void* arguments[] = {&s, &steps, &wrong};
    check(cudaEventRecord(start), "cudaEventRecord");
    check(cudaLaunchKernelExC(&config, kernel, arguments), "cudaLaunchKernelExC");
    check(cudaEventRecord(end), "cudaEventRecord");
    check(cudaEventSynchronize(end), name);
    float elapsed = 0;
    check(cudaEventElapsedTime(&elapsed, start, end), "cudaEventElapsedTime");
    check(cudaEventDestroy(start), "cudaEventDestroy");
    check(cudaEventDestroy(end), "cudaEventDestroy");
    int count = 0;
    check(cudaMemcpy(&count, wrong, sizeof(int), cudaMemcpyDeviceToHost), "cudaMemcpy");
    if (count == 0) return elapsed;
    std::fprintf(stderr, "exchange: %s of %d: %d values did not arrive\n", name, s.plan.members,
                 count);
    std::exit(1);
  }

  double nanoseconds_per_step() {
    if (s.plan.words) check(cudaMalloc(&s.words, size_t(s.plan.words) * 8), "cudaMalloc");
    milliseconds(kWarmUp);
    std::vector<float> times;
    for (int i = 0; i < kRepeats; ++i) times.push_back(milliseconds(kSteps));
    std::sort(times.begin(), times.end());
    check(cudaFree(s.words), "cudaFree");
    return 1e6 * times[kRepeats / 2] / kSteps;
  }

  // Prints once all is known, so that a failure leaves no half a line.
  void run(int R) {
    const char* refusal = set_up();
    const double nanoseconds = refusal ? 0 : nanoseconds_per_step();
    const bool parts = s.plan.skeleton == Skeleton::cluster && R > 1;
    const long long bytes = parts ? s.plan.arriving : (long long)(kSliceRows)*R * s.plan.depth * 2;
    std::printf("{\"exchange\": \"%s\", \"members\": %d, \"bytes\": %lld, ", name, s.plan.members,
                bytes);
    if (refusal)
      std::printf("\"refused\": \"%s\"}\n", refusal);
    else
      std::printf("\"ns_per_step\": %.1f}\n", nanoseconds);
    std::fflush(stdout);
  }
};

template <class X>
void run_all(const char* name, Skeleton skeleton, const std::vector<int>& members,
             const std::vector<int>& each, int* wrong) {
  for (int n : members)
    for (int groups : each) {
      const auto forward = reinterpret_cast<const void*>(&exchange_steps<X, 1>);
      const void* backward = nullptr;
      if constexpr (X::kScatters)
        backward = reinterpret_cast<const void*>(&scatter_steps);
      else
        backward = reinterpret_cast<const void*>(&exchange_steps<X, 4>);
      Bench{name, forward, sequence(skeleton, n, groups, false), wrong}.run(1);
      Bench{name, backward, sequence(skeleton, n, groups, true), wrong}.run(4);
    }
}

}  // namespace

int main() {
  int device = 0, blocks = 0, *wrong = nullptr;
  check(cudaGetDevice(&device), "no CUDA device");
  check(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device), "blocks");
  check(cudaMalloc(&wrong, sizeof(int)), "cudaMalloc");
  run_all<Alone>("block", Skeleton::block, {1}, {4, 8, 12}, wrong);
  run_all<Cluster>("cluster", Skeleton::cluster, {2, 4, 8, 16}, {1, 2, 4}, wrong);
  run_all<Grid>("grid", Skeleton::grid, {8, 16, 32, 64, std::min(128, blocks)}, {1, 2, 4}, wrong);
  check(cudaFree(wrong), "cudaFree");
  return 0;
}
