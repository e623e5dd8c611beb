/* The driver's API, which Triton, cuDNN and torch's allocator call; they look its functions up by name. */
#include "nullgpu.h"
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#undef cuGetProcAddress

static char context[64];

PUBLIC CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
PUBLIC CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
PUBLIC CUresult cuDeviceGetCount(int *n) { *n = device_count(); return CUDA_SUCCESS; }
PUBLIC CUresult cuDeviceGet(CUdevice *found, int number) { *found = number; return CUDA_SUCCESS; }

PUBLIC CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    snprintf(name, size, "Null GPU");
    return CUDA_SUCCESS;
}

PUBLIC CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) { *bytes = total_memory(); return CUDA_SUCCESS; }

PUBLIC CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    return (CUresult)cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device); /* the same numbers */
}

/* Each device has its context from the start. */
PUBLIC CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

PUBLIC CUresult cuDevicePrimaryCtxRetain(CUcontext *found, CUdevice device) {
    *found = (CUcontext)context;
    return CUDA_SUCCESS;
}

PUBLIC CUresult cuCtxGetCurrent(CUcontext *found) { *found = (CUcontext)context; return CUDA_SUCCESS; }
PUBLIC CUresult cuCtxSetCurrent(CUcontext wanted) { return CUDA_SUCCESS; }
PUBLIC CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
PUBLIC CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
PUBLIC CUresult cuCtxGetDevice(CUdevice *found) { *found = current_device(); return CUDA_SUCCESS; }

/* Modules, as Triton loads and launches them. */
PUBLIC CUresult cuModuleLoadData(CUmodule *found, const void *image) { *found = new_handle(); return CUDA_SUCCESS; }

PUBLIC CUresult cuModuleLoadDataEx(CUmodule *found, const void *image, unsigned n, CUjit_option *options, void **values) {
    return cuModuleLoadData(found, image);
}

PUBLIC CUresult cuModuleLoad(CUmodule *found, const char *file) { *found = new_handle(); return CUDA_SUCCESS; }
PUBLIC CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

PUBLIC CUresult cuModuleGetFunction(CUfunction *found, CUmodule module, const char *name) {
    *found = new_handle();
    return CUDA_SUCCESS;
}

PUBLIC CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
    return CUDA_SUCCESS;
}

PUBLIC CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    return CUDA_SUCCESS;
}

PUBLIC CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache wanted) { return CUDA_SUCCESS; }

PUBLIC CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}

PUBLIC CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *how) {
    *clusters = 1;
    return CUDA_SUCCESS;
}

static CUresult launch(void) {
    count(&nullgpu_counters.launches, 1);
    return CUDA_SUCCESS;
}

PUBLIC CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x,
                               unsigned y, unsigned z, unsigned shared, CUstream stream, void **arguments, void **more) {
    return launch();
}

PUBLIC CUresult cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction function, void **arguments, void **more) {
    return launch();
}

PUBLIC CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "no error";
    return CUDA_SUCCESS;
}

/* Looking functions up. One that the null GPU lacks succeeds and does nothing. */
static int do_nothing(void) { return 0; }

static void *function_of(const char *name) {
    static const char *const versions[] = {"", "_v2", "_v3", "_v4"};
    char versioned[256];
    for (int i = 0; i < 4; i++) {
        snprintf(versioned, sizeof versioned, "%s%s", name, versions[i]);
        void *found = dlsym(RTLD_DEFAULT, versioned);
        if (found) return found;
    }
    return (void *)do_nothing;
}

PUBLIC CUresult cuGetProcAddress_v2(const char *name, void **found, int version, cuuint64_t flags,
                                    CUdriverProcAddressQueryResult *status) {
    *found = function_of(name);
    if (status) *status = CU_GET_PROC_ADDRESS_SUCCESS;
    return CUDA_SUCCESS;
}

PUBLIC CUresult cuGetProcAddress(const char *name, void **found, int version, cuuint64_t flags) {
    return cuGetProcAddress_v2(name, found, version, flags, NULL);
}

PUBLIC cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version,
                                                    unsigned long long flags,
                                                    enum cudaDriverEntryPointQueryResult *status) {
    *found = function_of(name);
    if (status) *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
