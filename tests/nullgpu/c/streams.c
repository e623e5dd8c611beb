/* Streams and events: all work is done as soon as it is submitted. Waiting for it is what is counted. */
#include "nullgpu.h"
#include <cuda_runtime_api.h>
#include <stdlib.h>

static cudaError_t wait_for(const char *what) {
    count(&nullgpu_counters.syncs, 1);
    report_wait(what);
    return cudaSuccess;
}

PUBLIC cudaError_t cudaDeviceSynchronize(void) { return wait_for("wait for the device"); }
PUBLIC cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait_for("wait for a stream"); }

/* Not reported: the trainer waits for an event of an earlier step, which costs nothing. It is counted apart. */
PUBLIC cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    count(&nullgpu_counters.event_waits, 1);
    return cudaSuccess;
}

PUBLIC cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
PUBLIC cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }

PUBLIC cudaError_t cudaEventCreate(cudaEvent_t *found) { *found = new_handle(); return cudaSuccess; }

PUBLIC cudaError_t cudaEventCreateWithFlags(cudaEvent_t *found, unsigned flags) { return cudaEventCreate(found); }

PUBLIC cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }

PUBLIC cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    *ms = 1; /* not 0, by which throughputs are divided */
    return cudaSuccess;
}

PUBLIC cudaError_t cudaStreamCreate(cudaStream_t *found) { *found = new_handle(); return cudaSuccess; }

PUBLIC cudaError_t cudaStreamCreateWithFlags(cudaStream_t *found, unsigned flags) { return cudaStreamCreate(found); }

PUBLIC cudaError_t cudaStreamCreateWithPriority(cudaStream_t *found, unsigned flags, int priority) {
    return cudaStreamCreate(found);
}

PUBLIC cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }

PUBLIC cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

/* No stream is ever captured into a graph: the allocator asks at every allocation. */
PUBLIC cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

PUBLIC cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                            const cudaGraphEdgeData **edges, size_t *number) {
    if (id) *id = 0;
    if (number) *number = 0;
    return cudaStreamIsCapturing(stream, status);
}
