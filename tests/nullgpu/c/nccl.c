/* NCCL: a collective gives each rank its own data back, as if all ranks had the same.
 *
 * Ranks do not meet here. The store over TCP through which torch starts the group is real.
 */
#include "nullgpu.h"
#include <nccl.h>
#include <stdlib.h>
#include <string.h>

struct ncclComm { int ranks, rank, device; };

static ncclResult_t join(ncclComm_t *found, int ranks, int rank) {
    *found = calloc(1, sizeof **found);
    **found = (struct ncclComm){ranks, rank, current_device()};
    return ncclSuccess;
}

PUBLIC ncclResult_t ncclGetVersion(int *version) { *version = NCCL_VERSION_CODE; return ncclSuccess; }
PUBLIC ncclResult_t ncclGetUniqueId(ncclUniqueId *id) { memset(id, 1, sizeof *id); return ncclSuccess; }
PUBLIC const char *ncclGetErrorString(ncclResult_t result) { return "no error"; }
PUBLIC const char *ncclGetLastError(ncclComm_t comm) { return "no error"; }

PUBLIC ncclResult_t ncclCommInitRank(ncclComm_t *found, int ranks, ncclUniqueId id, int rank) {
    return join(found, ranks, rank);
}

PUBLIC ncclResult_t ncclCommInitRankConfig(ncclComm_t *found, int ranks, ncclUniqueId id, int rank, ncclConfig_t *how) {
    return join(found, ranks, rank);
}

PUBLIC ncclResult_t ncclCommInitRankScalable(ncclComm_t *found, int ranks, int rank, int ids, ncclUniqueId *id,
                                             ncclConfig_t *how) {
    return join(found, ranks, rank);
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

static ncclResult_t give(void *to, const void *from, size_t bytes) {
    count(&nullgpu_counters.collectives, 1);
    if (to != from) copy_block(to, from, bytes);
    return ncclSuccess;
}

PUBLIC ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op,
                                  ncclComm_t comm, cudaStream_t stream) {
    return give(to, from, bytes_of(n, type));
}

PUBLIC ncclResult_t ncclBroadcast(const void *from, void *to, size_t n, ncclDataType_t type, int root, ncclComm_t comm,
                                  cudaStream_t stream) {
    return give(to, from, bytes_of(n, type));
}

PUBLIC ncclResult_t ncclAllGather(const void *from, void *to, size_t n, ncclDataType_t type, ncclComm_t comm,
                                  cudaStream_t stream) {
    for (int rank = 0; rank < comm->ranks; rank++) copy_block((char *)to + rank * bytes_of(n, type), from, bytes_of(n, type));
    return give(to, to, 0);
}
