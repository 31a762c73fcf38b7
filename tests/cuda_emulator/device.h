// The state of the emulated CUDA runtime: streams, events, graphs and memory.
//
// A stream runs its work only when a caller waits for it, so that code that reads a result too
// early reads the old values. One lock, `everything`, protects all of this state.

#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

constexpr int kDevices = 2;
constexpr size_t kDeviceBytes = size_t{4} << 30;

// No global is ever destroyed: torch still calls the runtime while the process ends.
inline auto& everything = *new std::recursive_mutex;

// ---------------------------------------------------------------- errors

inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t fail(cudaError_t error) { return last_error = error; }

/// Ends the process: for calls that are errors, or that the emulator does not support.
[[noreturn]] inline void stop(const std::string& why) {
  std::fprintf(stderr, "emulated CUDA runtime: %s\n", why.c_str());
  std::abort();
}

// ---------------------------------------------------------------- streams, events, graphs

using Task = std::function<void()>;

struct Graph {
  std::vector<Task> nodes;
};

struct Stream {
  int device;
  std::deque<Task> queue;
  uint64_t enqueued = 0, done = 0;
  Graph* capture = nullptr;
  uint64_t capture_id = 0;
  bool invalidated = false;  // a call was made that a capture does not allow
};

using Clock = std::chrono::steady_clock;

/// A point in a stream's queue; `stream` is null before the event is recorded.
struct Event {
  Stream* stream = nullptr;
  uint64_t after = 0;
  bool captured = false;
  std::shared_ptr<Clock::time_point> reached = std::make_shared<Clock::time_point>();
};

inline auto& streams = *new std::vector<Stream*>;
/// The driver's current context, -1 without one; and the device that torch's runtime has chosen,
/// which is the current device if there is no context. Context d is the primary one of device d,
/// kDevices + d a green one, with a default stream of its own.
constexpr int kContexts = 2 * kDevices;
inline thread_local int context = -1, chosen_device = 0;
inline thread_local cudaStreamCaptureMode thread_capture_mode = cudaStreamCaptureModeGlobal;

inline int current_device() { return context >= 0 ? context % kDevices : chosen_device; }

inline Stream* new_stream(int device) {
  streams.push_back(new Stream{device});
  return streams.back();
}

inline Stream* stream_of(cudaStream_t handle) {
  static Stream* const defaults[kContexts] = {new_stream(0), new_stream(1), new_stream(0),
                                              new_stream(1)};
  const bool is_default = reinterpret_cast<uintptr_t>(handle) <= 2;  // null, legacy, per thread
  return is_default ? defaults[context >= 0 ? context : chosen_device]
                    : reinterpret_cast<Stream*>(handle);
}

inline void run_until(Stream* stream, uint64_t after) {
  while (stream->done < after) {
    const Task task = std::move(stream->queue.front());
    stream->queue.pop_front();
    task();
    ++stream->done;
  }
}

inline void run(Stream* stream) { run_until(stream, stream->enqueued); }

inline void run_device(int device) {
  for (size_t i = 0; i < streams.size(); ++i) {
    if (streams[i]->device == device) run(streams[i]);
  }
}

inline cudaError_t enqueue(Stream* stream, Task task) {
  if (stream->capture != nullptr) {
    stream->capture->nodes.push_back(std::move(task));
  } else {
    stream->queue.push_back(std::move(task));
    ++stream->enqueued;
  }
  return cudaSuccess;
}

/// Fails a call that is not allowed during a capture, and invalidates the capture, unless the
/// calling thread is in relaxed mode. Stricter than CUDA: captures of all threads count.
inline cudaError_t unsafe_in_capture() {
  if (thread_capture_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  for (Stream* stream : streams) {
    if (stream->capture == nullptr) continue;
    stream->invalidated = true;
    error = fail(cudaErrorStreamCaptureUnsupported);
  }
  return error;
}

// ---------------------------------------------------------------- memory

constexpr int kHost = -1;  // the device of page-locked memory

struct Memory {
  size_t bytes;
  int device;
};

inline auto& memories = *new std::map<uintptr_t, Memory>;
inline size_t allocated[kDevices] = {};

/// Returns the allocation that holds all of [address, address + bytes); null for pageable memory.
inline const Memory* memory_at(const void* address, size_t bytes = 1) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  auto found = memories.upper_bound(begin);
  if (found == memories.begin()) return nullptr;
  --found;
  return begin + bytes <= found->first + found->second.bytes ? &found->second : nullptr;
}

constexpr size_t kGuardBytes = 64;  // after every allocation; checked when it is freed
constexpr int kNan = 0xff;          // bytes of a NaN in every type

inline cudaError_t allocate(void** address, size_t bytes, int device) {
  const size_t rounded = (bytes + kGuardBytes + 511) / 512 * 512;
  *address = std::aligned_alloc(512, rounded);
  if (*address == nullptr) return fail(cudaErrorMemoryAllocation);
  std::memset(*address, kNan, rounded);
  memories[reinterpret_cast<uintptr_t>(*address)] = {bytes, device};
  return cudaSuccess;
}

/// Frees memory. Runs all enqueued work first, as cudaFree does.
inline cudaError_t release(void* address) {
  if (address == nullptr) return cudaSuccess;
  for (int device = 0; device < kDevices; ++device) run_device(device);
  const auto found = memories.find(reinterpret_cast<uintptr_t>(address));
  if (found == memories.end()) return fail(cudaErrorInvalidValue);
  const auto [bytes, device] = found->second;
  const auto* guard = static_cast<const unsigned char*>(address) + bytes;
  if (!std::all_of(guard, guard + kGuardBytes, [](unsigned char byte) { return byte == kNan; })) {
    stop("a kernel wrote past the end of an allocation");
  }
  if (device != kHost) allocated[device] -= bytes;
  std::memset(address, kNan, bytes);
  memories.erase(found);
  std::free(address);
  return cudaSuccess;
}

/// Copies memory. Pageable memory is read at once, or written before the call returns; everything
/// else happens in stream order.
inline cudaError_t copy(void* to, const void* from, size_t bytes, Stream* stream) {
  const bool from_pageable = memory_at(from) == nullptr, to_pageable = memory_at(to) == nullptr;
  if (stream->capture != nullptr && (from_pageable || to_pageable)) {
    stream->invalidated = true;
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  if (from_pageable) {
    const auto* begin = static_cast<const char*>(from);
    const auto staged = std::make_shared<std::vector<char>>(begin, begin + bytes);
    enqueue(stream, [=] { std::memcpy(to, staged->data(), bytes); });
  } else {
    enqueue(stream, [=] { std::memmove(to, from, bytes); });
  }
  if (to_pageable) run(stream);
  return cudaSuccess;
}

}  // namespace emulator
