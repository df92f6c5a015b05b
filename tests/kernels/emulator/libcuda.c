// A stand-in for libcuda: a GPU of compute capability 9.0 or 8.0 whose launches are handed to a callback.
#include <stddef.h>
#include <stdint.h>

typedef int Result;
typedef void *Pointer;
typedef struct {
  unsigned gridX, gridY, gridZ, blockX, blockY, blockZ, shared;
  Pointer stream, attributes;
  unsigned count;
} Launch;
typedef void (*Callback)(uint64_t function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared,
                         Pointer *arguments);

static Callback callback;
static uint64_t modules;

void emulator_set_callback(Callback given) { callback = given; }

Result cuLaunchKernelEx(const Launch *launch, Pointer function, Pointer *arguments, Pointer *extra) {
  if (!callback) return 1;
  callback((uint64_t)function, launch->gridX, launch->gridY, launch->gridZ, launch->blockX, launch->shared, arguments);
  return 0;
}

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 81: *value = 233472; break; // shared memory of a multiprocessor, and what a block may opt into
  case 97: *value = 232448; break;
  default: *value = 132;
  }
  return 0;
}
Result cuFuncGetAttribute(int *value, int attribute, Pointer function) {
  *value = attribute == 0 ? 1024 : 0; // the most threads of a block
  return 0;
}
Result cuModuleLoadData(Pointer *module, const void *image) {
  *module = (Pointer)(++modules);
  return 0;
}
Result cuModuleGetFunction(Pointer *function, Pointer module, const char *name) {
  *function = module;
  return 0;
}
Result cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t address) {
  *value = address; // of the host: tensors lie there
  return 0;
}
Result cuGetErrorString(Result error, const char **text) {
  *text = "not emulated";
  return 0;
}
Result cuDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}
Result cuCtxGetLimit(size_t *size, int limit) {
  *size = 0;
  return 0;
}
Result cuGetProcAddress(const char *name, Pointer *function, int version, uint64_t flags) {
  *function = NULL;
  return 500; // not found
}
Result cuGetProcAddress_v2(const char *name, Pointer *function, int version, uint64_t flags, int *status) {
  *function = NULL;
  return 500;
}

#define CONTEXT(name, ...)                                                                                             \
  Result name(Pointer *context, ##__VA_ARGS__) {                                                                       \
    *context = (Pointer)8;                                                                                             \
    return 0;                                                                                                          \
  }
CONTEXT(cuCtxGetCurrent)
CONTEXT(cuDevicePrimaryCtxRetain, int device)
CONTEXT(cuDevicePrimaryCtxRetain_v2, int device)

#define DEVICE(name, ...)                                                                                              \
  Result name(int *device, ##__VA_ARGS__) {                                                                            \
    *device = 0;                                                                                                       \
    return 0;                                                                                                          \
  }
DEVICE(cuDeviceGet, int ordinal)
DEVICE(cuCtxGetDevice)
DEVICE(cuDeviceGetCount)

#define NOTHING(name)                                                                                                  \
  Result name() { return 0; }
NOTHING(cuInit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuModuleUnload)

#define REFUSED(name)                                                                                                  \
  Result name() { return 801; }
REFUSED(cuTensorMapEncodeTiled)
REFUSED(cuTensorMapEncodeIm2col)
REFUSED(cuOccupancyMaxActiveClusters)
REFUSED(cuLaunchCooperativeKernel)
