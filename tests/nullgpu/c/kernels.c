/* Kernels: each is counted under its name, and none runs.
 *
 * nvcc's code registers every kernel of a library when it is loaded: the address of the host function that launches it,
 * and its name. A launch gives that address.
 */
#include "nullgpu.h"
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct kernel { const void *function; const char *name; long launches; };

static struct kernel *kernels;
static int known, room;

/* A hash table from addresses to places in `kernels`, plus one; torch has about 50,000 of them. */
enum { SLOTS = 1 << 20 };
static int slots[SLOTS];

static int slot_of(const void *function) {
    uint64_t hash = (uint64_t)function * 0x9e3779b97f4a7c15u;
    int slot = (int)(hash >> 44);
    while (slots[slot] && kernels[slots[slot] - 1].function != function) slot = (slot + 1) % SLOTS;
    return slot;
}

static void add_kernel(const void *function, const char *name) {
    if (known == room) kernels = realloc(kernels, (room = room ? 2 * room : 1 << 16) * sizeof *kernels);
    int slot = slot_of(function);
    kernels[known] = (struct kernel){function, name, 0};
    slots[slot] = ++known;
}

static cudaError_t launch(const void *function) {
    count(&nullgpu_counters.launches, 1);
    int place = slots[slot_of(function)];
    if (place) count(&kernels[place - 1].launches, 1);
    return cudaSuccess;
}

/* Kernel number `place` for Python: 0 after the last. */
PUBLIC int nullgpu_kernel(int place, const char **name, long *launches) {
    if (place >= known) return 0;
    *name = kernels[place].name;
    *launches = kernels[place].launches;
    return 1;
}

PUBLIC void nullgpu_reset_kernels(void) {
    for (int place = 0; place < known; place++) kernels[place].launches = 0;
}

/* What nvcc's host code calls. */
PUBLIC void **__cudaRegisterFatBinary(void *binary) { return new_handle(); }
PUBLIC void __cudaRegisterFatBinaryEnd(void **handle) {}
PUBLIC void __cudaUnregisterFatBinary(void **handle) {}
PUBLIC void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t size,
                              int constant, int global) {}

PUBLIC void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit,
                                   uint3 *thread, uint3 *block, dim3 *block_size, dim3 *grid_size, int *warp_size) {
    add_kernel(host, name);
}

struct configuration { dim3 grid, block; size_t shared; void *stream; };
static __thread struct configuration stack[16];
static __thread int depth;

PUBLIC unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    stack[depth++] = (struct configuration){grid, block, shared, stream};
    return 0;
}

PUBLIC cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    struct configuration top = stack[--depth];
    *grid = top.grid, *block = top.block, *shared = top.shared, *(void **)stream = top.stream;
    return cudaSuccess;
}

PUBLIC cudaError_t __cudaGetKernel(cudaKernel_t *found, const void *function) {
    *found = (cudaKernel_t)function;
    return cudaSuccess;
}

PUBLIC cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                    cudaStream_t stream) {
    return launch(function);
}

PUBLIC cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                      cudaStream_t stream) {
    return launch((const void *)kernel);
}

PUBLIC cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                                               size_t shared, cudaStream_t stream) {
    return launch(function);
}

PUBLIC cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *function, void **arguments) {
    return launch(function);
}

/* Figures by which launches are sized. */
PUBLIC cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *of, const void *function) {
    memset(of, 0, sizeof *of);
    of->maxThreadsPerBlock = 1024;
    of->numRegs = 64;
    of->binaryVersion = of->ptxVersion = capability();
    of->maxDynamicSharedSizeBytes = 232448;
    return cudaSuccess;
}

PUBLIC cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads,
                                                                 size_t shared) {
    *blocks = 2;
    return cudaSuccess;
}

PUBLIC cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function,
                                                                          int threads, size_t shared, unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}

PUBLIC cudaError_t cudaGetSymbolAddress(void **found, const void *symbol) {
    static char variable[1 << 16]; /* stands for every variable of the device */
    *found = variable;
    return cudaSuccess;
}
