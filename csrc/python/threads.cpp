#include "python/threads.h"

#include <dlfcn.h>
#include <pthread.h>
#include <pybind11/pybind11.h>

#include <system_error>
#include <thread>
#include <vector>

namespace py = pybind11;

namespace gradclip::python {
namespace {

// torch's thread pool, found in the process: torch's library is loaded long before this one, and
// nothing here is linked to it. A pool of our own would compete with torch's for the cores.

/// torch >= 2.10: calls body(begin, end, context) on several threads, whatever pool torch was built
/// with (torch/csrc/stable/c/shim.h). Returns 0.
using TorchParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain_size,
                                 void (*body)(int64_t, int64_t, void*), void* context);
/// Older ones: GNU's OpenMP, which torch's wheels bring and are linked to.
using GompParallel = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);

TorchParallelFor torch_parallel_for = nullptr;
GompParallel gomp_parallel = nullptr;

/// Whether this process was forked: the threads of GNU's OpenMP stay behind in the parent, and the
/// pool would wait for them forever.
bool forked = false;

struct Work {
  void (*call)(void*);
  void* context;
};

void run_on_torch_threads(int64_t workers, void (*call)(void*), void* context) {
  Work work{call, context};
  const auto body = [](int64_t, int64_t, void* w) {
    static_cast<Work*>(w)->call(static_cast<Work*>(w)->context);
  };
  torch_parallel_for(0, workers, 1, body, &work);
}

void run_on_openmp_threads(int64_t workers, void (*call)(void*), void* context) {
  gomp_parallel(call, context, static_cast<unsigned>(workers), 0);
}

void run_on_new_threads(int64_t workers, void (*call)(void*), void* context) {
  std::vector<std::thread> threads;
  try {
    for (int64_t i = 1; i < workers; ++i) threads.emplace_back(call, context);
  } catch (const std::system_error&) {  // the system allows no more
  }
  call(context);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

cpu::Threads threads_for(const TensorList& list) {
  int64_t most = 1;
  if (list.bytes() > cpu::kSerialBytes) {
    most = py::module_::import("torch").attr("get_num_threads")().cast<int64_t>();
  }
  if (forked) return {most, run_on_new_threads};
  if (torch_parallel_for != nullptr) return {most, run_on_torch_threads};
  return {most, gomp_parallel != nullptr ? run_on_openmp_threads : run_on_new_threads};
}

void prepare_threads() {
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
#if defined(__APPLE__)
  void* torch = dlopen("@rpath/libtorch_cpu.dylib", RTLD_NOLOAD | RTLD_LAZY);
#else
  void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
#endif
  if (torch == nullptr) return;
  torch_parallel_for = reinterpret_cast<TorchParallelFor>(dlsym(torch, "torch_parallel_for"));
  // Found among the libraries that torch is linked to.
  gomp_parallel = reinterpret_cast<GompParallel>(dlsym(torch, "GOMP_parallel"));
}

}  // namespace gradclip::python
