// A libcuda.so.1 that accepts what Triton asks of it and launches nothing: it counts launches and tells a listener.
#include <stdint.h>
#include <stdlib.h>

typedef int Result; // 0 is success

// As in cuda.h, CUlaunchConfig.
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned attribute_count;
} LaunchConfig;

typedef void (*Listener)(void *function, const LaunchConfig *config, void **parameters);

static long long launches = 0;
static Listener listener = 0;
static int major_capability = 9, minor_capability = 0, shared_memory = 232448;
static long context;

long long stub_launches(void) { return launches; }
void stub_listen(Listener new_listener) { listener = new_listener; }
void stub_choose(int major, int minor, int shared) {
  major_capability = major, minor_capability = minor, shared_memory = shared;
}

Result cuLaunchKernelEx(const LaunchConfig *config, void *function, void **parameters, void **extra) {
  ++launches;
  if (listener)
    listener(function, config, parameters);
  return 0;
}

// Each kernel that is loaded has a handle of its own.
Result cuModuleLoadData(void **module, const void *image) { return *module = malloc(1), 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) { return *function = malloc(1), 0; }
Result cuFuncGetAttribute(int *value, int attribute, void *function) {
  return *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0, 0; // threads of a block, registers
}

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 10: *value = 32; break;                    // threads of a warp
  case 16: *value = 132; break;                   // multiprocessors
  case 75: *value = major_capability; break;
  case 76: *value = minor_capability; break;
  case 81: *value = shared_memory + 1024; break;  // of a multiprocessor
  case 97: *value = shared_memory; break;         // of a block
  default: *value = 65536;
  }
  return 0;
}

Result cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { return *(uint64_t *)data = pointer, 0; }
Result cuCtxGetCurrent(void **current) { return *current = &context, 0; }
Result cuDevicePrimaryCtxRetain(void **retained, int device) { return *retained = &context, 0; }
Result cuDeviceGet(int *device, int number) { return *device = number, 0; }
Result cuCtxGetDevice(int *device) { return *device = 0, 0; }
Result cuStreamIsCapturing(void *stream, int *status) { return *status = 0, 0; }
Result cuCtxGetLimit(size_t *size, int limit) { return *size = 1 << 20, 0; }
Result cuGetErrorString(int code, const char **text) { return *text = "an error that the stub never makes", 0; }
Result cuDriverGetVersion(int *version) { return *version = 13000, 0; }
Result cuOccupancyMaxActiveClusters(int *count) { return *count = 1, 0; }
Result cuLaunchKernel(void) { return ++launches, 0; }
Result cuInit(unsigned flags) { return 0; }
Result cuModuleUnload(void *module) { return 0; }
Result cuFuncSetAttribute(void) { return 0; }
Result cuFuncSetCacheConfig(void) { return 0; }
Result cuCtxSetCurrent(void *current) { return 0; }
Result cuCtxSetLimit(void) { return 0; }
Result cuTensorMapEncodeTiled(void) { return 0; }
Result cuTensorMapEncodeIm2col(void) { return 0; }
