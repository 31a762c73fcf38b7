// Runs CUDA kernels on the CPU, one block at a time, to test their logic (index arithmetic, tails,
// reductions, barriers) on machines without a GPU. It says nothing about speed.
//
// Every thread of a block is a fiber, and a barrier switches fibers until all threads of its group
// have arrived. If a thread never reaches a barrier, a deadlock is reported. `__shared__` becomes
// `static`, which is correct because blocks run one after the other.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __noinline__
#define __noinline__ __attribute__((noinline))
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

using std::max;
using std::min;

namespace emulator {

constexpr int kBlock = 256, kWarp = 32, kStackBytes = 1 << 17;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Barrier {
  int size = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::vector<char> stack;  // empty until the fiber has started; reused for the next blocks
  bool done = false;
};

struct Block {
  jmp_buf scheduler;
  std::vector<Fiber> fibers = std::vector<Fiber>(kBlock);
  std::function<void()> body;
  Barrier all, warps[kBlock / kWarp];
  uint64_t slots[kBlock];
  uint64_t progress = 0;
};

inline Block block;
inline int current = 0;
inline Index grid, block_index;

/// Leaves the current fiber; returns when the fiber is resumed. Uses _setjmp, because swapcontext
/// makes a system call for every switch.
inline void yield() {
  if (_setjmp(block.fibers[current].resume) == 0) _longjmp(block.scheduler, 1);
}

inline void arrive_and_wait(Barrier& barrier) {
  ++block.progress;
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) yield();
}

inline Barrier& own_warp() { return block.warps[current / kWarp]; }

inline void entry() {
  for (;;) {
    block.body();
    block.fibers[current].done = true;
    ++block.progress;
    yield();
  }
}

/// Lets the current fiber run until it yields.
inline void resume() {
  Fiber& fiber = block.fibers[current];
  if (_setjmp(block.scheduler) != 0) return;
  if (!fiber.stack.empty()) _longjmp(fiber.resume, 1);
  fiber.stack.resize(kStackBytes);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.data();
  fiber.start.uc_stack.ss_size = fiber.stack.size();
  makecontext(&fiber.start, entry, 0);
  setcontext(&fiber.start);
}

/// Runs a warp until all of its threads wait for other warps or are done; returns how many wait.
inline int run_warp(int warp) {
  int waiting = 0;
  for (uint64_t before = ~block.progress; before != block.progress;) {
    before = block.progress;
    waiting = 0;
    for (current = warp * kWarp; current < (warp + 1) * kWarp; ++current) {
      if (block.fibers[current].done) continue;
      ++waiting;
      resume();
    }
  }
  return waiting;
}

/// Runs one block of kBlock threads to its end. Each warp runs as far ahead of the others as it
/// can, a different one first every time, so that a missing barrier leads to a wrong result.
inline void run_block() {
  static int first = 0;
  block.all = {kBlock};
  for (Barrier& warp : block.warps) warp = {kWarp};
  for (Fiber& fiber : block.fibers) fiber.done = false;
  constexpr int kWarps = kBlock / kWarp;
  for (int waiting = kBlock; waiting > 0;) {
    const uint64_t before = block.progress;
    ++first;
    waiting = 0;
    for (int i = 0; i < kWarps; ++i) waiting += run_warp((first + i) % kWarps);
    if (waiting > 0 && block.progress == before) {
      std::fprintf(stderr, "deadlock: %d threads of block %u wait at barriers\n", waiting,
                   block_index.x);
      std::abort();
    }
  }
}

/// Runs the blocks of a launch in the order first, first + 1, ..., last, 0, 1, ..., first - 1.
inline void launch(unsigned blocks, unsigned first, std::function<void()> body) {
  grid.x = blocks;
  block.body = std::move(body);
  for (unsigned i = 0; i < blocks; ++i) {
    block_index.x = (first + i) % blocks;
    run_block();
  }
}

template <typename T>
T exchange(T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  std::memcpy(&block.slots[current], &value, sizeof value);
  arrive_and_wait(own_warp());
  T other;
  std::memcpy(&other, &block.slots[current / kWarp * kWarp + lane], sizeof other);
  arrive_and_wait(own_warp());
  return other;
}

}  // namespace emulator

// ---------------------------------------------------------------- the functions that kernels call

#define threadIdx (emulator::Index{static_cast<unsigned>(emulator::current), 0, 0})
#define blockIdx emulator::block_index
#define gridDim emulator::grid

inline void __syncthreads() { emulator::arrive_and_wait(emulator::block.all); }
inline void __syncwarp() { emulator::arrive_and_wait(emulator::own_warp()); }
inline void __threadfence() {}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int step) {
  return emulator::exchange(value, emulator::current % emulator::kWarp ^ step);
}

inline bool __any_sync(unsigned, bool flag) {
  bool any = false;
  for (int lane = 0; lane < emulator::kWarp; ++lane) any |= emulator::exchange(flag, lane);
  return any;
}

inline unsigned atomicInc(unsigned* address, unsigned limit) {
  const unsigned before = *address;
  *address = before >= limit ? 0 : before + 1;
  return before;
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
