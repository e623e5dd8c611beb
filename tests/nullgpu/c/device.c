/* Devices: how many there are, what they say of themselves, and the counters. */
#include "nullgpu.h"
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

PUBLIC struct counters nullgpu_counters;
PUBLIC void (*nullgpu_on_wait)(const char *what);

void count(long *counter, long by) { __sync_fetch_and_add(counter, by); }

void report_wait(const char *what) {
    void (*tell)(const char *) = __atomic_load_n(&nullgpu_on_wait, __ATOMIC_ACQUIRE); /* another thread may clear it */
    if (tell) tell(what);
}

PUBLIC void nullgpu_reset_counters(void) { memset(&nullgpu_counters, 0, sizeof nullgpu_counters); }

static double setting(const char *name, double otherwise) {
    const char *given = getenv(name);
    return given && *given ? atof(given) : otherwise;
}

size_t total_memory(void) { return (size_t)(setting("NULLGPU_GB", 139.0) * 1e9); }
size_t context_memory(void) { return (size_t)(setting("NULLGPU_CONTEXT_GB", 0.6) * 1e9); }
int device_count(void) { return (int)setting("NULLGPU_COUNT", 1); }
int capability(void) { return (int)setting("NULLGPU_CC", 90); }

void *new_handle(void) { return calloc(1, 512); }

static __thread int device;
int current_device(void) { return device; }

PUBLIC cudaError_t cudaGetDeviceCount(int *n) { *n = device_count(); return cudaSuccess; }
PUBLIC cudaError_t cudaGetDevice(int *found) { *found = device; return cudaSuccess; }
PUBLIC cudaError_t cudaSetDevice(int wanted) { device = wanted; return cudaSuccess; }
PUBLIC cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
PUBLIC cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
PUBLIC cudaError_t cudaDeviceCanAccessPeer(int *can, int one, int other) { *can = 1; return cudaSuccess; }

PUBLIC cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int of) {
    snprintf(id, size, "0000:%02d:00.0", of);
    return cudaSuccess;
}

/* An H200's figures: libraries choose kernels and grids by them. */
enum { PROCESSORS = 132, SHARED = 49152, SHARED_OPT_IN = 232448, SHARED_PER_PROCESSOR = 233472, CACHE = 60 << 20 };

PUBLIC cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *of, int number) {
    memset(of, 0, sizeof *of);
    snprintf(of->name, sizeof of->name, "Null GPU");
    of->uuid.bytes[0] = (char)(number + 1);
    of->totalGlobalMem = total_memory();
    of->major = capability() / 10;
    of->minor = capability() % 10;
    of->multiProcessorCount = PROCESSORS;
    of->warpSize = 32;
    of->maxThreadsPerBlock = 1024;
    of->maxThreadsPerMultiProcessor = 2048;
    of->maxBlocksPerMultiProcessor = 32;
    of->maxThreadsDim[0] = of->maxThreadsDim[1] = 1024;
    of->maxThreadsDim[2] = 64;
    of->maxGridSize[0] = 2147483647;
    of->maxGridSize[1] = of->maxGridSize[2] = 65535;
    of->sharedMemPerBlock = SHARED;
    of->sharedMemPerBlockOptin = SHARED_OPT_IN;
    of->sharedMemPerMultiprocessor = SHARED_PER_PROCESSOR;
    of->regsPerBlock = of->regsPerMultiprocessor = 65536;
    of->l2CacheSize = CACHE;
    of->totalConstMem = 65536;
    of->textureAlignment = 512;
    of->unifiedAddressing = of->concurrentKernels = of->cooperativeLaunch = of->managedMemory = 1;
    return cudaSuccess;
}

PUBLIC cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int number) {
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = capability() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability() % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = PROCESSORS; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_OPT_IN; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = SHARED_PER_PROCESSOR; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
    case cudaDevAttrL2CacheSize: *value = CACHE; break;
    default: *value = 1; /* of the rest, callers ask whether a feature is there */
    }
    return cudaSuccess;
}
