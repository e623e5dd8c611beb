/* What the sources of the null GPU share: its settings, its counters, and how an event reaches Python. */
#ifndef NULLGPU_H
#define NULLGPU_H
#define _GNU_SOURCE
#include <stddef.h>

#define PUBLIC __attribute__((visibility("default")))
#define MAX_DEVICES 16

/* Counters, read from Python by name (tests/nullgpu/counts.py). All are of this process, over all devices. */
struct counters {
    long launches;             /* kernels, without cuBLAS's */
    long products;             /* calls of cuBLAS that multiply matrices */
    long memsets;
    long syncs;                /* the host waits for a stream or a device */
    long event_waits;          /* the host waits for an event */
    long to_device, to_device_bytes;
    long to_host, to_host_bytes;
    long pageable, pageable_bytes; /* copies between the device and host memory that is not pinned */
    long on_device;            /* copies within a device */
    long collectives;          /* of NCCL */
};
extern PUBLIC struct counters nullgpu_counters;

/* Called at each host wait and each pageable copy, in the thread that makes it; null by default. */
extern PUBLIC void (*nullgpu_on_wait)(const char *what);

void count(long *counter, long by);
void report_wait(const char *what);

/* Settings, from the environment. */
size_t total_memory(void);     /* NULLGPU_GB, in 1e9 bytes */
size_t context_memory(void);   /* NULLGPU_CONTEXT_GB: what CUDA itself takes of it */
int device_count(void);        /* NULLGPU_COUNT */
int capability(void);          /* NULLGPU_CC: 90 is 9.0 */

int current_device(void);

/* Device memory by device; the limit is total_memory() - context_memory(). */
int take_memory(int device, size_t bytes);    /* 0 where the limit forbids it */
void return_memory(int device, size_t bytes);
size_t memory_in_use(int device);

/* A block that stands for memory of a device or pinned memory of the host. */
void *reserve_block(size_t bytes, int pinned, int device);
void release_block(void *start, size_t bytes);
void copy_block(void *to, const void *from, size_t bytes);

/* An opaque object that callers only pass back: a handle, a stream, a descriptor. */
void *new_handle(void);
#endif
