// A CUDA runtime and driver for machines without a GPU. If it is preloaded, a torch that was built
// for CUDA runs the package's host code unchanged: streams, events, graph capture, device guards,
// allocation. Device memory is host memory, and the package's kernels run in the emulator. The
// launch of any other kernel ends the process with its name (see sitecustomize.py).

#include "launches.h"

#define LOCKED const std::lock_guard<std::recursive_mutex> locked(emulator::everything)

using namespace emulator;

namespace {

constexpr int kMultiprocessors = 4;

struct Variable {
  void* address[kDevices];
};

auto& variables = *new std::map<const void*, Variable>;

std::map<std::string, std::pair<int, cudaError_t>> failures;  // how many more calls have to fail

/// The error with which this call has to fail; see cudaEmulatorFail().
cudaError_t wanted_failure(const char* function) {
  const auto found = failures.find(function);
  if (found == failures.end() || found->second.first == 0) return cudaSuccess;
  --found->second.first;
  return fail(found->second.second);
}

int not_supported() { return 801; }  // CUDA_ERROR_NOT_SUPPORTED

char contexts[kContexts];

thread_local std::vector<std::tuple<dim3, dim3, size_t, cudaStream_t>> configurations;

}  // namespace

extern "C" {

/// For tests: the next `times` calls of a function fail with this error.
void cudaEmulatorFail(const char* function, int times, int error) {
  LOCKED;
  failures[function] = {times, static_cast<cudaError_t>(error)};
}

/// For tests: makes a device's green context the current one, or its primary one.
void cudaEmulatorSetGreen(int device, bool green) { context = green ? kDevices + device : device; }

// ---------------------------------------------------------------- code

void** __cudaRegisterFatBinary(void*) { return new void*[1](); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  LOCKED;
  kernels[host] = {name, launch_of(name)};
}
void __cudaRegisterVar(void**, char* host, char*, const char*, int, size_t bytes, int, int) {
  LOCKED;
  for (void*& address : variables[host].address) address = std::calloc(1, bytes);
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 threads, size_t shared, cudaStream_t stream) {
  configurations.emplace_back(grid, threads, shared, stream);
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* threads, size_t* shared, void* stream) {
  std::tie(*grid, *threads, *shared, *static_cast<cudaStream_t*>(stream)) = configurations.back();
  configurations.pop_back();
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 threads, void** arguments,
                               size_t, cudaStream_t stream) {
  LOCKED;
  return launch(kernel, grid, threads, arguments, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  LOCKED;
  if (const auto error = wanted_failure(__func__)) return error;
  return launch(function, config->gridDim, config->blockDim, arguments, config->stream);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  LOCKED;
  if (const auto error = wanted_failure(__func__)) return error;
  if (const auto error = unsafe_in_capture()) return error;  // it may load code
  if (kernels.count(function) == 0) return fail(cudaErrorInvalidDeviceFunction);
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  LOCKED;
  if (const auto error = wanted_failure(__func__)) return error;
  if (const auto error = unsafe_in_capture()) return error;  // it may load code
  *address = variables.at(symbol).address[current_device()];
  return cudaSuccess;
}

// ---------------------------------------------------------------- errors and versions

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  static thread_local std::string text;
  text = "emulated CUDA error " + std::to_string(error);
  return text.c_str();
}
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  *function = reinterpret_cast<void*>(not_supported);
  if (status != nullptr) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// The functions of the driver that torch and the package call. A context is the address of its
// entry in `contexts`.
int cuCtxGetCurrent(void** current) {
  *current = context < 0 ? nullptr : &contexts[context];
  return 0;
}
int cuCtxSetCurrent(void* wanted) {
  context = wanted == nullptr ? -1 : static_cast<int>(static_cast<char*>(wanted) - contexts);
  return 0;
}
int cuCtxGetDevice(int* device) {
  *device = current_device();
  return context < 0 ? 201 : 0;  // CUDA_ERROR_INVALID_CONTEXT
}
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}

// ---------------------------------------------------------------- devices

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device();
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  LOCKED;
  if (const auto error = wanted_failure(__func__)) return error;
  if (device < 0 || device >= kDevices) return fail(cudaErrorInvalidDevice);
  context = device;
  // The package has a runtime of its own, which does not change the device of torch's runtime.
  Dl_info caller;
  const bool found = dladdr(__builtin_return_address(0), &caller) != 0;
  if (!found || std::strstr(caller.dli_fname, "gradclip_ext/_C") == nullptr) chosen_device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  LOCKED;
  if (const auto error = unsafe_in_capture()) return error;
  run_device(current_device());
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "Emulated GPU");
  properties->major = 9;
  properties->totalGlobalMem = kDeviceBytes;
  properties->multiProcessorCount = kMultiprocessors;
  properties->warpSize = kWarp;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? kMultiprocessors
           : attribute == cudaDevAttrComputeCapabilityMajor ? 9
                                                            : 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}

// ---------------------------------------------------------------- memory

cudaError_t cudaMalloc(void** address, size_t bytes) {
  LOCKED;
  if (const auto error = unsafe_in_capture()) return error;
  size_t& used = allocated[current_device()];
  if (used + bytes > kDeviceBytes) return fail(cudaErrorMemoryAllocation);
  used += bytes;
  return allocate(address, bytes, current_device());
}
cudaError_t cudaFree(void* address) {
  LOCKED;
  if (const auto error = unsafe_in_capture()) return error;
  return release(address);
}
cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  LOCKED;
  return allocate(address, bytes, kHost);
}
cudaError_t cudaFreeHost(void* address) {
  LOCKED;
  return release(address);
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = kDeviceBytes;
  *free = kDeviceBytes - allocated[current_device()];
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  LOCKED;
  const Memory* memory = memory_at(address);
  *attributes = {};
  attributes->devicePointer = attributes->hostPointer = const_cast<void*>(address);
  attributes->type = cudaMemoryTypeUnregistered;
  if (memory == nullptr) return cudaSuccess;
  attributes->type = memory->device == kHost ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  attributes->device = memory->device == kHost ? 0 : memory->device;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  LOCKED;
  return copy(to, from, bytes, stream_of(stream));
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream) {
  LOCKED;
  if (const auto error = wanted_failure(__func__)) return error;
  return enqueue(stream_of(stream), [=] { std::memset(address, value, bytes); });
}

// ---------------------------------------------------------------- streams

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  LOCKED;
  *stream = reinterpret_cast<cudaStream_t>(new_stream(current_device()));
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  LOCKED;
  if (const auto error = unsafe_in_capture()) return error;
  const Stream* stream = stream_of(handle);
  return stream->done == stream->enqueued ? cudaSuccess : fail(cudaErrorNotReady);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  LOCKED;
  if (const auto error = unsafe_in_capture()) return error;
  if (stream_of(stream)->capture != nullptr) return fail(cudaErrorStreamCaptureUnsupported);
  run(stream_of(stream));
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  LOCKED;
  const Event event = *reinterpret_cast<Event*>(event_handle);
  if (event.stream == nullptr || event.stream == stream_of(handle)) return cudaSuccess;
  if (event.captured) stop("there is no emulation of captures of several streams");
  return enqueue(stream_of(handle), [=] { run_until(event.stream, event.after); });
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  LOCKED;
  return enqueue(stream_of(stream), [=] { function(data); });
}

// ---------------------------------------------------------------- events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned) {
  LOCKED;
  Event recorded;
  recorded.stream = stream_of(handle);
  recorded.captured = recorded.stream->capture != nullptr;
  enqueue(recorded.stream, [reached = recorded.reached] { *reached = Clock::now(); });
  recorded.after = recorded.stream->enqueued;
  *reinterpret_cast<Event*>(event) = recorded;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  LOCKED;
  if (const auto error = unsafe_in_capture()) return error;
  const Event event = *reinterpret_cast<Event*>(handle);
  const bool reached = event.stream == nullptr || event.stream->done >= event.after;
  return reached ? cudaSuccess : fail(cudaErrorNotReady);
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  LOCKED;
  if (const auto error = unsafe_in_capture()) return error;
  const Event event = *reinterpret_cast<Event*>(handle);
  if (event.stream != nullptr) run_until(event.stream, event.after);
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  LOCKED;
  const Event first = *reinterpret_cast<Event*>(begin), last = *reinterpret_cast<Event*>(end);
  for (const Event& event : {first, last}) {
    if (event.stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
    if (event.stream->done < event.after) return fail(cudaErrorNotReady);
  }
  *milliseconds = std::chrono::duration<float, std::milli>(*last.reached - *first.reached).count();
  return cudaSuccess;
}

// ---------------------------------------------------------------- graphs

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_capture_mode);
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode) {
  LOCKED;
  static uint64_t last_id = 0;
  Stream* stream = stream_of(handle);
  stream->capture = new Graph;
  stream->capture_id = ++last_id;
  stream->invalidated = false;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  LOCKED;
  Stream* stream = stream_of(handle);
  *graph = reinterpret_cast<cudaGraph_t>(std::exchange(stream->capture, nullptr));
  return stream->invalidated ? fail(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  LOCKED;
  if (const auto error = wanted_failure(__func__)) return error;
  const Stream* stream = stream_of(handle);
  *status = stream->capture == nullptr ? cudaStreamCaptureStatusNone
            : stream->invalidated      ? cudaStreamCaptureStatusInvalidated
                                       : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  LOCKED;
  if (id != nullptr) *id = stream_of(stream)->capture_id;
  if (graph != nullptr) *graph = reinterpret_cast<cudaGraph_t>(stream_of(stream)->capture);
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<Graph*>(graph)->nodes.size();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* instance, cudaGraph_t graph,
                                          unsigned long long) {
  *instance = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t instance, cudaStream_t stream) {
  LOCKED;
  for (const Task& node : reinterpret_cast<Graph*>(instance)->nodes) {
    enqueue(stream_of(stream), node);
  }
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t instance) {
  delete reinterpret_cast<Graph*>(instance);
  return cudaSuccess;
}
}
