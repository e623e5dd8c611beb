/* NCCL: the ranks wait for each other, and each gets its own data back, as if all had the same.
 *
 * They meet in a page of shared memory, whose name is the id that torch sends to all ranks through its own store.
 */
#include "nullgpu.h"
#include <fcntl.h>
#include <nccl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct meeting { volatile int arrived, round; };
struct ncclComm { int ranks, rank, device; struct meeting *meeting; };

enum { WAIT_US = 200, MOST_WAITS = 60 * 1000000 / WAIT_US };

/* Returns when all ranks have called it, or with an error after a minute. The last to arrive opens the next round. */
static ncclResult_t meet(ncclComm_t comm) {
    struct meeting *at = comm->meeting;
    int round = at->round;
    if (__sync_add_and_fetch(&at->arrived, 1) == comm->ranks) {
        at->arrived = 0;
        __sync_fetch_and_add(&at->round, 1);
        return ncclSuccess;
    }
    for (int waits = 0; at->round == round; waits++) {
        if (waits == MOST_WAITS) return ncclRemoteError;
        usleep(WAIT_US);
    }
    return ncclSuccess;
}

static ncclResult_t join(ncclComm_t *found, int ranks, ncclUniqueId id, int rank) {
    int file = shm_open(id.internal, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, sizeof(struct meeting))) return ncclSystemError;
    struct meeting *meeting = mmap(0, sizeof *meeting, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    *found = calloc(1, sizeof **found);
    **found = (struct ncclComm){ranks, rank, current_device(), meeting};
    ncclResult_t result = meet(*found);
    if (rank == 0) shm_unlink(id.internal);
    return result;
}

PUBLIC ncclResult_t ncclGetVersion(int *version) { *version = NCCL_VERSION_CODE; return ncclSuccess; }

PUBLIC ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    static int number;
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/nullgpu-%d-%d", getpid(), number++);
    return ncclSuccess;
}

PUBLIC const char *ncclGetErrorString(ncclResult_t result) { return result ? "a rank did not arrive" : "no error"; }
PUBLIC const char *ncclGetLastError(ncclComm_t comm) { return ""; }

PUBLIC ncclResult_t ncclCommInitRank(ncclComm_t *found, int ranks, ncclUniqueId id, int rank) {
    return join(found, ranks, id, rank);
}

PUBLIC ncclResult_t ncclCommInitRankConfig(ncclComm_t *found, int ranks, ncclUniqueId id, int rank, ncclConfig_t *how) {
    return join(found, ranks, id, rank);
}

PUBLIC ncclResult_t ncclCommInitRankScalable(ncclComm_t *found, int ranks, int rank, int ids, ncclUniqueId *id,
                                             ncclConfig_t *how) {
    return join(found, ranks, *id, rank);
}

PUBLIC ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) { *error = ncclSuccess; return ncclSuccess; }
PUBLIC ncclResult_t ncclCommCount(const ncclComm_t comm, int *ranks) { *ranks = comm->ranks; return ncclSuccess; }
PUBLIC ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank) { *rank = comm->rank; return ncclSuccess; }
PUBLIC ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int *device) { *device = comm->device; return ncclSuccess; }

static size_t bytes_of(size_t n, ncclDataType_t type) {
    switch (type) {
    case ncclFloat16: case ncclBfloat16: return 2 * n;
    case ncclInt32: case ncclUint32: case ncclFloat32: return 4 * n;
    case ncclInt64: case ncclUint64: case ncclFloat64: return 8 * n;
    default: return n;
    }
}

static ncclResult_t give(void *to, const void *from, size_t bytes, ncclComm_t comm) {
    count(&nullgpu_counters.collectives, 1);
    if (to != from) copy_block(to, from, bytes);
    return meet(comm);
}

PUBLIC ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op,
                                  ncclComm_t comm, cudaStream_t stream) {
    return give(to, from, bytes_of(n, type), comm);
}

PUBLIC ncclResult_t ncclBroadcast(const void *from, void *to, size_t n, ncclDataType_t type, int root, ncclComm_t comm,
                                  cudaStream_t stream) {
    return give(to, from, bytes_of(n, type), comm);
}

PUBLIC ncclResult_t ncclAllGather(const void *from, void *to, size_t n, ncclDataType_t type, ncclComm_t comm,
                                  cudaStream_t stream) {
    for (int rank = 0; rank < comm->ranks; rank++) copy_block((char *)to + rank * bytes_of(n, type), from, bytes_of(n, type));
    return give(to, to, 0, comm);
}
