/* Memory. A block of the device is address space of the host that reads as zeros until something is copied into it.
 *
 * Copies of up to NULLGPU_COPY_BYTES are made, so that small values survive the way to the device and back. Larger ones
 * are only counted: a model of 20 GB then takes no memory here. A copy to the host that is not made gives zeros.
 */
#include "nullgpu.h"
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct block { char *start; size_t bytes; int pinned, device; };

/* Sorted by address, as pointers into a block are looked up at every copy. */
static struct block *blocks;
static int used, room;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t in_use[MAX_DEVICES];

/* Index of the first block that ends after the address. */
static int place_of(const char *address) {
    int low = 0, high = used;
    while (low < high) {
        int middle = (low + high) / 2;
        if (blocks[middle].start + blocks[middle].bytes <= address) low = middle + 1;
        else high = middle;
    }
    return low;
}

static struct block *block_of(const void *address) {
    int place = place_of(address);
    return place < used && blocks[place].start <= (const char *)address ? &blocks[place] : NULL;
}

void *reserve_block(size_t bytes, int pinned, int device) {
    if (!bytes) bytes = 1;
    char *start = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return NULL;
    pthread_mutex_lock(&lock);
    if (used == room) blocks = realloc(blocks, (room = room ? 2 * room : 1024) * sizeof *blocks);
    int place = place_of(start);
    memmove(blocks + place + 1, blocks + place, (used++ - place) * sizeof *blocks);
    blocks[place] = (struct block){start, bytes, pinned, device};
    pthread_mutex_unlock(&lock);
    return start;
}

/* Forgets and unmaps the block that starts here, and tells what it was. */
static struct block forget(void *start) {
    struct block found = {0};
    pthread_mutex_lock(&lock);
    int place = place_of(start);
    if (place < used && blocks[place].start == start) {
        found = blocks[place];
        memmove(blocks + place, blocks + place + 1, (--used - place) * sizeof *blocks);
        munmap(found.start, found.bytes);
    }
    pthread_mutex_unlock(&lock);
    return found;
}

int take_memory(int device, size_t bytes) {
    pthread_mutex_lock(&lock);
    int fits = in_use[device] + bytes + context_memory() <= total_memory();
    if (fits) in_use[device] += bytes;
    pthread_mutex_unlock(&lock);
    return fits;
}

void return_memory(int device, size_t bytes) {
    pthread_mutex_lock(&lock);
    in_use[device] -= bytes;
    pthread_mutex_unlock(&lock);
}

/* Errors: only out of memory exists here. As in CUDA, the last one is kept until it is asked for. */
static __thread cudaError_t last_error;

static cudaError_t out_of_memory(void) { return last_error = cudaErrorMemoryAllocation; }

PUBLIC cudaError_t cudaPeekAtLastError(void) { return last_error; }

PUBLIC cudaError_t cudaGetLastError(void) {
    cudaError_t found = last_error;
    last_error = cudaSuccess;
    return found;
}

PUBLIC const char *cudaGetErrorString(cudaError_t error) { return error ? "out of memory" : "no error"; }

PUBLIC const char *cudaGetErrorName(cudaError_t error) {
    return error ? "cudaErrorMemoryAllocation" : "cudaSuccess";
}

/* Allocation. */
PUBLIC cudaError_t cudaMalloc(void **found, size_t bytes) {
    *found = NULL;
    if (!take_memory(current_device(), bytes)) return out_of_memory();
    *found = reserve_block(bytes, 0, current_device());
    return *found ? cudaSuccess : out_of_memory();
}

PUBLIC cudaError_t cudaFree(void *start) {
    struct block freed = forget(start);
    if (freed.bytes && !freed.pinned) return_memory(freed.device, freed.bytes);
    return cudaSuccess;
}

PUBLIC cudaError_t cudaMallocAsync(void **found, size_t bytes, cudaStream_t stream) { return cudaMalloc(found, bytes); }
PUBLIC cudaError_t cudaFreeAsync(void *start, cudaStream_t stream) { return cudaFree(start); }
/* Managed memory, which bitsandbytes' paged optimizers use, counts as the device's. */
PUBLIC cudaError_t cudaMallocManaged(void **found, size_t bytes, unsigned flags) { return cudaMalloc(found, bytes); }

PUBLIC cudaError_t cudaHostAlloc(void **found, size_t bytes, unsigned flags) {
    *found = reserve_block(bytes, 1, current_device());
    return *found ? cudaSuccess : out_of_memory();
}

PUBLIC cudaError_t cudaMallocHost(void **found, size_t bytes) { return cudaHostAlloc(found, bytes, 0); }
PUBLIC cudaError_t cudaFreeHost(void *start) { return cudaFree(start); }

PUBLIC cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = total_memory();
    *available = *total - context_memory() - in_use[current_device()];
    return cudaSuccess;
}

PUBLIC cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *of, const void *address) {
    memset(of, 0, sizeof *of);
    pthread_mutex_lock(&lock);
    struct block *block = block_of(address);
    of->type = !block ? cudaMemoryTypeUnregistered : block->pinned ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    of->device = block ? block->device : -2;
    of->devicePointer = block ? (void *)address : NULL;
    of->hostPointer = block && !block->pinned ? NULL : (void *)address;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

PUBLIC CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    *(CUdeviceptr *)value = address;
    return CUDA_SUCCESS;
}

/* Virtual memory, on which expandable segments are built: addresses first, memory for them later. */
struct physical { size_t bytes; int device; };

PUBLIC CUresult cuMemAddressReserve(CUdeviceptr *found, size_t bytes, size_t alignment, CUdeviceptr wanted,
                                    unsigned long long flags) {
    *found = (CUdeviceptr)reserve_block(bytes, 0, current_device());
    return *found ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

PUBLIC CUresult cuMemAddressFree(CUdeviceptr start, size_t bytes) {
    forget((void *)start);
    return CUDA_SUCCESS;
}

PUBLIC CUresult cuMemCreate(CUmemGenericAllocationHandle *found, size_t bytes, const CUmemAllocationProp *of,
                            unsigned long long flags) {
    if (!take_memory(of->location.id, bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
    struct physical *memory = new_handle();
    *memory = (struct physical){bytes, of->location.id};
    *found = (CUmemGenericAllocationHandle)memory;
    return CUDA_SUCCESS;
}

PUBLIC CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    struct physical *memory = (struct physical *)handle;
    return_memory(memory->device, memory->bytes);
    free(memory);
    return CUDA_SUCCESS;
}

PUBLIC CUresult cuMemUnmap(CUdeviceptr start, size_t bytes) {
    madvise((void *)start, bytes, MADV_DONTNEED); /* reads as zeros again */
    return CUDA_SUCCESS;
}

PUBLIC CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *of,
                                              CUmemAllocationGranularity_flags flags) {
    *bytes = 2 << 20;
    return CUDA_SUCCESS;
}

/* Copies. */
static size_t copied_bytes(void) {
    static size_t limit;
    const char *given = getenv("NULLGPU_COPY_BYTES");
    if (!limit) limit = given ? strtoull(given, 0, 10) : 1 << 20;
    return limit;
}

enum kind { PAGEABLE, PINNED, DEVICE };

static enum kind kind_of(const void *address) {
    pthread_mutex_lock(&lock);
    struct block *block = block_of(address);
    enum kind kind = !block ? PAGEABLE : block->pinned ? PINNED : DEVICE;
    pthread_mutex_unlock(&lock);
    return kind;
}

/* Zeros without touching whole pages, which would take memory. */
static void clear(char *start, size_t bytes) {
    size_t page = sysconf(_SC_PAGESIZE);
    char *first = (char *)(((size_t)start + page - 1) / page * page);
    char *last = (char *)(((size_t)start + bytes) / page * page);
    memset(start, 0, first - start);
    madvise(first, last - first, MADV_DONTNEED);
    memset(last, 0, start + bytes - last);
}

void copy_block(void *to, const void *from, size_t bytes) {
    if (bytes <= copied_bytes()) memmove(to, from, bytes);
    else if (kind_of(to) != DEVICE) clear(to, bytes);
}

static cudaError_t copy(void *to, const void *from, size_t bytes) {
    struct counters *all = &nullgpu_counters;
    enum kind target = kind_of(to), source = kind_of(from);
    if (target == DEVICE && source == DEVICE) {
        count(&all->on_device, 1);
    } else {
        int to_device = target == DEVICE;
        count(to_device ? &all->to_device : &all->to_host, 1);
        count(to_device ? &all->to_device_bytes : &all->to_host_bytes, (long)bytes);
        if (target == PAGEABLE || source == PAGEABLE) {
            count(&all->pageable, 1);
            count(&all->pageable_bytes, (long)bytes);
            report_wait(to_device ? "pageable copy to the device" : "copy to pageable memory");
        }
    }
    copy_block(to, from, bytes);
    return cudaSuccess;
}

PUBLIC cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    return copy(to, from, bytes);
}

PUBLIC cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                                   cudaStream_t stream) {
    return copy(to, from, bytes);
}

PUBLIC cudaError_t cudaMemcpyPeerAsync(void *to, int target, const void *from, int source, size_t bytes,
                                       cudaStream_t stream) {
    return copy(to, from, bytes);
}

static cudaError_t set(void *start, int value, size_t bytes) {
    count(&nullgpu_counters.memsets, 1);
    if (bytes <= copied_bytes()) memset(start, value, bytes);
    return cudaSuccess;
}

PUBLIC cudaError_t cudaMemset(void *start, int value, size_t bytes) { return set(start, value, bytes); }

PUBLIC cudaError_t cudaMemsetAsync(void *start, int value, size_t bytes, cudaStream_t stream) {
    return set(start, value, bytes);
}
