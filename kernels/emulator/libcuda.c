// A stand-in for libcuda: a GPU of compute capability 9.0 or 8.0 whose launches are handed to a callback, if there is one.
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
  if (callback) callback((uint64_t)function, launch->gridX, launch->gridY, launch->gridZ, launch->blockX, launch->shared, arguments);
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
  *version = 13020; // of an older one Triton mends tensor maps, bit by bit
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

// A tensor map in a form of the emulator's own; `tensormaps.py` reads it.
typedef struct {
  uint64_t mark, base, sizes[5], strides[4];
  uint16_t box[5];
  uint8_t rank, type, swizzle, nan;
} TensorMap;
_Static_assert(sizeof(TensorMap) <= 128, "a tensor map has 128 bytes");

Result cuTensorMapEncodeTiled(TensorMap *map, int type, unsigned rank, uint64_t base, const uint64_t *sizes,
                              const uint64_t *strides, const unsigned *box, const unsigned *steps, int interleave,
                              int swizzle, int promotion, int fill) {
  static const uint8_t bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const unsigned widths[] = {65536, 32, 64, 128}; // of a row, by the swizzle
  if (rank < 1 || rank > 5 || type < 0 || type > 12 || swizzle < 0 || swizzle > 3 || interleave || base % 16) return 1;
  *map = (TensorMap){.mark = 0x50414D524F534E54, .base = base, .rank = rank, .type = type, .swizzle = swizzle};
  map->nan = fill;
  for (unsigned i = 0; i < rank; i++) {
    if (!sizes[i] || sizes[i] > 1ull << 32 || !box[i] || box[i] > 256 || steps[i] != 1) return 1;
    if (i && (strides[i - 1] % 16 || strides[i - 1] >= 1ull << 40)) return 1;
    map->sizes[i] = sizes[i];
    map->box[i] = box[i];
    if (i) map->strides[i - 1] = strides[i - 1];
  }
  unsigned row = box[0] * bytes[type];
  return row % 16 || row > widths[swizzle];
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
REFUSED(cuTensorMapEncodeIm2col)
REFUSED(cuOccupancyMaxActiveClusters)
REFUSED(cuLaunchCooperativeKernel)
